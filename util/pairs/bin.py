"""Verification sets as InsightFace publishes them: lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin and so on.

A .bin is a pickle of two lists: 2P images and P booleans. Images 2i and 2i + 1 are a pair. An image is the bytes of
a JPEG, as Python 2 or Python 3 writes them, or a numpy array of such bytes, or an array of (112, 112, 3) pixels, RGB.
Nothing that the file names is run, see util/pairs/pickles.py.
"""

from pathlib import Path

import numpy as np

from util.errors import DataError
from util.pairs.images import PairSet, check_shape, decode_pair_image, read_regular
from util.pairs.pickles import PickledArray, load_plain_pickle

BIN_LIMIT = 1 << 30  # bytes; published sets have up to 90 MB


class BinPairs(PairSet):
    """A .bin of InsightFace, whose encoded images (60 to 90 MB for a usual set) stay in memory."""

    def __init__(self, path: Path):
        self.name = path.stem
        self._path = path
        content = load_plain_pickle(read_regular(path, BIN_LIMIT, fix="Restore it."), path)
        if not isinstance(content, list | tuple) or len(content) != 2:
            raise DataError(f"{path}: not a list of images and a list of booleans. Copy or download the file again.")
        self.issame = _booleans(path, content[1])
        if not isinstance(content[0], list | tuple) or not content[0]:
            raise DataError(f"{path}: its first part is not a list of images. Make the set again.")
        self._images = [_bytes_or_pixels(image, self._where(index)) for index, image in enumerate(content[0])]
        if len(self._images) != 2 * len(self.issame):
            raise DataError(
                f"{path}: {len(self._images)} images for {len(self.issame)} pairs, and a pair is two images. "
                f"Make the set again."
            )

    def _image(self, index: int) -> np.ndarray:
        image = self._images[index]
        if isinstance(image, bytes | bytearray) or image.ndim == 1:
            return decode_pair_image(bytes(image), self._where(index))
        return image

    def _where(self, index: int) -> str:
        return f"{self._path}: image {index} (from 0)"


def _bytes_or_pixels(entry: object, where: str) -> bytes | bytearray | np.ndarray:
    """Return an image file as bytes or (N,) uint8, or pixels as (112, 112, 3). Do not copy: a file may repeat one."""
    if isinstance(entry, bytes | bytearray):
        return entry
    array = entry.array if isinstance(entry, PickledArray) else None
    if array is None:
        raise DataError(f"{where}: neither the bytes of an image file nor an array of them. Make the set again.")
    if array.dtype != np.uint8:
        raise DataError(f"{where}: an array of {array.dtype}, and uint8 is needed. Make the set again.")
    if max(array.shape, default=0) == array.size:  # an image file in one row or one column
        return array.reshape(-1)
    check_shape(array.shape, where)
    return array


def _booleans(path: Path, entries: object) -> np.ndarray:
    """Return (P,) bool from a list or an array of booleans or of 0 and 1."""
    rule = "its second part must be a list of one True or False a pair"
    if isinstance(entries, PickledArray) and entries.array is not None and entries.array.ndim == 1:
        entries = entries.array.tolist()
    if not isinstance(entries, list | tuple) or not entries:
        raise DataError(f"{path}: {rule}. Make the set again.")
    for pair, same in enumerate(entries):
        if type(same) not in (bool, int) or same not in (0, 1):
            raise DataError(f"{path}: {rule}, and entry {pair} (from 0) is something else. Make the set again.")
    return np.array(entries, dtype=bool)
