"""Read photographs of any common format as RGB uint8, and write images atomically."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from util.files import atomic_write, open_regular

# Formats that Pillow decodes by itself. It starts other programs for the rest, such as EPS.
READ_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif")
)
MAX_PHOTO_BYTES = 2**30  # some decoders read the complete file into memory first
WRITE_FORMATS = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, 95], "png": []}  # suffix: parameters of OpenCV's encoder

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # width and height follow
# A segment of a JPEG: marker, length; and where the marker begins a frame, bits per sample, height and width.
_SEGMENT = struct.Struct(">HHBHH")
_FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}  # tables and extensions are between them
_WITH_LENGTH = frozenset(range(0xFFC0, 0xFFFF)) - frozenset(range(0xFFD0, 0xFFDA))


class NotAnImage(ValueError):
    """A file whose content is not an image and whose name does not promise one."""


class UnreadableImage(ValueError):
    """An image that cannot be decoded, with the reason."""


def read_photo(path: Path) -> np.ndarray:
    """Read the (first) image of a file, turned upright by its EXIF orientation.

    Returns:
        (H, W, 3) RGB uint8. Grey and CMYK become RGB, 16 bits become 8, transparent pixels become white.

    Raises:
        NotAnImage: neither the content nor the name is an image's.
        UnreadableImage: the image is damaged or cut short, or has more than 179 million pixels, or the file is no
            regular one. The size is checked before pixels are decoded.
    """
    try:
        descriptor, _ = open_regular(path, MAX_PHOTO_BYTES)
        with open(descriptor, "rb") as file, _open_header(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_as_rgb(image))
    except UnidentifiedImageError:
        if path.suffix.lower() not in SUFFIXES:
            raise NotAnImage("not an image") from None
        raise UnreadableImage(_unknown_format(path)) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"too large ({_one_line(error)}); make it smaller") from None
    except Exception as error:  # decoders raise many types on damaged files
        raise UnreadableImage(f"cannot be read ({_one_line(error)}); restore or remove it") from None


def declared_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the header of an image file, without decoding it, or None if it is no image."""
    # The two formats that sets are made of come without Pillow, which would take a fifth of the time of decoding.
    if encoded.startswith(_PNG_START) and len(encoded) >= 24:
        width, height = struct.unpack_from(">II", encoded, 16)
        return width, height
    if encoded.startswith(b"\xff\xd8"):
        start = 2
        while start + _SEGMENT.size <= len(encoded) and encoded[start] == 0xFF:
            marker, length, _, height, width = _SEGMENT.unpack_from(encoded, start)
            if marker in _FRAMES:
                return width, height
            if marker not in _WITH_LENGTH:  # decoders do not take what follows for a length
                break
            start += 2 + length
    try:
        with _open_header(io.BytesIO(encoded)) as image:
            return image.size
    except Exception:  # decoders raise many types on damaged files
        return None


@contextmanager
def _open_header(file: BinaryIO) -> Iterator[Image.Image]:
    Image.init()
    formats = [name for name in READ_FORMATS if name in Image.OPEN]  # a build of Pillow may lack some
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=formats) as image:
        yield image


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) RGB uint8 atomically as JPEG (quality 95) or PNG, chosen by the suffix of `path`.

    Missing folders are created. Raises OSError if the file cannot be written.
    """
    encoded, data = cv2.imencode(path.suffix, image[:, :, ::-1], WRITE_FORMATS[path.suffix[1:]])
    assert encoded, path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(data.tobytes())


def _as_rgb(image: Image.Image) -> Image.Image | np.ndarray:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # Pillow would keep the lower 8 bits of 16
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are fractions without a known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _unknown_format(path: Path) -> str:
    if path.stat().st_size == 0:
        return "empty file; restore or remove it"
    if path.suffix.lower() in (".heic", ".heif"):
        return "HEIC is not supported; convert it to JPEG"
    return "not an image in spite of its name; restore or remove it"


def _one_line(error: Exception) -> str:
    # The text of an OSError repeats the name of the file.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
