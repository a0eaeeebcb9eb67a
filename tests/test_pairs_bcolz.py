"""Verification sets as bcolz arrays: what is written, what is read, what is refused."""

import json
import shutil
from pathlib import Path

import bcolz
import cv2
import numpy as np
import pytest

from util.errors import DataError
from util.pairs import load_pairs
from util.pairs.bcolz import write_carray


@pytest.fixture
def small(tmp_path) -> Path:
    """A set of two pairs, to be spoilt."""
    path = tmp_path / "lfw"
    write_carray(path, [np.full((112, 112, 3), 10 * index, np.uint8) for index in range(4)], [True, False])
    return path


def test_what_is_written_is_read_again_exactly(made_pairs):
    path, images, issame = made_pairs
    pairs = load_pairs(path)
    assert (pairs.name, len(pairs), pairs.issame.dtype) == ("made", 23, bool)
    np.testing.assert_array_equal(pairs.issame, issame)
    read = pairs.images(0, 46)
    assert read.dtype == np.uint8 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, images)
    assert set(np.unique(images)) == set(range(256))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (7, 14), (42, 46), (45, 46)])
def test_any_slice_can_be_read(made_pairs, start, stop):
    path, images, _ = made_pairs
    np.testing.assert_array_equal(load_pairs(path).images(start, stop), images[start:stop])


def test_the_disk_holds_float32_bgr_in_minus_one_to_one(made_pairs):
    path, images, issame = made_pairs
    carray = bcolz.carray(rootdir=str(path), mode="r")
    assert carray.shape == (46, 3, 112, 112) and carray.dtype == np.float32
    for index in (0, 45):
        for channel, color in enumerate((2, 1, 0)):
            np.testing.assert_allclose(carray[index][channel], images[index, :, :, color] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(np.load(path.with_name("made_list.npy")), issame)


def test_a_set_written_by_another_project_is_read(shared):
    pairs = load_pairs(shared / "formats" / "bcolz" / "lfw")
    rows = [line.split() for line in (shared / "formats" / "bin" / "pairs.txt").read_text().splitlines()[:20]]
    assert len(pairs) == 20
    assert pairs.issame.tolist() == [bool(int(row[2])) for row in rows]
    names = [name for row in rows for name in row[:2]]
    for index in (0, 1, 17, 39):
        file = shared / "lfw" / "aligned_112" / f"{names[index]}.jpg"
        expected = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)
        difference = np.abs(pairs.images(index, index + 1)[0].astype(int) - expected)
        assert difference.mean() < 1  # as decoders differ; channels the wrong way round differ by tens


def test_a_set_that_is_not_there_or_is_no_carray_is_an_error(tmp_path):
    with pytest.raises(DataError, match="lfw: no such verification set"):
        load_pairs(tmp_path / "lfw")
    (tmp_path / "lfw").mkdir()
    with pytest.raises(DataError, match="lfw: not a bcolz carray"):
        load_pairs(tmp_path / "lfw")


def test_a_missing_list_is_named(small):
    (small.parent / "lfw_list.npy").unlink()
    with pytest.raises(DataError, match=r"lfw_list\.npy: missing"):
        load_pairs(small)


@pytest.mark.parametrize(
    ("truth", "rule"),
    [
        (np.array([True, False, True]), r"lfw: shape \(4, 3, 112, 112\) does not fit its list of 3 pairs"),
        (np.array([True]), r"lfw: shape .* does not fit its list of 1 pairs"),
        (np.array([], bool), r"lfw_list\.npy: must hold one True or False a pair"),
        (np.array([[True, False]]), r"lfw_list\.npy: must hold one True or False a pair"),
        (np.array([0, 2]), r"lfw_list\.npy: must hold one True or False a pair"),
        (np.array([True, None]), r"lfw_list\.npy: not a numpy array of booleans"),  # a pickle, which could run code
    ],
)
def test_a_list_that_does_not_fit_is_an_error(small, truth, rule):
    np.save(small.parent / "lfw_list.npy", truth, allow_pickle=True)
    with pytest.raises(DataError, match=rule):
        load_pairs(small)


def test_a_list_cut_short_is_an_error(small):
    file = small.parent / "lfw_list.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"lfw_list\.npy: not a numpy array"):
        load_pairs(small)


def test_lists_of_zeros_and_ones_are_read(small):
    np.save(small.parent / "lfw_list.npy", np.array([0, 1]))
    assert load_pairs(small).issame.tolist() == [False, True]


