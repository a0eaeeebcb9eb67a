"""RecordIO training sets. Most tests build their records here, from the description of the format only."""

import multiprocessing
import pickle
import re
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from util.data import record_dataset
from util.data.loader import Augmentation, TrainLoader
from util.data.record_dataset import RecordImages
from util.data.recordio import Record, RecordFile, write_identities
from util.errors import DataError

MAGIC = b"\x0a\x23\xd7\xce"


def png(value: int, size: int = 112) -> bytes:
    """Return a plain gray image as the bytes of a PNG file."""
    return cv2.imencode(".png", np.full((size, size, 3), value, np.uint8))[1].tobytes()


def packed(labels: Sequence[float], content: bytes = b"", number: int = 0) -> bytes:
    """Return a payload: one label is in the header, two or more follow it."""
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], number, 0) + content
    return struct.pack(f"<IfQQ{len(labels)}f", len(labels), 0, number, 0, *labels) + content


def framed(payload: bytes, kind: int = 0) -> bytes:
    return MAGIC + struct.pack("<I", kind << 29 | len(payload)) + payload + bytes(-len(payload) % 4)


@pytest.fixture
def write_records(tmp_path: Path) -> Callable[..., Path]:
    """Return a function: write_records(payload, …) -> a .rec file with these records, and its .idx."""

    def write(*payloads: bytes, numbers: Sequence[int] | None = None) -> Path:
        path, offset, lines = tmp_path / "train.rec", 0, []
        with path.open("wb") as file:
            for number, payload in zip(numbers or range(len(payloads)), payloads, strict=True):
                lines.append(f"{number}\t{offset}\n")
                offset += file.write(framed(payload))
        path.with_suffix(".idx").write_text("".join(lines))
        return path

    return write


@pytest.fixture
def write_set(write_records: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function: write_set(ranges, labels) -> a set in InsightFace's layout; image i has gray level 10 i."""

    def write(
        ranges: Sequence[Sequence[float]], labels: Sequence[float], header: Sequence[float] | None = None
    ) -> Path:
        images = [packed((label,), png(10 * index % 256), index + 1) for index, label in enumerate(labels)]
        first = len(labels) + 1
        header = (first, first + len(ranges)) if header is None else header
        return write_records(packed(header), *images, *(packed(images_of_person) for images_of_person in ranges))

    return write


@pytest.fixture
def three_people(write_set) -> Path:
    """Write a set: records 1 and 2, 3 to 5, and 6 are images, 7 to 9 identity records."""
    return write_set([(1, 3), (3, 6), (6, 7)], [0, 0, 1, 1, 1, 2])


# --- A set that MXNet wrote.


@pytest.fixture
def mxnet_set(shared) -> Path:
    return shared / "formats" / "rec" / "train.rec"


def test_mxnet_set_has_the_labels_and_pixels_of_its_sources(mxnet_set, shared):
    images = RecordImages(mxnet_set)
    people = mxnet_set.with_name("README.txt").read_text().splitlines()[0].split(": ")[1].split(", ")
    files = [file for name in people for file in sorted((shared / "lfw/aligned_112" / name).iterdir())[:10]]
    assert len(images) == len(files) == 200
    assert images.labels.tolist() == np.repeat(range(20), 10).tolist()
    assert images.classes[:2] + images.classes[-1:] == ["0000000", "0000001", "0000019"]
    for index, file in enumerate(files):
        original = cv2.imread(str(file))[:, :, ::-1].astype(int)
        difference = np.abs(images.image(index) - original)
        assert difference.mean() < 1 and difference.max() < 12, file  # the loss of re-encoding at quality 95


def test_writer_equals_mxnet_byte_for_byte(mxnet_set, tmp_path):
    images = RecordImages(mxnet_set)
    write_identities(tmp_path / "train.rec", ([images.encoded(10 * p + i) for i in range(10)] for p in range(20)))
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / name).read_bytes() == mxnet_set.with_name(name).read_bytes(), name


