"""Verification sets in the bcolz format: writing, reading, damaged files, and bcolz itself as the oracle."""

import json
import os
import pickle
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from numcodecs import blosc

from util.errors import DataError
from util.pairs import load_pairs
from util.pairs.bcolz import write_carray


def write_values(path: Path, values: np.ndarray, chunklen: int) -> None:
    """Write any float32 values (N, ...) as a bcolz array, `chunklen` entries a chunk."""
    shutil.rmtree(path, ignore_errors=True)
    (path / "data").mkdir(parents=True)
    (path / "meta").mkdir()
    for chunk, start in enumerate(range(0, len(values), chunklen)):
        buffer = blosc.compress(np.ascontiguousarray(values[start : start + chunklen]), b"lz4", 5, 1)
        header = b"blpk\x01\0\0\0\x01\0\0\0\0\0\0\0"
        (path / "data" / f"__{chunk}.blp").write_bytes(header + buffer)
    (path / "meta" / "storage").write_text(json.dumps({"dtype": "float32", "chunklen": chunklen}))
    (path / "meta" / "sizes").write_text(json.dumps({"shape": list(values.shape)}))


def stored(images: np.ndarray) -> np.ndarray:
    """Return RGB uint8 images as a set stores them: float32 BGR NCHW in [-1, 1]."""
    return (images[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5


@pytest.fixture
def small(tmp_path) -> Path:
    """Write a set of two pairs, for tests that damage it."""
    path = tmp_path / "lfw"
    write_carray(path, [np.full((112, 112, 3), 10 * index, np.uint8) for index in range(4)], [True, False])
    return path


def test_what_is_written_is_read_back_exactly(made_pairs):
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


def test_bcolz_reads_what_is_written(made_pairs):
    bcolz = pytest.importorskip("bcolz")
    path, images, issame = made_pairs
    carray = bcolz.carray(rootdir=str(path), mode="r")
    assert carray.shape == (46, 3, 112, 112) and carray.dtype == np.float32
    np.testing.assert_array_equal(carray[:], stored(images))
    for index in (0, 45):
        for channel, color in enumerate((2, 1, 0)):
            np.testing.assert_allclose(carray[index][channel], images[index, :, :, color] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(np.load(path.with_name("made_list.npy")), issame)


def test_files_are_the_same_as_those_of_bcolz(made_pairs, tmp_path):
    bcolz = pytest.importorskip("bcolz")
    path, images, _ = made_pairs
    carray = bcolz.carray(
        np.empty((0, 3, 112, 112), np.float32),
        rootdir=str(tmp_path / "theirs"),
        mode="w",
        chunklen=1,
        cparams=bcolz.cparams(clevel=5, cname="lz4"),
    )
    for image in stored(images):
        carray.append(image[None])
    carray.flush()
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    theirs = sorted(file.relative_to(carray.rootdir) for file in Path(carray.rootdir).rglob("*") if file.is_file())
    assert files == theirs
    for file in files:
        assert (path / file).read_bytes() == (Path(carray.rootdir) / file).read_bytes(), file


@pytest.mark.parametrize("chunklen", [None, 1, 10, 46, 100])
@pytest.mark.parametrize("cname", ["lz4", "blosclz", "zlib"])
def test_sets_that_bcolz_writes_are_read(made_pairs, tmp_path, chunklen, cname):
    bcolz = pytest.importorskip("bcolz")
    _, images, issame = made_pairs
    cparams = bcolz.cparams(cname=cname)
    bcolz.carray(stored(images), rootdir=str(tmp_path / "set"), mode="w", chunklen=chunklen, cparams=cparams).flush()
    np.save(tmp_path / "set_list.npy", issame)
    pairs = load_pairs(tmp_path / "set")
    np.testing.assert_array_equal(pairs.images(0, 46), images)
    np.testing.assert_array_equal(pairs.images(9, 31), images[9:31])


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


def test_a_path_without_a_set_is_an_error(tmp_path):
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
    write_values(small, np.zeros((4, 3, 96, 96), np.float32), chunklen=1)
    with pytest.raises(DataError, match=r"shape \(4, 3, 96, 96\) does not fit.*\(4, 3, 112, 112\)"):
        load_pairs(small)


@pytest.mark.parametrize("file", ["storage", "sizes"])
@pytest.mark.parametrize("content", ["{", "{}", "[]", "[" * 100_000, "\udcff", "\0"])
def test_damaged_meta_files_are_an_error(small, file, content):
    (small / "meta" / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match="lfw: meta/ is damaged"):
        load_pairs(small)


@pytest.mark.parametrize("chunklen", [0, -1, 1.5, None, "1", True, [1]])
def test_chunklen_that_is_not_a_positive_integer_is_refused(small, chunklen):
    meta = small / "meta" / "storage"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"chunklen": chunklen}))
    with pytest.raises(DataError, match=r"lfw: meta/ is damaged \(chunklen is"):
        load_pairs(small)


