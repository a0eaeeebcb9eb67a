"""Checks that the images of all verification formats share: RGB uint8, 112x112."""

import numpy as np

from util.data.decode import decode_image
from util.errors import DataError
from util.face import FACE_SIZE


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