# --- Reading.


def test_record_images_reads_an_insightface_set(three_people):
    images = RecordImages(three_people)
    assert len(images) == 6
    assert images.labels.dtype == np.int64 and images.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert images.classes == ["0000000", "0000001", "0000002"]
    assert [int(images.image(index)[0, 0, 0]) for index in range(6)] == [0, 10, 20, 30, 40, 50]
    assert images.image(3).shape == (112, 112, 3) and images.image(3).dtype == np.uint8
    assert images.encoded(3) == png(30)
    assert images.where(3) == f"{three_people}: record 4"


def test_record_images_are_rgb(write_records):
    blue = np.zeros((112, 112, 3), np.uint8)
    blue[:, :, 0] = 255  # BGR
    path = write_records(*(packed((label,), cv2.imencode(".png", blue)[1].tobytes()) for label in (0, 1)))
    assert (RecordImages(path).image(1) == (0, 0, 255)).all()


def test_opening_reads_few_images_with_identity_records(write_set, monkeypatch):
    people = 500
    path = write_set([(1 + i, 2 + i) for i in range(people)], list(range(people)))
    read = []
    pread = RecordFile._pread

    def spy(file: RecordFile, length: int, offset: int) -> bytes:
        read.append(offset)
        return pread(file, length, offset)

    monkeypatch.setattr(RecordFile, "_pread", spy)
    images = RecordImages(path)
    offsets = images._file.offsets
    assert len(images) == people
    assert len(set(read) & set(offsets[1 : people + 1].tolist())) < 80  # a sample for comparison
    assert set(offsets[people + 1 :].tolist()) <= set(read)


def test_first_of_many_labels_is_the_class(write_records):
    images = [packed((label, 0.5), png(label), label + 1) for label in (0, 1)]
    assert RecordImages(write_records(packed((3, 5)), *images, packed((1, 2)), packed((2, 3)))).labels.tolist() == [
        0,
        1,
    ]
    assert RecordImages(write_records(*images)).labels.tolist() == [0, 1]
    assert RecordImages(write_records(*(packed((i, 7, 8, 9), png(i)) for i in (0, 1)))).labels.tolist() == [0, 1]


def test_im2rec_sets_have_labels_in_the_headers_in_any_order(write_records):
    """im2rec writes no header record, and shuffles the lines of the index."""
    path = write_records(*(packed((label,), png(label)) for label in (8, 3, 8, 5)), numbers=[30, 7, 12, 21])
    images = RecordImages(path)
    assert images.classes == ["0000003", "0000005", "0000008"]
    assert [images.where(index) for index in range(4)] == [f"{path}: record {number}" for number in (7, 12, 21, 30)]
    assert images.labels.tolist() == [0, 2, 1, 2]
    assert [int(images.image(index)[0, 0, 0]) for index in range(4)] == [3, 8, 5, 8]


def test_image_labels_win_over_disagreeing_identity_records(write_set):
    """In an early Glint360K a person may have two identity records, and later numbers are shifted."""
    images = RecordImages(write_set([(1, 3), (3, 4), (4, 6)], [0, 0, 0, 1, 1]))
    assert images.classes == ["0000000", "0000001"]
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.image(4).shape == (112, 112, 3)


def test_image_outside_all_ranges_has_its_own_label(write_set):
    assert RecordImages(write_set([(1, 2), (3, 4)], [0, 1, 1])).labels.tolist() == [0, 1, 1]


def test_identity_without_images_is_no_class(write_set):
    images = RecordImages(write_set([(1, 3), (3, 3), (3, 4)], [0, 0, 2]))
    assert images.classes == ["0000000", "0000002"]
    assert images.labels.tolist() == [0, 0, 1]
    assert images.image(2).shape == (112, 112, 3)