@pytest.mark.parametrize("chunklen", [2, 3, 10**9, 10**30])
def test_chunklen_that_does_not_fit_the_chunks_is_refused(small, chunklen):
    meta = small / "meta" / "storage"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"chunklen": chunklen}))
    with pytest.raises(DataError, match=r"__0\.blp: holds 150528 bytes, which are not [234] images"):
        load_pairs(small)


@pytest.mark.parametrize("shape", [[10**30, 3, 112, 112], [4, 3, 112], "4", None, 7, {}, [-4, 3, 112, 112]])
def test_a_declared_shape_that_does_not_fit_is_refused(small, shape):
    (small / "meta" / "sizes").write_text(json.dumps({"shape": shape}))
    with pytest.raises(DataError, match=r"lfw: shape .* does not fit its list of 2 pairs"):
        load_pairs(small)


NAN = float("nan")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("storage", "dtype", NAN),
        ("storage", "dtype", ["x" * 100_000]),
        ("storage", "chunklen", NAN),
        ("storage", "chunklen", "9" * 100_000),
        ("storage", "chunklen", {"a": [1] * 100_000}),
        ("sizes", "shape", NAN),
        ("sizes", "shape", [NAN, 3, 112, 112]),
        ("sizes", "shape", [4] * 100_000),
        ("sizes", "shape", {"4": 3}),
    ],
)
def test_crafted_meta_files_are_refused_in_one_short_line(small, file, key, value):
    meta = small / "meta" / file
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {key: value}))
    with pytest.raises(DataError, match=r"^[^\n]*lfw: [^\n]*$") as caught:
        load_pairs(small)
    assert len(str(caught.value)) < 600


def test_meta_files_with_numbers_of_many_digits_are_refused(small):
    (small / "meta" / "sizes").write_text(f'{{"shape": [{"9" * 5000}, 3, 112, 112]}}')
    with pytest.raises(DataError, match="lfw: meta/ is damaged"):
        load_pairs(small)


@pytest.mark.parametrize("declared", ["(1000000000000,)", "(99999999999999999999,)", "(-1,)"])
def test_a_huge_declared_list_is_an_error(small, declared):
    header = f"{{'descr': '|b1', 'fortran_order': False, 'shape': {declared}}}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    (small.parent / "lfw_list.npy").write_bytes(content + b"\1\0")
    with pytest.raises(DataError, match=r"lfw_list\.npy: "):
        load_pairs(small)


@pytest.mark.parametrize("dtype", [[("a", "u1")], "U1", "S1", "M8[s]", "c8"])
def test_a_list_of_something_else_is_an_error(small, dtype):
    np.save(small.parent / "lfw_list.npy", np.zeros(2, dtype))
    with pytest.raises(DataError, match=r"lfw_list\.npy: must hold one True or False a pair"):
        load_pairs(small)


def test_lists_of_other_formats_are_refused(small):
    file = small.parent / "lfw_list.npy"
    with file.open("wb") as opened:
        np.savez(opened, np.array([True, False]))
    with pytest.raises(DataError, match=r"lfw_list\.npy: not a numpy array of booleans"):
        load_pairs(small)
    file.write_bytes(pickle.dumps([True, False]))
    with pytest.raises(DataError, match=r"lfw_list\.npy: not a numpy array of booleans"):
        load_pairs(small)


@pytest.mark.parametrize(
    "header",
    [
        "(" * 9000,
        "-" * 9000,
        "{'descr': " + "[" * 900 + "'|b1'" + "]" * 900 + ", 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000000,)}",
        "{'descr': '|b1', 'fortran_order': False, 'shape': (True, 2)}",
        "{'descr': '|b1', 'fortran_order': False, 'shape': 2}",
        "{'descr': '|b1', 'fortran_order': None, 'shape': (2.0,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': ('|b1', (1000000000000,)), 'fortran_order': False, 'shape': (2,)}",
        "1 + 1",
    ],
)
def test_crafted_headers_of_lists_are_refused(small, time_limit, header):
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n"
    (small.parent / "lfw_list.npy").write_bytes(content + b"\1\0")
    with time_limit(10), pytest.raises(DataError, match=r"lfw_list\.npy: ") as caught:
        load_pairs(small)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5, -1])
