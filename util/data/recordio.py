"""RecordIO, MXNet's format for many images in one file: train.rec, and train.idx, which says where its records begin.

A record of train.rec is: uint32 magic number, uint32 (part << 29 | length), payload, padding to 4 bytes; little-endian,
as everything here. Where the magic number lies in the payload on a multiple of 4 bytes, the writer cuts it out and the
record in two there: such parts are numbered 1 (first), 2 (middle) and 3 (last), and a whole record 0 (dmlc-core's
recordio.h). The payload is: uint32 flag, float32 label, uint64 id, uint64 id2; if flag > 0, so many float32 labels that
take the place of `label`; then the content, which is an image file (MXNet's recordio.py).

train.idx is text: a line a record, its number, a tab, and the byte where it begins.
"""

import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from util.errors import DataError
from util.files import atomic_write

EXACT = 2**24  # float32 labels hold the numbers up to here exactly, and not all of those beyond
_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS = 29
_FRAME = struct.Struct("<II")  # magic, part and length
_HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2
_START = struct.Struct("<IIIfQQff")  # both, and the first two labels of a list
_READ_AHEAD = 1 << 14  # an aligned face and its header in one read
_REMEDY = "copy the set again, or make it anew"


@dataclass(frozen=True)
class Record:
    """What one record holds: (L,) float32 labels, L of 1 or more, and the bytes of an image file, or none."""

    labels: np.ndarray
    content: bytes


class RecordFile:
    """Reads the records of PATH in any order, by their position in the ascending order of their numbers.

    Records are read with pread from a descriptor that each process opens when it needs it: pread moves no file position
    that forked processes would share, pickling (for spawned ones) leaves the descriptor behind, and a file that shrinks
    meanwhile ends in an error, where a memory map would kill the process.

    What can be seen without reading the whole file is checked at opening. Raises DataError.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
        if self.size == 0:
            raise DataError(f"{path}: empty; {_REMEDY}")
        self.keys, self.offsets = _read_index(path.with_suffix(".idx"), path, self.size)  # (N,) int64 each
        self.read(int(self.offsets.argmax()))  # a file cut short lacks its last record

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> Record:
        """The whole record at `position`. Raises DataError if it is damaged."""
        payload = self._payload(position)
        if len(payload) < _HEADER.size:
            raise self.error(position, f"{len(payload)} bytes are too few for its header; {_REMEDY}")
        flag, label, _, _ = _HEADER.unpack_from(payload)
        start = _HEADER.size + 4 * flag
        if start > len(payload):
            raise self.error(position, f"says that it has {flag} labels, and is too short for them; {_REMEDY}")
        labels = np.frombuffer(payload, "<f4", flag, _HEADER.size) if flag else np.array([label], np.float32)
        return Record(labels, payload[start:])

    def labels(self, position: int) -> Sequence[float]:
        """The labels of a record without its content. Raises DataError if it is damaged."""
        start = self._pread(_START.size, int(self.offsets[position]))
        if len(start) == _START.size:
            magic, length, flag, label, _, _, first, second = _START.unpack(start)
            # The part is in the bits above the length, so a record in parts looks far too long.
            if magic == _MAGIC and flag <= 2 and _HEADER.size + 4 * flag <= length < 1 << _LENGTH_BITS:
                return ((label,), (first,), (first, second))[flag]
        return self.read(position).labels.tolist()

    def where(self, position: int) -> str:
        return f"{self.path}: record {self.keys[position]}"

    def error(self, position: int, text: str) -> DataError:
        return DataError(f"{self.where(position)}: {text}")

    def _payload(self, position: int) -> bytes:
        """The payload of a record, put together from its parts."""
        parts: list[bytes] = []
        begin = place = int(self.offsets[position])
        while place - begin < 1 << _LENGTH_BITS:
            part, content = self._part(position, place)
            if part not in ((_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)):
                raise self.error(position, f"has a part of kind {part} in the wrong place; {_REMEDY}")
            parts.append(content)
            if part in (_WHOLE, _LAST):
                return _MAGIC_BYTES.join(parts)
            place += _FRAME.size + len(content) + -len(content) % 4
        raise self.error(position, f"longer than the {1 << _LENGTH_BITS} bytes that the format allows; {_REMEDY}")

    def _part(self, position: int, place: int) -> tuple[int, bytes]:
        """The kind and the bytes of the part that begins at the byte `place`."""
        start = self._pread(_READ_AHEAD, place)
        if len(start) < _FRAME.size:
            raise self.error(position, f"cut short: the file ends at byte {place + len(start)}; {_REMEDY}")
        magic, length = _FRAME.unpack_from(start)
        if magic != _MAGIC:
            raise self.error(
                position,
                f"no record begins at byte {place} (magic number {magic:#010x}, not {_MAGIC:#010x}); the file is "
                f"damaged, or {self.path.with_suffix('.idx').name} belongs to another one: {_REMEDY}",
            )
        part, length = length >> _LENGTH_BITS, length & ((1 << _LENGTH_BITS) - 1)
        content = start[_FRAME.size : _FRAME.size + length]
        if len(content) < length <= self.size - place - _FRAME.size:
            content += self._pread(length - len(content), place + len(start))
        if len(content) < length:
            raise self.error(
                position, f"cut short: {length} bytes from byte {place} on, and the file has {self.size}; {_REMEDY}"
            )
        return part, content

    def _pread(self, length: int, offset: int) -> bytes:
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); {_REMEDY}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)


def _read_index(path: Path, records: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and offsets of all records, (N,) int64 each, in the ascending order of their numbers.

    MXNet's im2rec shuffles the lines, so they may come in any order, but every number and place once.
    """
    try:
        text = path.read_bytes().rstrip()
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; {records.name} cannot be read without its index: copy it too, or make it with MXNet's "
            f"rec2idx.py"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    lines = text.count(b"\n") + 1
    if not text or text.translate(None, b"0123456789\t\r\n") or text.count(b"\t") != lines:
        raise DataError(f"{path}: must have a line a record, its number, a tab and the byte where it begins; {_REMEDY}")
    numbers = np.fromstring(text, np.int64, sep=" ")  # a space stands for any white space
    if len(numbers) != 2 * lines:
        raise DataError(f"{path}: {len(numbers)} numbers in {lines} lines, and a line must have two; {_REMEDY}")
    keys, offsets = (np.ascontiguousarray(column) for column in numbers.reshape(-1, 2).T)
    if (np.diff(keys) <= 0).any():
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
    for values, what in ((keys, "number"), (np.sort(offsets), "place")):
        repeated = np.flatnonzero(np.diff(values) == 0)
        if len(repeated):
            raise DataError(f"{path}: two records have the {what} {values[repeated[0]]}; {_REMEDY}")
    outside = np.flatnonzero((offsets > size - _FRAME.size) | (offsets % 4 != 0))
    if len(outside):
        raise DataError(
            f"{path}: record {keys[outside[0]]} begins at byte {offsets[outside[0]]}, which no record of "
            f"{records.name} ({size} bytes) can; one of the two is cut short or belongs to another set: {_REMEDY}"
        )
    return keys, offsets


