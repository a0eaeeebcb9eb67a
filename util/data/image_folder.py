"""Training sets in folders: aligned faces, one folder a person."""

import os
from pathlib import Path

import numpy as np

from util.data.decode import decode_face
from util.data.folder_index import Names, list_images
from util.errors import DataError

_REMEDY = "restore it or remove it"
_READ_AT_ONCE = 1 << 14  # an aligned face


class ImageFolder:
    """Aligned faces in one folder a person: ROOT/PERSON/IMAGE. Classes and images are in alphabetical order.

    People without images are left out. What a worker process uses of it lies in arrays and in two bytes objects, and is
    not copied. Raises DataError if there are fewer than two people.
    """

    def __init__(self, root: Path):
        self.root = root
        listing = list_images(root)
        self.classes = [name for name, count in zip(listing.people, listing.counts.tolist(), strict=True) if count]
        if len(self.classes) < 2:
            raise DataError(
                f"{root}: found images in {len(self.classes)} folders, and training needs two people or more; lay them "
                f"out as {root}/PERSON/IMAGE.jpg"
            )
        self.labels = np.repeat(np.arange(len(self.classes)), listing.counts[listing.counts > 0])  # (N,) int64
        self._people, self._images = Names.of(self.classes), listing.images

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        return Path(self.where(index))

    def where(self, index: int) -> str:
        return f"{self.root}/{os.fsdecode(self._people[self.labels[index]])}/{os.fsdecode(self._images[index])}"

    def encoded(self, index: int) -> bytes:
        """The bytes of the file of image `index`. DataError names a file that cannot be read."""
        return _bytes_of(self.where(index))

    def image(self, index: int) -> np.ndarray:
        """Image `index` as (S, S, 3) RGB uint8. DataError names a file that cannot be used."""
        path = self.where(index)
        return decode_face(_bytes_of(path), path, _REMEDY)


def _bytes_of(path: str) -> bytes:
    """What a file holds, with as few calls of the system as can be: a third of the time of Path.read_bytes()."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            parts = [os.read(descriptor, _READ_AT_ONCE)]
            while parts[-1]:
                parts.append(os.read(descriptor, _READ_AT_ONCE))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    return b"".join(parts)