def test_rounded_numbers_are_replaced_by_the_image_labels(write_set, monkeypatch):
    """Float32 rounds beyond 2^24; a limit of 4 instead makes this set act like one of 17 million images."""
    monkeypatch.setattr(record_dataset, "EXACT", 4)
    labels = [0, 0, 0, 1, 1, 2, 2, 2]  # the true ranges are (1, 4), (4, 6), (6, 9)
    images = RecordImages(write_set([(1, 4), (4, 7), (7, 8)], labels))
    assert images.labels.tolist() == labels
    assert RecordImages(write_set([(1, 4), (4, 5), (5, 8)], labels)).labels.tolist() == labels


class RoundedFile:
    """Acts like a file with so many records that float32 rounds the number of the first identity record."""

    def __init__(self, first: int, count: int):
        self.first, self.count, self.keys = first, count, (0, count - 1)

    def __len__(self) -> int:
        return self.count

    def read(self, position: int) -> Record:
        return Record(np.zeros(2, np.float32), b"image" if 0 < position < self.first else b"")

    def error(self, position: int, text: str) -> DataError:
        return DataError(text)


@pytest.mark.parametrize("first", [2**24 - 1, 2**24, 2**24 + 1, 17_091_659, 42_474_558, 2**27 + 4, 2**27 + 5])
def test_first_identity_is_found_despite_rounding(first):
    count = first + 2_059_906
    header = Record(np.array([first, count], np.float32), b"")
    assert record_dataset._first_identity(RoundedFile(first, count), header) == first
    with pytest.raises(DataError, match="no identity record begins there"):
        record_dataset._first_identity(RoundedFile(first + 100, count), header)


def test_magic_number_in_an_image_is_read_and_written(tmp_path):
    contents = [
        MAGIC * 3 + b"tail",
        b"1234" + MAGIC,
        MAGIC,
        b"12" + MAGIC + b"34",
        b"1234" + MAGIC + b"5678" + MAGIC + b"9",
    ]
    write_identities(tmp_path / "a.rec", [[content] for content in contents])
    file = RecordFile(tmp_path / "a.rec")
    assert [file.read(1 + index).content for index in range(5)] == contents
    assert [file.labels(1 + index)[0] for index in range(5)] == list(range(5))
    # The fourth is not on a multiple of 4 bytes; the last is cut twice: 24 bytes of header and 1234, 5678, 9.
    last = (tmp_path / "a.rec").read_bytes()[int(file.offsets[5]) : int(file.offsets[6])]
    header = packed((4,), number=5)
    assert last == framed(header + b"1234", 1) + framed(b"5678", 2) + framed(b"9", 3)
    fourth = (tmp_path / "a.rec").read_bytes()[int(file.offsets[4]) : int(file.offsets[5])]
    assert fourth == framed(packed((3,), contents[3], 4))


@pytest.mark.parametrize(
    ("parts", "labels", "content"),
    [
        (framed(packed((7,)) + b"12345", 1) + framed(b"6", 3), [7], b"12345" + MAGIC + b"6"),  # padded in between
        (framed(packed((7,))[:12], 1) + framed(bytes(8) + b"image", 3), [7], b"image"),
        (framed(packed((1, 2))[:24], 1) + framed(struct.pack("<f", 5) + b"image", 3), [MAGIC, 5], b"image"),
    ],
)
def test_record_is_joined_from_its_fragments(write_records, parts, labels, content):
    path = write_records(packed((0,), b"x"), packed((0,), b"x"))
    path.write_bytes(framed(packed((0,), b"x")) + parts)
    file = RecordFile(path)
    expected = [struct.unpack("<f", label)[0] if label == MAGIC else label for label in labels]
    assert list(file.labels(1)) == file.read(1).labels.tolist() == expected
    assert file.read(1).content == content


# --- Writing.