def write_identities(path: Path, people: Iterable[Iterable[bytes]], size: int = 112) -> None:
    """Writes a training set as InsightFace lays it out: PATH (.rec), its .idx, and `property` beside them.

    `people` gives the encoded images (JPEG or PNG files of size x size pixels) of one person after another; they are
    taken one by one, so they need not fit into memory. Nothing is written if DataError is raised: for a person without
    an image, or more records than labels can count.
    """
    with (
        atomic_write(path) as records,
        atomic_write(path.with_suffix(".idx")) as index,
        atomic_write(path.with_name("property")) as properties,
    ):
        with records.open("wb") as file:
            writer = _Writer(file)
            writer.add((0, 0))  # the header record, whose numbers are known at the end
            ranges = []
            for label, images in enumerate(people):
                begin = len(writer.offsets)
                for image in images:
                    writer.add((label,), image)
                ranges.append((begin, len(writer.offsets)))
                if begin == len(writer.offsets):
                    raise DataError(f"{path}: person {label} has no image; leave out people without any")
            identities = len(writer.offsets)
            for images_of_person in ranges:
                writer.add(images_of_person)
            if len(writer.offsets) > EXACT:
                raise DataError(f"{path}: {len(writer.offsets)} records, and labels count to {EXACT}; make two sets")
            file.seek(0)
            file.write(_framed(_packed(0, (identities, len(writer.offsets)))))
        index.write_text("".join(f"{number}\t{offset}\n" for number, offset in enumerate(writer.offsets)))
        properties.write_text(f"{len(ranges)},{size},{size}")


class _Writer:
    """Appends records to a file and remembers where they begin."""

    def __init__(self, file: BinaryIO):
        self._file, self.offsets = file, array("q")

    def add(self, labels: Sequence[float], content: bytes = b"") -> None:
        number = len(self.offsets)
        self.offsets.append(self._file.tell())
        self._file.write(_framed(_packed(number, labels, content)))


def _packed(number: int, labels: Sequence[float], content: bytes = b"") -> bytes:
    """The payload of a record; one label lies in the header itself, several after it."""
    if len(labels) == 1:
        return _HEADER.pack(0, labels[0], number, 0) + content
    return _HEADER.pack(len(labels), 0, number, 0) + np.array(labels, "<f4").tobytes() + content


def _framed(payload: bytes) -> bytes:
    """The payload as it stands in the file, cut into parts where it has the magic number."""
    if len(payload) >= 1 << _LENGTH_BITS:
        raise DataError(f"an image of {len(payload)} bytes does not fit into a record, which has 2^{_LENGTH_BITS}")
    words = np.frombuffer(payload, "<u4", len(payload) // 4)
    cuts = (np.flatnonzero(words == _MAGIC) * 4).tolist()
    kinds = [_FIRST] + [_MIDDLE] * (len(cuts) - 1) + [_LAST] if cuts else [_WHOLE]
    framed = []
    for kind, begin, end in zip(kinds, [0] + [cut + 4 for cut in cuts], cuts + [len(payload)], strict=True):
        framed += [_FRAME.pack(_MAGIC, kind << _LENGTH_BITS | end - begin), payload[begin:end]]
    return b"".join(framed) + bytes(-len(payload) % 4)
