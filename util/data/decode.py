"""Decoding of image files to RGB pixels."""

import cv2
import numpy as np

from util.errors import DataError
from util.face import FACE_SIZE

_NUMPY_MAGIC = b"\x93NUMPY"


def decode_image(encoded: bytes, source: str, fix: str) -> np.ndarray:
    """Decode a JPEG, PNG, BMP or WebP, whatever channels it has.

    Args:
        encoded: the content of the image file.
        source: where the bytes come from, for messages: a path, or a file and a record.
        fix: the sentence that messages end in: "Restore it."

    Returns:
        (H, W, 3) RGB uint8.

    Raises:
        DataError: the bytes are not an image.
    """
    if encoded.startswith(_NUMPY_MAGIC):
        raise DataError(f"{source}: a numpy array and not an image file. Store JPEG or PNG.")
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB) if encoded else None
    except cv2.error as error:
        raise DataError(f"{source}: cannot be decoded ({' '.join(str(error).split())}). {fix}") from None
    if image is None:
        raise DataError(f"{source}: {'not an image that can be decoded' if encoded else 'empty'}. {fix}")
    return image


def decode_face(encoded: bytes, source: str, fix: str) -> np.ndarray:
    """Decode an aligned face, (S, S, 3): like decode_image, but raise DataError unless it is square."""
    image = decode_image(encoded, source, fix)
    height, width = image.shape[:2]
    if height != width:
        raise DataError(f"{source}: {width}x{height} is not square. Align the faces to {FACE_SIZE}x{FACE_SIZE} first.")
    return image
