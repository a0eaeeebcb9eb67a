"""Read verification sets as InsightFace publishes them: lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin and so on.

A .bin is a pickle of two lists: 2P images, of which 2i and 2i + 1 are a pair, and P booleans. An image is the bytes of
a JPEG, as Python 2 or Python 3 writes them, or a numpy array of such bytes, or an array of (112, 112, 3) RGB pixels.
Nothing in the file is executed, see util/pairs/pickles.py.
"""

from pathlib import Path

import numpy as np

from util.errors import DataError
from util.face import FACE_SIZE
from util.files import read_bytes
from util.pairs.images import check_shape, decode_pair_image
from util.pairs.pickles import PickledArray, load_pickle


class BinPairs:
    """A .bin of InsightFace. The encoded images stay in memory: 60 to 90 MB for most sets.

    Raises DataError at opening if the file is not such a set, or its first or last image cannot be decoded.
    """

    def __init__(self, path: Path):
        self.name = path.stem
        self._path = path
        content = load_pickle(read_bytes(path, "Restore it."), path)
        if not isinstance(content, list | tuple) or len(content) != 2:
            raise DataError(f"{path}: not a list of images and a list of booleans. Name a verification set.")
        entries, truth = content
        self.issame = _read_truth(path, truth)
        if not isinstance(entries, list | tuple) or not entries:
            raise DataError(f"{path}: its first part is not a list of images. Make the set again.")
        self._images = [self._check_image(index, entry) for index, entry in enumerate(entries)]
        if len(self._images) != 2 * len(self.issame):
            raise DataError(
                f"{path}: {len(self._images)} images for {len(self.issame)} pairs. A pair is two images: make the set "
                f"again."
            )
        for index in (0, len(self._images) - 1):
            self.images(index, index + 1)

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        images = np.empty((stop - start, FACE_SIZE, FACE_SIZE, 3), np.uint8)
        for index in range(start, stop):
            image = self._images[index]
            if isinstance(image, np.ndarray) and image.ndim == 3:
                images[index - start] = image
            else:
                images[index - start] = decode_pair_image(bytes(image), self._label(index))
        return images

    def _check_image(self, index: int, entry: object) -> bytes | bytearray | np.ndarray:
        """Return the bytes of an image file, an array (n,) of such bytes, or an array (112, 112, 3) of pixels."""
        if isinstance(entry, bytes | bytearray):
            return entry
        if not isinstance(entry, PickledArray) or entry.array is None:
            what = "neither the bytes of an image file nor an array of such bytes"
            raise DataError(f"{self._label(index)}: {what}. Make the set again.")
        array = entry.array
        if array.dtype != np.uint8:
            raise DataError(f"{self._label(index)}: an array of {array.dtype} instead of uint8. Make the set again.")
        if array.size == max(array.shape, default=0):
            return array.reshape(-1)  # one row or one column
        check_shape(array.shape, self._label(index))
        return array

    def _label(self, index: int) -> str:
        return f"{self._path}: image {index} (from 0)"


def _read_truth(path: Path, entries: object) -> np.ndarray:
    """Return (P,) bool from a list of booleans, numpy's booleans or 0 and 1, or from an array of these."""
    rule = "its second part must be a list of one True or False a pair"
    if isinstance(entries, PickledArray) and entries.array is not None and entries.array.ndim == 1:
        entries = entries.array.tolist()
    if not isinstance(entries, list | tuple) or not entries:
        raise DataError(f"{path}: {rule}. Make the set again.")
    for pair, same in enumerate(entries):
        if type(same) not in (bool, int) or same not in (0, 1):
            raise DataError(f"{path}: {rule}, and entry {pair} (from 0) is something else. Make the set again.")
    return np.array(entries, dtype=bool)