def test_written_identities_are_read_back(tmp_path):
    people = [[png(1), png(2)], [png(3)], [png(4), png(5)]]
    write_identities(tmp_path / "mine.rec", people)
    images = RecordImages(tmp_path / "mine.rec")
    assert images.labels.tolist() == [0, 0, 1, 2, 2]
    assert [images.encoded(index) for index in range(5)] == [image for person in people for image in person]
    assert (tmp_path / "property").read_text() == "3,112,112"


def test_writer_leaves_the_old_set_after_an_error(tmp_path):
    path = tmp_path / "train.rec"
    write_identities(path, [[b"a"], [b"b"]])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"train\.rec: identity 1 has no image"):
        write_identities(path, [[b"c"], []])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert len(before) == 3


def test_writer_refuses_more_records_than_labels_can_count(tmp_path, monkeypatch):
    monkeypatch.setattr("util.data.recordio.EXACT", 6)
    with pytest.raises(DataError, match="7 records, and labels count to 6"):
        write_identities(tmp_path / "train.rec", [[b"a", b"b"], [b"c", b"d"]])
    assert not list(tmp_path.iterdir())


# --- Several processes.


def first_value(images: RecordImages, index: int) -> int:
    return int(images.image(index)[0, 0, 0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_open_file(three_people, method):
    images = RecordImages(three_people)
    assert first_value(images, 5) == 50
    with multiprocessing.get_context(method).Pool(2) as pool:
        values = pool.starmap(first_value, [(images, index) for index in (4, 0, 3, 2)], chunksize=1)
    assert values == [40, 0, 30, 20]
    assert first_value(images, 1) == 10


def test_pickled_copy_has_its_own_descriptor(three_people):
    images = RecordImages(three_people)
    copy = pickle.loads(pickle.dumps(images))
    del images
    assert first_value(copy, 2) == 20


def test_epoch_is_the_same_with_and_without_workers(three_people):
    images = RecordImages(three_people)
    alone, helped = (TrainLoader(images, 2, Augmentation(), seed=3, num_workers=workers) for workers in (0, 2))
    for (one, labels), (other, labels_again) in zip(alone.epoch(1), helped.epoch(1), strict=True):
        assert torch.equal(one, other) and torch.equal(labels, labels_again)
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_raises_one_line_for_a_broken_record(write_records, workers):
    images = RecordImages(write_records(packed((0,), b"no image"), packed((1,), b"nor this")))
    loader = TrainLoader(images, 2, Augmentation(), num_workers=workers)
    with pytest.raises(
        DataError, match=r"train\.rec: record [01]: not an image that can be decoded\. Rebuild"
    ) as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


# --- What is refused at opening.


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        RecordImages(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path.parent))


def test_open_refuses_a_missing_index(three_people):
    three_people.with_suffix(".idx").unlink()
    assert_refused(three_people, r"train\.idx: missing; train\.rec cannot be read without its index\. Copy it too, or")


def test_open_refuses_an_empty_file(three_people):
    three_people.write_bytes(b"")
    assert_refused(three_people, r"train\.rec: empty\. Copy the set again")


def test_open_refuses_a_missing_file(three_people):
    three_people.unlink()
    assert_refused(three_people, r"train\.rec: cannot be read \(No such file or directory\)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "each line must have a record's number"),
        ("\n\n", "each line must have a record's number"),
        ("0 0\n1 40\n", "each line must have a record's number"),
        ("0\t0\n1\tforty\n", "each line must have a record's number"),
        ("0\t0\n-1\t40\n", "each line must have a record's number"),
        ("0\t0\n1\t40.5\n", "each line must have a record's number"),
        ("0\t\n1\t40\n", "3 numbers in 2 lines"),
        ("0\t0\n1\t40\n1\t256\n", "two records have the number 1\\."),
        ("0\t0\n1\t40\n2\t40\n", "two records have the place 40\\."),
        ("0\t0\n1\t40\n2\t0\n", "two records have the place 0\\."),
        ("0\t0\n1\t99999996\n", r"record 1 begins at byte 99999996, which no record of train\.rec \(\d+ bytes\) can"),
        ("0\t0\n1\t99999999999999999999999\n", "record 1 begins at byte 9223372036854775807"),
        ("0\t0\n1\t41\n", "record 1 begins at byte 41"),
        ("0\t0\n1\t44\n", r"record 1: no record begins at byte 44 \(magic number 0x[0-9a-f]{8}, not 0xced7230a\)"),
    ],
)
def test_open_refuses_an_index_that_does_not_fit(three_people, text, message):
    three_people.with_suffix(".idx").write_text(text)
    assert_refused(three_people, message)


