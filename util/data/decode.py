"""From the bytes of an image file to pixels."""

import cv2
import numpy as np

from util.errors import DataError

_NUMPY_MAGIC = b"\x93NUMPY"


def decode_image(encoded: bytes, where: str, remedy: str) -> np.ndarray:
    """A JPEG, PNG, BMP or WebP as (H, W, 3) RGB uint8, whatever channels it has.

    DataError names `where` the bytes come from, and ends in the remedy, if they are no image.
    """
    if encoded.startswith(_NUMPY_MAGIC):
        raise DataError(f"{where}: a numpy array and not an image file; store JPEG or PNG")
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB) if encoded else None
    except cv2.error as error:
        raise DataError(f"{where}: cannot be decoded ({' '.join(str(error).split())}); {remedy}") from None
    if image is None:
        raise DataError(f"{where}: {'not an image that can be decoded' if encoded else 'empty'}; {remedy}")
    return image


def decode_face(encoded: bytes, where: str, remedy: str) -> np.ndarray:
    """The same for an aligned face, which is square: (S, S, 3) RGB uint8."""
    image = decode_image(encoded, where, remedy)
    if image.shape[0] != image.shape[1]:
        raise DataError(f"{where}: {image.shape[1]}x{image.shape[0]} is not square; align the faces to 112x112 first")
    return image