@pytest.mark.parametrize("dtype", ["float64", "object", "uint8"])
def test_another_type_is_refused(small, dtype):
    meta = small / "meta" / "storage"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"dtype": dtype}))
    with pytest.raises(DataError, match=f"lfw: holds '{dtype}'"):
        load_pairs(small)


def test_another_image_size_is_refused(small):
    shutil.rmtree(small)
    bcolz.carray(np.zeros((4, 3, 96, 96), np.float32), rootdir=str(small), mode="w").flush()
    with pytest.raises(DataError, match=r"shape \(4, 3, 96, 96\) does not fit.*\(4, 3, 112, 112\)"):
        load_pairs(small)


@pytest.mark.parametrize("file", ["storage", "sizes"])
@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_meta_files_are_an_error(small, file, content):
    (small / "meta" / file).write_text(content)
    with pytest.raises(DataError, match="lfw: meta/ is damaged"):
        load_pairs(small)


@pytest.mark.parametrize("length", [0, 10, 31, -1])
def test_a_chunk_cut_short_is_named(small, length):
    chunk = small / "data" / "__2.blp"
    chunk.write_bytes(chunk.read_bytes()[:length])
    with pytest.raises(DataError, match=r"__2\.blp: cut short"):
        load_pairs(small)


def test_a_missing_chunk_is_named(small):
    (small / "data" / "__3.blp").unlink()
    with pytest.raises(DataError, match=r"__3\.blp: missing"):
        load_pairs(small)


@pytest.mark.parametrize("wrong", [255.0, -2.0, np.nan])
@pytest.mark.parametrize("index", [0, 3])
def test_values_outside_the_range_are_refused(small, wrong, index):
    shutil.rmtree(small)
    values = np.zeros((4, 3, 112, 112), np.float32)
    values[index, 1, 5, 5] = wrong
    bcolz.carray(values, rootdir=str(small), mode="w").flush()
    with pytest.raises(DataError, match=rf"image {index} has values .*must lie in \[-1, 1\]"):
        load_pairs(small)


def test_several_images_a_chunk_are_read(small, made_pairs):
    path, images, issame = made_pairs
    values = bcolz.carray(rootdir=str(path), mode="r")[:]
    bcolz.carray(values, rootdir=str(small), mode="w", chunklen=10).flush()  # four chunks and a partial one
    np.save(small.parent / "lfw_list.npy", issame)
    assert len(list((small / "data").glob("__*.blp"))) == 5
    np.testing.assert_array_equal(load_pairs(small).images(8, 46), images[8:46])
    (small / "data" / "__4.blp").unlink()
    with pytest.raises(DataError, match=r"__4\.blp: missing"):
        load_pairs(small)


def running_out(count: int, error: Exception | None = None):
    for _ in range(count):
        yield np.full((112, 112, 3), 99, np.uint8)
    if error:
        raise error


@pytest.mark.parametrize("count", [3, 5])
def test_a_wrong_number_of_images_leaves_nothing_behind(tmp_path, count):
    with pytest.raises(DataError, match=rf"new: {count} images for 2 pairs"):
        write_carray(tmp_path / "new", running_out(count), [True, False])
    assert list(tmp_path.iterdir()) == []


def test_an_image_of_another_size_is_named_and_leaves_nothing_behind(tmp_path):
    images = [np.zeros((112, 112, 3), np.uint8), np.zeros((112, 96, 3), np.uint8)]
    with pytest.raises(DataError, match=r"new: image 1 \(from 0\): 96x112 pixels"):
        write_carray(tmp_path / "new", images, [True])
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_made_leave_nothing_behind_and_the_earlier_set_whole(small):
    before = sorted(small.parent.iterdir())
    with pytest.raises(OSError, match="disk"):
        write_carray(small, running_out(2, OSError("disk")), [True, True])
    assert sorted(small.parent.iterdir()) == before
    pairs = load_pairs(small)
    assert pairs.issame.tolist() == [True, False]
    assert pairs.images(1, 2)[0, 0, 0].tolist() == [10, 10, 10]


def test_a_set_is_replaced_by_a_new_one(small):
    write_carray(small, running_out(6), [True, False, True])
    pairs = load_pairs(small)
    assert len(pairs) == 3
    assert (pairs.images(0, 6) == 99).all()