def test_open_refuses_a_binary_index(three_people):
    three_people.with_suffix(".idx").write_bytes(three_people.read_bytes())
    assert_refused(three_people, r"train\.idx: each line must have a record's number")


@pytest.mark.parametrize("lost", [1, 20, 35, 200])
def test_open_refuses_a_truncated_file(three_people, lost):
    three_people.write_bytes(three_people.read_bytes()[:-lost])
    assert_refused(
        three_people, "record 9: truncated|record [789] begins at byte .* truncated or belongs to another set"
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((7,), r"record 0: 1 labels, and the index has 10 records from 0 to 9\. The header record must have two"),
        ((7, 10, 1), "record 0: 3 labels"),
        ((7, 11), "record 0: labels 7 and 11\\. .*the first identity record and 10"),
        ((11, 10), "record 0: labels 11 and 10"),
        ((0, 10), "record 0: labels 0 and 10"),
        ((6.5, 10), "record 0: labels 6.5 and 10"),
        ((float("nan"), 10), "record 0: labels nan and 10"),
        ((7, float("nan")), "record 0: labels 7 and nan"),
        ((6, 10), "record 0: label 6, and no identity record begins there"),
        ((9, 10), "record 0: label 9, and no identity record begins there"),
        ((10, 10), "record 0: label 10, and no identity record begins there"),
    ],
)
def test_open_refuses_a_header_that_disagrees_with_the_index(write_set, header, message):
    assert_refused(write_set([(1, 3), (3, 6), (6, 7)], [0, 0, 1, 1, 1, 2], header=header), message)


def test_open_refuses_an_index_with_missing_records(three_people):
    index = three_people.with_suffix(".idx")
    index.write_text("".join(line for line in index.read_text().splitlines(True) if not line.startswith("3\t")))
    assert_refused(
        three_people, "record 0: labels 7 and 10|record 0: 2 labels, and the index has 9 records from 0 to 9"
    )


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(1, 4), (3, 6)], "record 7: has images that record 6 has too"),
        ([(3, 6), (1, 4)], "record 6: has images that record 7 has too"),
        (
            [(1, 3), (3, 7)],
            r"record 7: an identity record for images 3 to 7 \(not included\), and images are .* 1 to 5",
        ),
        ([(0, 3), (3, 6)], "record 6: an identity record for images 0 to 3"),
        ([(-4, 3), (3, 6)], "record 6: an identity record for images -4 to 3"),
        ([(3, 1), (3, 6)], "record 6: an identity record for images 3 to 1"),
        ([(1, 3.5), (3, 6)], "record 6: an identity record for images 1 to 3.5"),
        ([(1, float("nan")), (3, 6)], "record 6: an identity record for images 1 to nan"),
        ([(1, 3), (3, float("inf"))], "record 7: an identity record for images 3 to inf"),
        ([(1, 3), (3, 1e30)], "record 7: an identity record for images 3 to 1"),
        ([(1, 3), (3,)], "record 7: an identity record must have two labels, and has 1"),
    ],
)
def test_open_refuses_bad_identity_records(write_set, ranges, message):
    assert_refused(write_set(ranges, [0, 0, 1, 1, 1]), message)


