"""Training images that cannot be used: each kind of bad file, replaced from the sample's own random numbers."""

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from util import transform
from util.data.bad_images import MIN_SEEN, BadImage, BadImages
from util.data.image_folder import ImageFolder
from util.data.loader import Augmentation, TrainLoader
from util.data.record_dataset import RecordImages
from util.data.recordio import write_identities
from util.data.sampler import BalancedSampler, SampleRng
from util.errors import DataError
from util.image_io import declared_size

STEPS, BATCH, SEED = 8, 3, 3


def jpeg(height: int = 112, width: int = 112) -> bytes:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def png_bomb() -> bytes:
    """Return a PNG of 14000 x 14000 pixels in 25 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 14000, 14000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(14000 * 1751), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """Return a JPEG that declares 30000 x 30000 pixels and has those of 112 x 112."""
    content = jpeg()
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + struct.pack(">HH", 30000, 30000) + content[frame + 9 :]


CONTENTS = {
    "empty": (b"", "empty"),
    "text": (b"not an image", "not an image"),
    "zeros": (bytes(5000), "not an image"),
    "truncated header": (jpeg()[:20], "not an image"),
    "half": (jpeg()[: len(jpeg()) // 2], "not an image"),
    "other format": (b"GIF89a" + bytes(200), "not an image"),
    "wrong shape": (jpeg(112, 96), "96x112 is not square"),
    "one pixel": (jpeg(1, 1), "1x1 pixels are too few"),
    "png bomb": (png_bomb(), "14000x14000 pixels, more than 4096x4096"),
    "jpeg bomb": (jpeg_bomb(), "30000x30000 pixels, more than 4096x4096"),
}
PLACES = {
    "directory": (lambda path: path.mkdir(), "a folder"),
    "dangling link": (lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
    "missing": (lambda path: None, "No such file"),
    "fifo": (os.mkfifo, "not a regular file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "sparse": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40), "at most 134217728 are read"),
}


def spoil(path: Path, kind: str) -> str:
    """Replace an image by a bad one and return what the message must have."""
    path.unlink()
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind][0])
        return CONTENTS[kind][1]
    PLACES[kind][0](path)
    return PLACES[kind][1]


def batches(images, epoch: int = 0, start_step: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor, TrainLoader]:
    """Return the images and labels of an epoch, and the loader that made them."""
    options = {"seed": SEED, "steps": STEPS, "max_bad": 1.0} | options
    loader = TrainLoader(images, BATCH, Augmentation(), **options)
    made = []
    for batch in loader.epoch(epoch, start_step):
        loader.bad.count_batch()
        made.append(batch)
    loader.close()
    pixels, labels = zip(*made, strict=True)
    return torch.cat(pixels), torch.cat(labels), loader


def assert_replaced(images, wrong: int, before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor) -> None:
    """Assert that samples of other images stayed, and each sample of `wrong` shows another image of its identity."""
    order = BalancedSampler(images.labels, BATCH, SEED, STEPS).order(0)
    same = np.setdiff1d(np.flatnonzero(images.labels == images.labels[wrong]), wrong)
    assert len(same)
    rng = SampleRng(SEED, 0)
    for position, index in enumerate(order.tolist()):
        assert labels[position] == images.labels[index]
        if index != wrong:
            assert torch.equal(after[position], before[position])
        else:
            crops = [transform.train_crop(images.image(other), rng.for_sample(position)) for other in same]
            assert any((after[position].numpy() == crop).all() for crop in crops)


def drawn_at(images, position: int) -> int:
    """Return the first image from `position` on that epoch 0 draws and that has another of its identity."""
    order = BalancedSampler(images.labels, BATCH, SEED, STEPS).order(0)[position:]
    return next(index for index in order.tolist() if (images.labels == images.labels[index]).sum() > 1)


@pytest.mark.parametrize("position", [0, 10])
@pytest.mark.parametrize("kind", [*CONTENTS, *PLACES])
def test_loader_replaces_a_bad_file(people_folder, capsys, kind, position):
    images = ImageFolder(people_folder)
    before = batches(images)[0]
    wrong = drawn_at(images, position)
    reason = spoil(images.path(wrong), kind)
    after, labels, loader = batches(images)
    assert_replaced(images, wrong, before, after, labels)
    drawn = int((BalancedSampler(images.labels, BATCH, SEED, STEPS).order(0) == wrong).sum())
    assert (loader.bad.seen, loader.bad.bad) == (STEPS * BATCH + drawn, drawn)
    assert loader.bad.state_dict()["names"] == [images.where(wrong)]
    (line,) = capsys.readouterr().out.splitlines()  # once, however often it is drawn
    assert line.startswith(f"{images.where(wrong)}: ") and reason in line
    assert line.endswith(" Another image is used instead.")


@pytest.mark.parametrize("kind", CONTENTS)
def test_loader_replaces_a_bad_record(people_folder, tmp_path, kind):
    folder = ImageFolder(people_folder)
    people = [[folder.encoded(i) for i in np.flatnonzero(folder.labels == label)] for label in range(3)]
    write_identities(tmp_path / "good.rec", people)
    good = RecordImages(tmp_path / "good.rec")
    before = batches(good)[0]
    wrong = drawn_at(good, 0)
    first = int(np.flatnonzero(good.labels == good.labels[wrong])[0])
    people[good.labels[wrong]][wrong - first] = CONTENTS[kind][0]
    write_identities(tmp_path / "train.rec", people)
    images = RecordImages(tmp_path / "train.rec")
    after, labels, loader = batches(images)
    assert_replaced(images, wrong, before, after, labels)
    assert loader.bad.state_dict()["names"] == [f"{tmp_path / 'train.rec'}: record {wrong + 1}"]


def test_loader_replaces_a_file_without_permission(people_folder, monkeypatch):
    images = ImageFolder(people_folder)
    before = batches(images)[0]
    wrong = drawn_at(images, 0)
    path, real = images.where(wrong), os.open

    def refuse(name, *arguments):
        if str(name) == path:
            raise PermissionError(13, "Permission denied", path)
        return real(name, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    after, labels, loader = batches(images)
    assert list(loader.bad.names) == [path]
    assert_replaced(images, wrong, before, after, labels)


def test_replacements_are_the_same_with_any_workers(write_image_folder):
    images = ImageFolder(write_image_folder(Ann=len(CONTENTS) + len(PLACES) + 9, Bob=9))
    for index, kind in enumerate([*CONTENTS, *PLACES]):
        spoil(images.path(index), kind)
    pixels, labels, alone = batches(images, 2, steps=20)
    for workers in (1, 2):
        again, labels_again, helped = batches(images, 2, steps=20, num_workers=workers)
        assert torch.equal(again, pixels) and torch.equal(labels_again, labels)
        assert helped.bad.state_dict() == alone.bad.state_dict()
    assert len(alone.bad.names) > 10 and alone.bad.bad > 20
    part, _, _ = batches(images, 2, start_step=11, steps=20)
    assert torch.equal(part, pixels[11 * BATCH :])


def test_identity_without_a_good_image_is_replaced(people_folder):
    images = ImageFolder(people_folder)
    for index in np.flatnonzero(images.labels == 1).tolist():
        spoil(images.path(index), "text")
    _, labels, loader = batches(images)
    assert set(labels.tolist()) == {0, 2}
    assert len(loader.bad.names) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_set_without_a_good_image_is_an_error(people_folder, workers):
    images = ImageFolder(people_folder)
    for index in range(len(images)):
        spoil(images.path(index), "text")
    with pytest.raises(DataError, match=r"\.jpg: not an image that can be decoded\. Restore it or remove it\.$"):
        batches(images, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_is_an_error_with_max_bad_zero(people_folder, workers):
    images = ImageFolder(people_folder)
    spoil(images.path(drawn_at(images, 10)), "half")
    with pytest.raises(DataError, match=r"\.jpg: not an image that can be decoded"):
        batches(images, max_bad=0.0, num_workers=workers)


# --- Counting.


def count(bad: BadImages, size: int, *names: str) -> None:
    bad.add(size, [BadImage(name, f"{name}: empty. Restore it.") for name in names])
    bad.count_batch()


def test_bad_images_end_a_run_when_they_are_too_many():
    bad = BadImages("data/imgs", 0.001)
    for number in range(5):
        count(bad, 998 if number else 3000, f"{number}.jpg")
    assert (bad.seen, bad.bad) == (6997, 5)
    with pytest.raises(DataError) as caught:
        count(bad, 0, "5.jpg", "6.jpg")
    assert str(caught.value) == (
        "data/imgs: 7 of 6,999 images cannot be used, more than --max_bad=0.001 allows, first 0.jpg. Remove them "
        "(python -m applications.prepare.check lists them), or raise --max_bad."
    )


def test_bad_images_end_no_run_that_has_just_begun():
    bad = BadImages("data/imgs", 0.001)
    count(bad, 60, "a.jpg", "b.jpg", "c.jpg")
    count(bad, MIN_SEEN - 65, "d.jpg")
    assert bad.seen == MIN_SEEN - 1
    with pytest.raises(DataError, match="4 of 1,000"):
        count(bad, 1)


def test_single_bad_file_ends_no_run():
    bad = BadImages("data/imgs", 0.001)
    for _ in range(100):
        count(bad, 100, "a.jpg", "a.jpg")
    assert (bad.bad, list(bad.names)) == (200, ["a.jpg"])
    with pytest.raises(DataError, match="201 of"):
        count(bad, 0, "b.jpg")


def test_bad_images_report_each_name_once(capsys):
    bad = BadImages("data/imgs", 0.5)
    for names in (["a.jpg"], ["b.jpg", "a.jpg"], ["a.jpg"]):
        count(bad, 8, *names)
    lines = [f"{name}: empty. Restore it. Another image is used instead." for name in ("a.jpg", "b.jpg")]
    assert capsys.readouterr().out.splitlines() == lines


def test_bad_images_continue_from_their_state(capsys):
    bad = BadImages("data/imgs", 0.5)
    count(bad, 64, "a.jpg", "b.jpg")
    again = BadImages("data/imgs", 0.5)
    again.load_state_dict(bad.state_dict())
    capsys.readouterr()
    count(again, 64, "b.jpg")
    assert again.state_dict() == {"seen": 131, "bad": 3, "names": ["a.jpg", "b.jpg"]}
    assert capsys.readouterr().out == ""


def test_batches_made_ahead_are_not_counted(people_folder):
    """A checkpoint after step 2 must not count the batch that was prefetched for step 3."""
    images = ImageFolder(people_folder)
    loader = TrainLoader(images, BATCH, Augmentation(), seed=SEED, steps=STEPS, max_bad=1.0)
    made = loader.epoch(0)
    for _ in range(3):
        next(made)
    loader.bad.count_batch()
    loader.bad.count_batch()
    assert loader.bad.seen == 2 * BATCH
    for _ in loader.epoch(0, start_step=2):
        loader.bad.count_batch()
    assert loader.bad.seen == STEPS * BATCH


# --- Headers.


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_declared_size_is_that_of_the_pixels(suffix):
    image = np.zeros((40, 70, 3), np.uint8)
    assert declared_size(cv2.imencode(suffix, image)[1].tobytes()) == (70, 40)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(3000)}, {"restart": 1}])
def test_declared_size_of_any_jpeg(tmp_path, options):
    parameters = [cv2.IMWRITE_JPEG_PROGRESSIVE, int("progressive" in options), cv2.IMWRITE_JPEG_RST_INTERVAL, 1]
    content = cv2.imencode(".jpg", np.zeros((40, 70, 3), np.uint8), parameters)[1].tobytes()
    if "exif" in options:
        segment = options["exif"]
        content = content[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + content[2:]
    assert declared_size(content) == (70, 40)


@pytest.mark.parametrize("marker", [b"\xff\x01", b"\xff\xd0", b"\xff\xff", b"\xff\xd8"])
def test_declared_size_is_not_led_to_another_frame(marker):
    """The marker has no length. Who takes the next two bytes for one lands at a frame of 112 x 112."""
    bomb = jpeg_bomb()
    bomb = bomb[:2] + marker + bomb[2:]
    target = 4 + int.from_bytes(bomb[4:6])
    assert len(bomb) < target
    forged = bomb + bytes(target - len(bomb)) + b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 112, 112) + bytes(9)
    assert declared_size(forged) in (None, (30000, 30000))


def test_declared_size_finds_a_frame_after_fill_bytes():
    content = cv2.imencode(".jpg", np.zeros((40, 70, 3), np.uint8))[1].tobytes()
    frame = content.index(b"\xff\xc0")
    assert declared_size(content[:frame] + b"\xff\xff\xff" + content[frame:]) == (70, 40)
