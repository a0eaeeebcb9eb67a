"""RecordIO, MXNet's format for many images in one file: train.rec, and train.idx with the place of each record.

A record of train.rec is: uint32 magic number, uint32 (kind << 29 | length), payload, padding to 4 bytes. All numbers
are little-endian. Where the payload has the magic number on a multiple of 4 bytes, the writer removes it there and
splits the record into fragments. Their kinds are 1 (first), 2 (middle) and 3 (last); a complete record has kind 0
(dmlc-core's recordio.h). The payload is: uint32 flag, float32 label, uint64 id, uint64 id2; if flag > 0, `flag` float32
labels that replace `label`; then the content, which is an image file (MXNet's recordio.py).

train.idx is text with one line for each record: its number, a tab, and the byte where it begins.
"""

import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import DataError
from util.face import FACE_SIZE
from util.files import atomic_write_all, read_bytes

EXACT = 2**24  # float32 labels hold all integers up to here exactly, and only some of the larger ones
_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_COMPLETE, _FIRST, _MIDDLE, _LAST = range(4)  # kinds of fragments
_LENGTH_BITS = 29
_FRAME = struct.Struct("<II")  # magic, kind and length
_HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2
_START = struct.Struct("<IIIfQQff")  # frame, header, and the first two labels of a list
_READ_AHEAD = 1 << 14  # bytes: an aligned face and its header in one read
_FIX = "Copy the set again, or rebuild it."


@dataclass(frozen=True)
class Record:
    """One record: (L,) float32 labels, L >= 1, and the bytes of an image file, or no bytes."""

    labels: np.ndarray
    content: bytes


class RecordFile:
    """Reads the records of a .rec file in any order.

    A position counts in the ascending order of the records' numbers. Records are read with pread from a descriptor that
    each process opens when it needs it. pread moves no file position that forked processes would share, and pickling,
    for spawned processes, leaves the descriptor out. A file that shrinks meanwhile ends in an error, where a memory map
    would kill the process.
    """

    def __init__(self, path: Path):
        """Open PATH and its .idx. Raise DataError for damage that shows without reading the complete file."""
        self.path = path
        self._descriptor: int | None = None
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}). {_FIX}") from None
        if self.size == 0:
            raise DataError(f"{path}: empty. {_FIX}")
        self.keys, self.offsets = _read_index(path.with_suffix(".idx"), path, self.size)  # (N,) int64 each
        self.read(int(self.offsets.argmax()))  # a truncated file lacks its last record

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> Record:
        """Return the record at `position`. Raise DataError if it is damaged."""
        payload = self._read_payload(position)
        if len(payload) < _HEADER.size:
            raise self.error(position, f"{len(payload)} bytes are too few for its header. {_FIX}")
        flag, label, _, _ = _HEADER.unpack_from(payload)
        start = _HEADER.size + 4 * flag
        if start > len(payload):
            raise self.error(position, f"claims {flag} labels, and is too short for them. {_FIX}")
        labels = np.frombuffer(payload, "<f4", flag, _HEADER.size) if flag else np.array([label], np.float32)
        return Record(labels, payload[start:])

    def labels(self, position: int) -> Sequence[float]:
        """Return the labels of a record without reading its content. Raise DataError if it is damaged."""
        start = self._pread(_START.size, int(self.offsets[position]))
        if len(start) == _START.size:
            magic, length, flag, label, _, _, first, second = _START.unpack(start)
            # The kind is in the bits above the length, so a record in fragments looks far too long.
            if magic == _MAGIC and flag <= 2 and _HEADER.size + 4 * flag <= length < 1 << _LENGTH_BITS:
                return (first, second)[:flag] if flag else (label,)
        return self.read(position).labels.tolist()

    def where(self, position: int) -> str:
        """Return the file and the number of a record, for messages."""
        return f"{self.path}: record {self.keys[position]}"

    def error(self, position: int, text: str) -> DataError:
        """Build the error about a record."""
        return DataError(f"{self.where(position)}: {text}")

    def _read_payload(self, position: int) -> bytes:
        """Join the fragments of a record, with the magic number between them, to its payload."""
        fragments: list[bytes] = []
        begin = int(self.offsets[position])
        offset = begin
        while offset - begin < 1 << _LENGTH_BITS:
            kind, content = self._read_fragment(position, offset)
            if kind not in ((_MIDDLE, _LAST) if fragments else (_COMPLETE, _FIRST)):
                raise self.error(position, f"has a fragment of kind {kind} in the wrong place. {_FIX}")
            fragments.append(content)
            if kind in (_COMPLETE, _LAST):
                return _MAGIC_BYTES.join(fragments)
            offset += _FRAME.size + len(content) + -len(content) % 4
        raise self.error(position, f"longer than the {1 << _LENGTH_BITS} bytes that the format allows. {_FIX}")

    def _read_fragment(self, position: int, offset: int) -> tuple[int, bytes]:
        """Return the kind and the content of the fragment that begins at byte `offset`."""
        start = self._pread(_READ_AHEAD, offset)
        if len(start) < _FRAME.size:
            raise self.error(position, f"truncated: the file ends at byte {offset + len(start)}. {_FIX}")
        magic, kind_and_length = _FRAME.unpack_from(start)
        if magic != _MAGIC:
            index = self.path.with_suffix(".idx").name
            text = f"no record begins at byte {offset} (magic number {magic:#010x}, not {_MAGIC:#010x}). The file is "
            raise self.error(position, f"{text}damaged, or {index} belongs to another one. {_FIX}")
        kind = kind_and_length >> _LENGTH_BITS
        length = kind_and_length & ((1 << _LENGTH_BITS) - 1)
        content = start[_FRAME.size : _FRAME.size + length]
        # A length beyond the end of the file is damage, and must not cost memory.
        if len(content) < length <= self.size - offset - _FRAME.size:
            content += self._pread(length - len(content), offset + len(start))
        if len(content) < length:
            text = f"it has {length} bytes from byte {offset} on, and the file {self.size}"
            raise self.error(position, f"truncated: {text}. {_FIX}")
        return kind, content

    def _pread(self, length: int, offset: int) -> bytes:
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}). {_FIX}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)  # None too if opening failed
        if descriptor is not None:
            os.close(descriptor)


