"""Pairs for super resolution are those that evaluation makes, and can be made again; each image validates once."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from applications.super_resolution.faces import PairDataset, PairTransform, as_face, hold_out, open_faces, some_faces
from util.data.loader import TrainLoader, open_training_images
from util.data.recordio import write_identities
from util.data.sampler import BatchIndices
from util.errors import DataError
from util.transform import degrade, shrink


def pairs(images, view: PairTransform, batch: BatchIndices, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    low, high, _ = PairDataset(images, view, seed)[batch]
    return low.numpy(), high.numpy()


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("crop_share", [0.0, 1.0])
def test_small_images_are_what_evaluation_shrinks(people_folder, scale, crop_share):
    images = open_training_images(people_folder)
    low, high = pairs(images, PairTransform(scale, crop_share=crop_share), BatchIndices(2, 0, np.arange(7)))
    assert low.shape == (7, 112 // scale, 112 // scale, 3) and high.shape == (7, 112, 112, 3)
    for small, large in zip(low, high, strict=True):
        assert np.array_equal(small, shrink(large, 112 // scale))
        assert np.array_equal(shrink(small[None], 112)[0], degrade(large, 112 // scale))  # bicubic, as it is judged


def test_faces_are_as_they_are_stored_or_mirrored(people_folder):
    images = open_training_images(people_folder)
    _, high = pairs(images, PairTransform(4), BatchIndices(0, 0, np.zeros(40, int)))
    stored = images.image(0)
    mirrored = [np.array_equal(face, stored[:, ::-1]) for face in high]
    assert all(flip or np.array_equal(face, stored) for flip, face in zip(mirrored, high, strict=True))
    assert 8 < sum(mirrored) < 32


def test_other_sizes_are_resized_first(write_image_folder):
    images = open_training_images(write_image_folder(size=150, Ann=2, Bob=2))
    expected = cv2.resize(images.image(1), (112, 112), interpolation=cv2.INTER_LINEAR)
    _, high = pairs(images, PairTransform(4), BatchIndices(0, 0, np.full(6, 1)))
    assert any(np.array_equal(face, expected) for face in high)
    assert np.array_equal(as_face(images.image(1)), expected)


def test_patches_lie_at_the_same_place_in_both_images(people_folder):
    images, batch = open_training_images(people_folder), BatchIndices(1, 8, np.array([0, 3, 5] * 5))
    whole_low, whole_high = pairs(images, PairTransform(4), batch)
    low, high = pairs(images, PairTransform(4, patch=6), batch)
    assert low.shape == (15, 6, 6, 3) and high.shape == (15, 24, 24, 3)
    corners = set()
    for index in range(15):
        windows = np.lib.stride_tricks.sliding_window_view(whole_low[index], (6, 6, 3))[:, :, 0]
        found = np.argwhere((windows == low[index]).all(axis=(2, 3, 4)))
        places = [tuple(corner) for corner in found]
        assert any(np.array_equal(whole_high[index][4 * y :, 4 * x :][:24, :24], high[index]) for y, x in places)
        corners.update(places)
    assert len(corners) > 5


@pytest.mark.parametrize("view", [PairTransform(4, crop_share=0.5), PairTransform(2, patch=9, crop_share=0.5)])
def test_pairs_do_not_depend_on_the_number_of_workers(people_folder, view):
    def epoch(workers: int, number: int) -> list[torch.Tensor]:
        images = open_training_images(people_folder)
        loader = TrainLoader(images, 3, view, seed=5, num_workers=workers, steps=4, dataset=PairDataset)
        assert len(loader) == 4
        return [tensor for batch in loader.epoch(number) for tensor in batch]

    first = epoch(0, 1)
    assert len(first) == 8
    assert all(torch.equal(one, other) for one, other in zip(first, epoch(2, 1), strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(first, epoch(0, 2), strict=True))


def test_people_held_out_are_not_trained_on(write_image_folder):
    images = open_training_images(write_image_folder(**{f"P{number:02d}": 1 + number % 3 for number in range(20)}))
    kept, held_out = hold_out(images, 0.2, seed=1)
    assert len(held_out.classes) == 4 and not set(kept.classes) & set(held_out.classes)
    assert len(kept) + len(held_out) == len(images)
    for part in (kept, held_out):
        assert np.array_equal(np.unique(part.labels), np.arange(len(part.classes)))
        for index in range(len(part)):
            person = part.classes[part.labels[index]]
            assert Path(part.where(index)).parent.name == person
            assert np.array_equal(part.image(index), cv2.imread(part.where(index))[:, :, ::-1])
    assert hold_out(images, 0.2, seed=1)[1].classes == held_out.classes
    assert len(hold_out(images, 0.001, seed=1)[1].classes) == 1
    assert len(hold_out(images, 1.0, seed=1)[0].classes) == 1


def test_every_kind_of_set_can_be_validated_on(people_folder, made_pairs, tmp_path):
    images = open_training_images(people_folder)
    record = tmp_path / "rec" / "train.rec"
    record.parent.mkdir()
    write_identities(record, [[images.encoded(0), images.encoded(1)], [images.encoded(2)]])
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "face.jpg").write_bytes(images.encoded(4))
    for path, total in ((people_folder, 7), (record, 3), (record.parent, 3), (flat, 1)):
        count, read = open_faces(path)
        assert count == total and read(0).shape == (112, 112, 3)
    count, read = open_faces(made_pairs[0])
    assert count == 46 and np.array_equal(read(5), made_pairs[1][5])


def test_each_image_of_a_verification_set_counts_once(made_pairs):
    path, images, issame = made_pairs
    chosen = some_faces(*open_faces(path), 1000, seed=0)
    assert len(chosen) == len(images) - issame.sum() == len({face.tobytes() for face in chosen})
    fewer = some_faces(*open_faces(path), 9, seed=0)
    assert np.array_equal(fewer, chosen[:9])


@pytest.mark.parametrize(
    ("make", "message"), [("empty", "no image in it"), ("text", "line 1: must be two"), ("gone", "no such")]
)
def test_what_holds_no_faces_is_refused(tmp_path, make, message):
    path = tmp_path / make
    if make == "empty":
        path.mkdir()
    elif make == "text":
        path.write_text("nothing of the kind\n")
    with pytest.raises(DataError, match=message):
        open_faces(path)
