"""Write RecordIO training sets for tests, byte for byte like MXNet."""

import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from util.data.recordio import EXACT
from util.errors import DataError
from util.files import atomic_write

_MAGIC = 0xCED7230A
_COMPLETE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS = 29


def write_identities(path: Path, identities: Iterable[Iterable[bytes]], size: int = 112) -> None:
    """Write a training set in InsightFace's layout: PATH (.rec), its .idx, and `property` in the same folder.

    Args:
        path: the .rec file.
        identities: for each identity the encoded images (JPEG or PNG files of size x size pixels). They are taken one
            by one, so they need not fit into memory.
        size: pixels a side, for `property`.

    Raises:
        DataError: an identity has no image, or there are more records than labels can count. Nothing is written then.
    """
    with (
        atomic_write(path) as records,
        atomic_write(path.with_suffix(".idx")) as index,
        atomic_write(path.with_name("property")) as properties,
    ):
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
        return struct.pack("<IfQQ", 0, labels[0], number, 0) + content
    return struct.pack("<IfQQ", len(labels), 0, number, 0) + np.array(labels, "<f4").tobytes() + content


def _frame(payload: bytes) -> bytes:
    """Return the payload as it is stored, split into fragments where it has the magic number."""
    words = np.frombuffer(payload, "<u4", len(payload) // 4)
    cuts = (np.flatnonzero(words == _MAGIC) * 4).tolist()
    kinds = [_FIRST] + [_MIDDLE] * (len(cuts) - 1) + [_LAST] if cuts else [_COMPLETE]
    framed = []
    for kind, begin, end in zip(kinds, [0] + [cut + 4 for cut in cuts], cuts + [len(payload)], strict=True):
        framed += [struct.pack("<II", _MAGIC, kind << _LENGTH_BITS | end - begin), payload[begin:end]]
    return b"".join(framed) + bytes(-len(payload) % 4)