@pytest.mark.parametrize("label", [-1, 0.5, float("nan"), float("inf"), 1e7])
def test_open_refuses_a_label_that_is_no_class_number(write_records, label):
    path = write_records(packed((0,), png(1)), packed((label,), png(2)), packed((1,), png(3)))
    assert_refused(
        path, rf"record 1: label {re.escape(f'{label:g}')}, and a label must be an integer from 0 to 9999999"
    )


def test_open_refuses_fewer_than_two_people(write_records, write_set):
    assert_refused(
        write_records(packed((4,), png(1)), packed((4,), png(2))), "images of 1 people, and training needs two"
    )
    assert_refused(write_set([(1, 3)], [0, 0]), "images of 1 people")
    assert_refused(write_set([], []), "images of 0 people")


# --- What is found when a record is read.


def spoiled(path: Path, number: int, change: Callable[[bytearray, int], object]) -> RecordImages:
    """Return the set, opened before change(file, offset of the record) is applied to it."""
    images = RecordImages(path)
    data = bytearray(path.read_bytes())
    change(data, int(images._file.offsets[number]))
    path.write_bytes(data)
    return images


def put(place: int, data: bytes) -> Callable[[bytearray, int], object]:
    return lambda file, offset: file.__setitem__(slice(offset + place, offset + place + len(data)), data)


def length(number: int, kind: int = 0) -> bytes:
    return struct.pack("<I", kind << 29 | number)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(0, b"\0\0\0\0"), "no record begins at byte"),
        (put(4, length((1 << 29) - 1)), r"truncated: it has 536870911 bytes from byte \d+ on, and the file \d+"),
        (put(4, length(0)), "0 bytes are too few for its header"),
        (put(4, length(23)), "23 bytes are too few for its header"),
        (put(4, length(24)), "holds no image"),
        (put(4, length(200)), "not an image that can be decoded|cannot be decoded"),
        (put(4, length(40, kind=1)), "no record begins at byte"),
        (put(4, length(40, kind=2)), "has a fragment of kind 2 in the wrong place"),
        (put(4, length(40, kind=7)), "has a fragment of kind 7 in the wrong place"),
        (put(8, struct.pack("<I", 0xFFFFFFFF)), "claims 4294967295 labels, and is too short for them"),
        (put(4, length(32) + struct.pack("<I", 3)), "claims 3 labels, and is too short for them"),
        (put(12, struct.pack("<f", 2)), "label 2, and by the rest of the set it is 1. Rebuild"),
        (put(12, struct.pack("<f", float("nan"))), "label nan, and by"),
        (put(32, bytes(60)), "not an image that can be decoded"),
        (put(32, b"\x93NUMPY\x01\x00"), "a numpy array and not an image file. Store JPEG or PNG"),
        (lambda file, offset: file.__delitem__(slice(offset + 100, None)), "truncated: "),
        (lambda file, offset: file.__delitem__(slice(offset, None)), "truncated: the file ends at byte"),
    ],
)
def test_damaged_record_is_named_in_one_line(three_people, change, message):
    images = spoiled(three_people, 4, change)
    with pytest.raises(DataError, match=rf"train\.rec: record 4: .*({message})") as caught:
        images.image(3)
    assert "\n" not in str(caught.value)
    assert first_value(images, 2) == 20


def test_image_that_is_not_square_is_named(write_records):
    wide = cv2.imencode(".jpg", np.zeros((112, 96, 3), np.uint8))[1].tobytes()
    images = RecordImages(write_records(packed((0,), wide), packed((1,), wide)))
    with pytest.raises(DataError, match=r"record 1: 96x112 is not square"):
        images.image(1)


def test_hostile_length_takes_no_memory(three_people):
    images = spoiled(three_people, 4, put(4, length((1 << 29) - 1)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            images.encoded(3)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_vanished_file_is_a_one_line_error(three_people):
    images = pickle.loads(pickle.dumps(RecordImages(three_people)))
    three_people.unlink()
    with pytest.raises(DataError, match=r"train\.rec: cannot be read \(No such file"):
        images.image(0)
