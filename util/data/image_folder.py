"""Training sets in folders: aligned faces, one folder for each person."""

from pathlib import Path

import numpy as np

from util.data.decode import MAX_IMAGE_BYTES, decode_face
from util.data.folder_index import list_images, pack_names, unpack_name
from util.errors import DataError
from util.files import read_bytes

_FIX = "Restore it or remove it."


class ImageFolder:
    """Aligned faces in one folder for each person: ROOT/PERSON/IMAGE.

    Classes and images are in alphabetical order. People without images are left out. Worker processes use arrays only,
    so they do not copy the names.
    """

    def __init__(self, root: Path):
        """List the images in `root`. Raise DataError for an unreadable folder or fewer than two people."""
        self.root = root
        index = list_images(root)
        self.classes = [name for name, count in zip(index.people, index.counts.tolist(), strict=True) if count]
        if len(self.classes) < 2:
            found = f"found images in {len(self.classes)} folders, and training needs two people or more"
            raise DataError(f"{root}: {found}. Lay them out as {root}/PERSON/IMAGE.jpg.")
        self.labels = np.repeat(np.arange(len(self.classes)), index.counts[index.counts > 0])  # (N,) int64
        self._folders = pack_names(self.classes)
        self._images = index.images

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return Path(self.where(index))

    def where(self, index: int) -> str:
        """Return the path of image `index`, for messages."""
        folder = unpack_name(str(self._folders[self.labels[index]]))
        return f"{self.root}/{folder}/{unpack_name(str(self._images[index]))}"

    def encoded(self, index: int) -> bytes:
        """Return the content of the file of image `index`. Raise DataError if it cannot be read."""
        return read_bytes(self.path(index), _FIX, MAX_IMAGE_BYTES)

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (S, S, 3) RGB uint8. Raise DataError if the file cannot be used."""
        return decode_face(self.encoded(index), self.where(index), _FIX)