def _read_index(path: Path, records: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers and the offsets of all records, (N,) int64 each, ordered by their numbers.

    The lines may come in any order, because MXNet's im2rec shuffles them. Every number and offset must be unique.
    """
    if not path.exists():
        fix = "Copy it too, or make it with MXNet's rec2idx.py."
        raise DataError(f"{path}: missing; {records.name} cannot be read without its index. {fix}")
    text = read_bytes(path, _FIX).rstrip()
    lines = text.count(b"\n") + 1
    if not text or text.translate(None, b"0123456789\t\r\n") or text.count(b"\t") != lines:
        raise DataError(f"{path}: each line must have a record's number, a tab and the byte where it begins. {_FIX}")
    numbers = np.fromstring(text, np.int64, sep=" ")  # a space matches any white space
    if len(numbers) != 2 * lines:
        raise DataError(f"{path}: {len(numbers)} numbers in {lines} lines, and a line must have two. {_FIX}")
    keys, offsets = (np.ascontiguousarray(column) for column in numbers.reshape(-1, 2).T)
    if (np.diff(keys) <= 0).any():
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
    for values, what in ((keys, "number"), (np.sort(offsets), "place")):
        repeated = np.flatnonzero(np.diff(values) == 0)
        if len(repeated):
            raise DataError(f"{path}: two records have the {what} {values[repeated[0]]}. {_FIX}")
    outside = np.flatnonzero((offsets > size - _FRAME.size) | (offsets % 4 != 0))
    if len(outside):
        found = f"record {keys[outside[0]]} begins at byte {offsets[outside[0]]}, which no record of {records.name}"
        reason = "One of the two is truncated or belongs to another set."
        raise DataError(f"{path}: {found} ({size} bytes) can. {reason} {_FIX}")
    return keys, offsets


def write_identities(path: Path, identities: Iterable[Iterable[bytes]], size: int = FACE_SIZE) -> None:
    """Write a training set in InsightFace's layout: PATH (.rec), its .idx, and `property` in the same folder.

    Args:
        path: the .rec file.
        identities: for each identity the encoded images (JPEG or PNG files of size x size pixels). They are taken one
            by one, so they need not fit into memory.
        size: pixels a side, for `property`.

    Raises:
        DataError: an identity has no image, or there are more records than labels can count. Nothing is written then.
    """
    files = [path, path.with_suffix(".idx"), path.with_name("property")]
    with atomic_write_all(files) as (records, index, properties):
        offsets = array("q")
        with records.open("wb") as file:

            def add(labels: Sequence[float], content: bytes = b"") -> None:
                number = len(offsets)
                offsets.append(file.tell())
                file.write(_frame(_pack(number, labels, content)))

            add((0, 0))  # the header record, whose numbers are known at the end
            ranges = []
            for label, images in enumerate(identities):
                begin = len(offsets)
                for image in images:
                    add((label,), image)
                ranges.append((begin, len(offsets)))
                if begin == len(offsets):
                    raise DataError(f"{path}: identity {label} has no image. Leave out identities without images.")
            first_identity = len(offsets)
            for image_range in ranges:
                add(image_range)
            if len(offsets) > EXACT:
                raise DataError(f"{path}: {len(offsets)} records, and labels count to {EXACT}. Make two sets.")
            file.seek(0)
            file.write(_frame(_pack(0, (first_identity, len(offsets)))))
        index.write_text("".join(f"{number}\t{offset}\n" for number, offset in enumerate(offsets)))
        properties.write_text(f"{len(ranges)},{size},{size}")


def _pack(number: int, labels: Sequence[float], content: bytes = b"") -> bytes:
    """Return the payload of a record: one label is in the header itself, several labels follow it."""
    if len(labels) == 1:
        return _HEADER.pack(0, labels[0], number, 0) + content
    return _HEADER.pack(len(labels), 0, number, 0) + np.array(labels, "<f4").tobytes() + content


def _frame(payload: bytes) -> bytes:
    """Return the payload as it is stored, split into fragments where it has the magic number."""
    words = np.frombuffer(payload, "<u4", len(payload) // 4)
    cuts = (np.flatnonzero(words == _MAGIC) * 4).tolist()
    kinds = [_FIRST] + [_MIDDLE] * (len(cuts) - 1) + [_LAST] if cuts else [_COMPLETE]
    framed = []
    for kind, begin, end in zip(kinds, [0] + [cut + 4 for cut in cuts], cuts + [len(payload)], strict=True):
        framed += [_FRAME.pack(_MAGIC, kind << _LENGTH_BITS | end - begin), payload[begin:end]]
    return b"".join(framed) + bytes(-len(payload) % 4)
