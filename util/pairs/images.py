"""What the readers of all verification formats share: their base class, reading files, and checks of images."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from util.data.decode import decode_image
from util.errors import DataError
from util.face import FACE_SIZE
from util.files import open_regular


class PairSet(ABC):
    """A verification set of P pairs: 2P images, of which 2i and 2i + 1 are a pair."""

    name: str
    issame: np.ndarray  # (P,) bool
    groups: np.ndarray | None = None  # (P,) of text: the group of people that a pair belongs to

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        images = np.empty((stop - start, FACE_SIZE, FACE_SIZE, 3), np.uint8)
        for index in range(start, stop):
            images[index - start] = self._image(index)
        return images

    def image_name(self, index: int) -> str:
        """Return what users find image `index` by: its number in the file, or its name."""
        return f"image {index}"

    @abstractmethod
    def _image(self, index: int) -> np.ndarray:
        """Return image `index` (0 to 2P - 1) as (112, 112, 3) RGB uint8."""


def read_regular(path: Path, limit: int, *, fix: str, length: int = -1) -> bytes:
    """Return the content of a regular file. A FIFO would wait for ever, and /dev/zero would fill the memory.

    Args:
        path: the file.
        limit: the largest size of the file, in bytes.
        fix: the sentence that messages end in: "Restore it."
        length: bytes to read from the start; -1 for all.

    Raises:
        DataError: the file is missing, larger, not a regular file, or cannot be read.
    """
    try:
        descriptor, _ = open_regular(path, limit)
        with open(descriptor, "rb") as file:
            return file.read(length)
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(f"{path}: {reason}. {fix}") from None


def decode_pair_image(encoded: bytes, source: str) -> np.ndarray:
    """Decode an image file to (112, 112, 3) RGB uint8. Raise DataError, naming `source`, if that is not possible."""
    image = decode_image(encoded, source, "Restore it, or make the set again.")
    check_shape(image.shape, source)
    return image


def check_shape(shape: tuple[int, ...], source: str) -> None:
    """Raise DataError, naming `source`, unless the shape is (112, 112, 3)."""
    if shape == (FACE_SIZE, FACE_SIZE, 3):
        return
    is_image = len(shape) == 3 and shape[2] == 3
    found = f"{shape[1]}x{shape[0]} pixels" if is_image else f"an array of shape {shape}"
    raise DataError(
        f"{source}: {found}, but a verification set holds aligned faces of {FACE_SIZE}x{FACE_SIZE}. "
        f"Align or resize its images first."
    )
