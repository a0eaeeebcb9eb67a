"""Decoding of image files to RGB pixels."""

import cv2
import numpy as np

from util.errors import DataError
from util.face import FACE_SIZE
from util.image_io import declared_size

MAX_IMAGE_BYTES = 2**27
_MAX_SIDE = 4096  # a file of 600 KB can declare 14000x14000 pixels, which take 1.2 GB
_MIN_SIDE = 16  # of a face


def decode_image(encoded: bytes, source: str, fix: str) -> np.ndarray:
    """Decode a JPEG, PNG, BMP or WebP, whatever channels it has.

    Args:
        encoded: the content of the image file.
        source: where the bytes come from, for messages: a path, or a file and a record.
        fix: the sentence that messages end in: "Restore it."

    Returns:
        (H, W, 3) RGB uint8.

    Raises:
        DataError: the bytes are not an image, or an image of more than 4096x4096 pixels.
    """
    if encoded.startswith(b"\x93NUMPY"):
        raise DataError(f"{source}: a numpy array and not an image file. Store JPEG or PNG.")
    size = declared_size(encoded)
    if size is None:
        raise DataError(f"{source}: {'not an image that can be decoded' if encoded else 'empty'}. {fix}")
    if size[0] * size[1] > _MAX_SIDE**2:
        raise DataError(f"{source}: {size[0]}x{size[1]} pixels, more than {_MAX_SIDE}x{_MAX_SIDE}. {fix}")
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise DataError(f"{source}: cannot be decoded ({' '.join(str(error).split())}). {fix}") from None
    if image is None:
        raise DataError(f"{source}: not an image that can be decoded. {fix}")
    return image


def decode_face(encoded: bytes, source: str, fix: str) -> np.ndarray:
    """Decode an aligned face, (S, S, 3): like decode_image, but raise DataError unless it is square, 16 <= S."""
    image = decode_image(encoded, source, fix)
    height, width = image.shape[:2]
    if height != width:
        raise DataError(f"{source}: {width}x{height} is not square. Align the faces to {FACE_SIZE}x{FACE_SIZE} first.")
    if height < _MIN_SIDE:
        raise DataError(f"{source}: {width}x{height} pixels are too few, a face has {_MIN_SIDE} a side or more. {fix}")
    return image
