"""Read photographs of every common kind, or refuse them in one line."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from util.image_io import NotAnImage, UnreadableImage, read_photo, write_image


@pytest.fixture
def picture() -> np.ndarray:
    """Return (40, 60, 3) smooth colors that differ from corner to corner."""
    corners = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [240, 240, 20]]], np.uint8)
    return cv2.resize(corners, (60, 40), interpolation=cv2.INTER_LINEAR)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp", "jp2"])
def test_read_photo_lossless_formats_exactly(tmp_path, picture, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(picture).save(file, **({"lossless": True} if suffix == "webp" else {}))
    read = read_photo(file)
    assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(read, picture)


def test_read_photo_jpeg_equals_opencv(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=90)
    np.testing.assert_array_equal(read_photo(tmp_path / "a.jpg"), cv2.imread(str(tmp_path / "a.jpg"))[:, :, ::-1])


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "PA", "CMYK", "YCbCr"])
def test_read_photo_converts_color_modes(tmp_path, picture, mode):
    image = Image.fromarray(picture).convert(mode)
    file = tmp_path / {"CMYK": "a.jpg", "YCbCr": "a.jpg", "PA": "a.tiff"}.get(mode, "a.png")
    image.save(file)
    read = read_photo(file)
    assert read.shape == (40, 60, 3)
    assert np.abs(read.astype(int) - np.asarray(image.convert("RGB"))).mean() < 4


def test_read_photo_converts_16_bits_to_8(tmp_path, picture):
    wide = picture.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "rgb.png"), wide[:, :, ::-1])
    cv2.imwrite(str(tmp_path / "grey.png"), wide[:, :, 0])
    np.testing.assert_array_equal(read_photo(tmp_path / "rgb.png"), picture)
    np.testing.assert_array_equal(read_photo(tmp_path / "grey.png"), np.repeat(picture[:, :, :1], 3, axis=2))


def test_read_photo_transparent_becomes_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = [10, 20, 30, 255]
    pixels[:, 4:] = [200, 0, 0, 0]  # hidden red
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = read_photo(tmp_path / "a.png")
    assert (read[:, :4] == [10, 20, 30]).all() and (read[:, 4:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_read_photo_applies_exif_orientation(tmp_path, picture, orientation, suffix):
    back = [
        None,
        *(Image.Transpose(value) for value in (0, 3, 1, 5, 2, 6, 4)),
    ]  # reverted by each orientation
    image, how = Image.fromarray(picture), back[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if how is None else image.transpose(how)).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    read = read_photo(tmp_path / f"a.{suffix}")
    assert read.shape == picture.shape
    assert np.abs(read.astype(int) - picture).mean() < 4


def test_read_photo_first_image_of_a_file(tmp_path, picture):
    first, second = Image.fromarray(picture).quantize(16), Image.new("P", (60, 40))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert np.abs(read_photo(tmp_path / "a.gif").astype(int) - picture).mean() < 40


def broken(tmp_path: Path, name: str, content: bytes) -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_read_photo_refuses_truncated_files(tmp_path, picture, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    with pytest.raises(UnreadableImage, match="restore or remove it") as caught:
        read_photo(broken(tmp_path, f"a.{suffix}", content[: int(len(content) * share)]))
    assert "\n" not in str(caught.value)


def test_read_photo_refuses_damaged_bytes(tmp_path, picture):
    Image.fromarray(cv2.resize(picture, (600, 400))).save(tmp_path / "whole.png")
    content = bytearray((tmp_path / "whole.png").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    with pytest.raises(UnreadableImage):
        read_photo(broken(tmp_path, "a.png", bytes(content)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jpg", b"", "empty file"),
        ("a.jpg", b"hello", "not an image in spite of its name"),
        ("a.HEIC", b"\0\0\0\x18ftypheic", "HEIC is not supported; convert it"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(50), "cannot be read|not an image"),
        (
            "a.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not an image",
        ),  # Pillow would start Ghostscript
    ],
)
def test_read_photo_gives_reason_for_unreadable_files(tmp_path, name, content, reason):
    with pytest.raises(UnreadableImage, match=reason):
        read_photo(broken(tmp_path, name, content))


@pytest.mark.parametrize("name", ["notes.txt", "Thumbs.db", "noextension", "a.eps", "film.mp4"])
def test_read_photo_other_files_are_not_images(tmp_path, name):
    with pytest.raises(NotAnImage):
        read_photo(broken(tmp_path, name, b"%!PS-Adobe-3.0 EPSF-3.0\n" if name == "a.eps" else b"something else"))


def test_read_photo_ignores_missing_suffix(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a")
    np.testing.assert_array_equal(read_photo(tmp_path / "a"), picture)


def test_read_photo_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_photo(tmp_path / "a.jpg")


def test_read_photo_refuses_decompression_bomb(tmp_path, monkeypatch):
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 50_000
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match=r"too large .*200000000 pixels.*make it smaller"):
        read_photo(tmp_path / "bomb.png")


def test_read_photo_names_not_utf8(tmp_path, picture):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    Image.fromarray(picture).save(tmp_path / "a.png")
    try:
        (tmp_path / "a.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    np.testing.assert_array_equal(read_photo(tmp_path / name), picture)


@pytest.mark.parametrize(("suffix", "difference"), [("png", 0), ("jpg", 3)])
def test_write_image_is_read_back(tmp_path, picture, suffix, difference):
    write_image(tmp_path / "new" / f"a.{suffix}", picture)
    assert np.abs(read_photo(tmp_path / "new" / f"a.{suffix}").astype(int) - picture).mean() <= difference
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"a.{suffix}"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.write_bytes(b"RIFF") and os.truncate(path, 2**40), "at most 1073741824 are read"),
    ],
)
def test_read_photo_refuses_files_without_end(tmp_path, make, reason):
    make(tmp_path / "a.webp")
    with pytest.raises(UnreadableImage, match=rf"cannot be read \(.*{reason}\); restore or remove it"):
        read_photo(tmp_path / "a.webp")
