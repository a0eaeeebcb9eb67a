"""What the images of a verification set have in common, whatever its format: RGB uint8, 112x112."""

import numpy as np

from util.data.decode import decode_image
from util.errors import DataError

FACE_SIZE = 112


def decode_pair_image(encoded: bytes, where: str) -> np.ndarray:
    """The bytes of an image file -> (112, 112, 3) RGB uint8. DataError names `where` they come from."""
    image = decode_image(encoded, where, "Restore it, or rebuild the set.")
    check_shape(image.shape, where)
    return image


def check_shape(shape: tuple[int, ...], where: str) -> None:
    """DataError unless the shape is (112, 112, 3)."""
    if shape != (FACE_SIZE, FACE_SIZE, 3):
        size = f"{shape[1]}x{shape[0]} pixels" if len(shape) == 3 and shape[2] == 3 else f"an array of shape {shape}"
        raise DataError(
            f"{where}: {size}, and a verification set holds aligned faces of {FACE_SIZE}x{FACE_SIZE}; align or "
            f"resize its images first"
        )