def test_lists_of_other_numbers_are_refused(small, value):
    np.save(small.parent / "lfw_list.npy", np.array([1, value]))
    with pytest.raises(DataError, match=r"lfw_list\.npy: must hold one True or False a pair"):
        load_pairs(small)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize(
    ("position", "replacement"),
    [
        (16, b"\x09"),  # version of the format
        (18, b"\xff"),  # flags: an unknown codec
        (19, b"\0"),  # bytes of a number
        (24, b"\0\0\0\0"),  # bytes of a block
        (24, b"\xff\xff\xff\xff"),
        (32, b"\xff\xff\xff\xff"),  # place of the first block
    ],
)
def test_a_first_or_last_chunk_that_is_damaged_is_named(small, chunk, position, replacement):
    file = small / "data" / f"__{chunk}.blp"
    noise = np.random.default_rng(chunk).uniform(-1, 1, (3, 112, 112)).astype(np.float32)
    content = bytearray(file.read_bytes()[:16] + blosc.compress(noise, b"lz4", 5, 1))
    file.write_bytes(content)
    load_pairs(small)
    content[position : position + len(replacement)] = replacement
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"__{chunk}\.blp: cannot be decompressed"):
        load_pairs(small)


@pytest.mark.parametrize("nbytes", [0, 150527, 2**31 - 1, 2**32 - 1])
def test_a_chunk_that_declares_another_size_is_refused(small, nbytes):
    chunk = small / "data" / "__2.blp"
    content = bytearray(chunk.read_bytes())
    content[20:24] = struct.pack("<I", nbytes)
    chunk.write_bytes(content)
    with pytest.raises(DataError, match=rf"__2\.blp: holds {nbytes} bytes, which are not 1 images"):
        load_pairs(small)


def test_a_chunk_that_changes_after_opening_is_an_error(small):
    pairs = load_pairs(small)
    chunk = small / "data" / "__2.blp"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"__2\.blp: cut short"):
        pairs.images(0, 4)
    chunk.unlink()
    with pytest.raises(DataError, match=r"__2\.blp: missing"):
        pairs.images(2, 3)
    chunk.write_bytes(content)
    assert pairs.images(0, 4)[2, 0, 0].tolist() == [20, 20, 20]


def test_damaged_chunks_are_read_or_refused(made_pairs, tmp_path):
    """A damaged byte gives wrong pixels or a DataError, and never ends the process."""
    shutil.copytree(made_pairs[0], tmp_path / "set")
    shutil.copy(made_pairs[0].with_name("made_list.npy"), tmp_path / "set_list.npy")
    pairs = load_pairs(tmp_path / "set")
    chunk = tmp_path / "set" / "data" / "__5.blp"
    content = chunk.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.integers(16, rng.choice([40, 1000, len(content)]), 3):
            damaged[position] = rng.integers(256)
        chunk.write_bytes(damaged)
        pairs._read_chunk.cache_clear()
        try:
            assert pairs.images(5, 6).shape == (1, 112, 112, 3)
        except DataError as error:
            refused += 1
            assert "__5.blp" in str(error) and "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize("chunklen", [1, 5])
