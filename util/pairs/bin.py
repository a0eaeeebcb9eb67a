"""Verification sets as InsightFace publishes them: lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin and so on.

A .bin is a pickle of two lists: 2P images, of which 2i and 2i + 1 are a pair, and P booleans. An image is the bytes of
a JPEG, as Python 2 or Python 3 writes them, or a numpy array of such bytes, or one of (112, 112, 3) pixels, RGB. The
files are read without running anything that they name, see util/pairs/pickles.py.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.errors import DataError
from util.pairs.images import FACE_SIZE, check_shape, decode_pair_image
from util.pairs.pickles import NUMPY_GLOBALS, PickledArray, SafeUnpickler

_SHORT = 256  # bytes that are not worth leaving in the file


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that were left in the file: where they begin, and how many they are."""

    start: int
    size: int

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True, slots=True)
class _Image:
    data: Span | bytes
    pixels: str | None = None  # "C" or "F", the order of an array of pixels; None for an encoded image


class _BinUnpickler(SafeUnpickler):
    """Leaves images where they are, so that a set takes no memory to speak of, however large its file is."""

    def read_data(self, size: int) -> Span | bytes:
        return self.read(size) if size < _SHORT else Span(self.skip(size), size)


class BinPairs:
    """A .bin of InsightFace. The file is opened again for each request and must stay as it is while it is used.

    DataError at opening if it is no such set, or its first or last image is none.
    """

    def __init__(self, path: Path):
        self.name, self._path = path.stem, path
        with _opened(path) as file:
            content = _BinUnpickler(file, path, NUMPY_GLOBALS).load()
            self._stamp = _stamp(file)
            if not isinstance(content, list | tuple) or len(content) != 2:
                raise DataError(f"{path}: not a list of images and a list of booleans, as a verification set is")
            self.issame = _truth(path, file, content[1])
        self._images = _images(path, content[0])
        if len(self._images) != 2 * len(self.issame):
            raise DataError(
                f"{path}: {len(self._images)} images for {len(self.issame)} pairs, and a pair is two images; make the "
                f"set anew"
            )
        for index in (0, len(self._images) - 1):
            self.images(index, index + 1)

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        images = np.empty((stop - start, FACE_SIZE, FACE_SIZE, 3), np.uint8)
        with _opened(self._path) as file:
            if _stamp(file) != self._stamp:
                raise DataError(f"{self._path}: has changed while it was in use; start again")
            for index in range(start, stop):
                name = f"{self._path}: image {index} (from 0)"
                images[index - start] = _decode(self._images[index], file, name)
        return images


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it") from None


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _bytes(data: Span | bytes, file: BinaryIO) -> bytes:
    if isinstance(data, Span):
        file.seek(data.start)
        return file.read(data.size)
    return data


def _decode(image: _Image, file: BinaryIO, name: str) -> np.ndarray:
    data = _bytes(image.data, file)
    if image.pixels is None:
        return decode_pair_image(data, name)
    return np.frombuffer(data, np.uint8).reshape((FACE_SIZE, FACE_SIZE, 3), order=image.pixels)


def _images(path: Path, entries: object) -> list[_Image]:
    if not isinstance(entries, list | tuple) or not entries:
        raise DataError(f"{path}: its first part is not a list of images; make the set anew")
    return [_image(path, index, entry) for index, entry in enumerate(entries)]


def _image(path: Path, index: int, entry: object) -> _Image:
    if isinstance(entry, Span | bytes):
        return _Image(entry)
    name = f"{path}: image {index} (from 0)"
    if not isinstance(entry, PickledArray) or entry.dtype is None:
        raise DataError(f"{name}: neither the bytes of an image file nor an array of them; make the set anew")
    if entry.dtype != np.uint8:
        raise DataError(f"{name}: an array of {entry.dtype}, and one of uint8 is needed; make the set anew")
    if max(entry.shape, default=0) == math.prod(entry.shape):
        return _Image(entry.data)  # in one row, or one column
    check_shape(entry.shape, name)
    return _Image(entry.data, "F" if entry.fortran_order else "C")


def _truth(path: Path, file: BinaryIO, entries: object) -> np.ndarray:
    """(P,) bool from a list of booleans, numpy's booleans or 0 and 1, or an array of those."""
    rule = "its second part must be a list of one True or False a pair"
    if isinstance(entries, PickledArray) and entries.dtype is not None and len(entries.shape) == 1:
        entries = np.frombuffer(_bytes(entries.data, file), entries.dtype).tolist()
    if not isinstance(entries, list | tuple) or not entries:
        raise DataError(f"{path}: {rule}; make the set anew")
    wrong = next((pair for pair, same in enumerate(entries) if type(same) not in (bool, int) or same not in (0, 1)), -1)
    if wrong >= 0:
        raise DataError(f"{path}: {rule}, and entry {wrong} (from 0) is something else; make the set anew")
    return np.array(entries, dtype=bool)