def test_threads_may_read_at_the_same_time(made_pairs, tmp_path, chunklen):
    _, images, issame = made_pairs
    write_values(tmp_path / "set", stored(images), chunklen)
    np.save(tmp_path / "set_list.npy", issame)
    pairs = load_pairs(tmp_path / "set")
    starts = np.random.default_rng(1).integers(0, 40, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for start, read in zip(starts, pool.map(lambda start: pairs.images(start, start + 6), starts), strict=True):
            np.testing.assert_array_equal(read, images[start : start + 6])


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
    values = np.zeros((4, 3, 112, 112), np.float32)
    values[index, 1, 5, 5] = wrong
    write_values(small, values, chunklen=3)
    with pytest.raises(DataError, match=rf"image {index} has values .*must lie in \[-1, 1\]"):
        load_pairs(small)


def test_several_images_a_chunk_are_read(small, made_pairs):
    _, images, issame = made_pairs
    write_values(small, stored(images), chunklen=10)  # four chunks and a partial one
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


def test_an_image_of_another_size_leaves_nothing_behind(tmp_path):
    images = [np.zeros((112, 112, 3), np.uint8), np.zeros((112, 96, 3), np.uint8)]
    with pytest.raises(DataError, match=r"new: image 1 \(from 0\): 96x112 pixels"):
        write_carray(tmp_path / "new", images, [True])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_earlier_set(small):
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


def test_a_link_is_replaced_and_its_target_stays(small, tmp_path):
    link = tmp_path / "links" / "link"
    link.parent.mkdir()
    link.symlink_to(small)
    link.with_name("link_list.npy").symlink_to(small.parent / "lfw_list.npy")
    for _ in range(2):
        write_carray(link, running_out(2), [False])
        assert load_pairs(link).issame.tolist() == [False]
        assert not link.is_symlink() and len(list(link.parent.iterdir())) == 2
    assert load_pairs(small).issame.tolist() == [True, False]
    assert load_pairs(small).images(1, 2)[0, 0, 0].tolist() == [10, 10, 10]


def test_a_set_is_on_the_disk_before_it_gets_its_names(small, monkeypatch):
    synced = []

    def sync() -> None:
        synced.append({str(file.relative_to(small.parent)) for file in small.parent.rglob("*")})

    monkeypatch.setattr(os, "sync", sync)
    write_carray(small, running_out(2), [False])
    before, between = synced
    assert {"lfw.partial/list.npy", "lfw.partial/meta/sizes", "lfw.partial/data/__1.blp", "lfw_list.npy"} < before
    assert "lfw.partial_list.npy" not in before and "lfw/data" in before
    assert {"lfw.partial/list.npy", "lfw.partial/data/__1.blp", "lfw.partial_list.npy"} < between
    assert "lfw" not in between


OLD_TRUTH = (True,)
NEW_TRUTH = (False,)


def write_and_kill(path: Path, event_number: int) -> bool:
    """Replace a set in a child that ends before its Nth change of the disk. Return whether it came to that."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    count = 0

    def end(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        is_write = event == "open" and int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR)
        if is_write or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == event_number:
                os._exit(9)

    sys.addaudithook(end)
    try:
        write_carray(path, running_out(2), NEW_TRUTH)
    finally:
        os._exit(0)


def truth_of(path: Path) -> tuple[bool, ...] | None:
    """Return the truth of a set after a check that list and images belong together; None if the set cannot be read."""
    try:
        pairs = load_pairs(path)
    except DataError:
        return None
    truth = tuple(pairs.issame.tolist())
    levels = pairs.images(0, 2)[:, 0, 0, 0].tolist()
    assert (truth, levels) in [(OLD_TRUTH, [0, 10]), (NEW_TRUTH, [99, 99])]
    return truth


@pytest.mark.parametrize("continued", [True, False])
def test_a_kill_leaves_the_old_or_the_new_set(tmp_path, monkeypatch, continued):
    monkeypatch.setattr(os, "sync", lambda: None)  # a kill loses nothing that was written

    def disk_full():
        yield from running_out(1, OSError("disk"))

    found = set()
    for event_number in range(1, 1000):
        folder = tmp_path / str(event_number)
        folder.mkdir()
        path = folder / "lfw"
        write_carray(path, [np.full((112, 112, 3), level, np.uint8) for level in (0, 10)], OLD_TRUTH)
        was_killed = write_and_kill(path, event_number)
        truths = truth_of(path), truth_of(folder / "lfw.partial")
        assert truths != (None, None), event_number
        found.add(truths)
        if continued:
            write_carray(path, running_out(2), [True])
            assert load_pairs(path).issame.tolist() == [True]
        else:
            with pytest.raises(OSError, match="disk"):
                write_carray(path, disk_full(), [True])
            assert truth_of(path) == (truths[1] or truths[0])
        assert sorted(file.name for file in folder.iterdir()) == ["lfw", "lfw_list.npy"]
        if not was_killed:
            break
    # Before, during and after the replacement.
    assert found == {(OLD_TRUTH, None), (OLD_TRUTH, NEW_TRUTH), (None, NEW_TRUTH), (NEW_TRUTH, None)}
