"""Photographs as people have them, read as RGB uint8: whatever can be read is, and what cannot says why in one line."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Formats that Pillow decodes by itself. Left out are those for which it starts other programs, such as EPS.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif")
)


class NotAnImage(ValueError):
    """A file that neither is an image nor has the name of one."""


class UnreadableImage(ValueError):
    """An image that cannot be decoded, with the reason."""


def read_photo(path: Path) -> np.ndarray:
    """The (first) image in a file, upright as its EXIF orientation says: (H, W, 3) RGB uint8.

    Grey and CMYK become RGB, 16 bits become 8, and what is transparent becomes white. Raises NotAnImage or
    UnreadableImage for every other file: also for one cut short, and for one of more than 179 million pixels, which is
    refused before its pixels are decoded.
    """
    try:
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]  # a build of Pillow may lack some
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=formats) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_as_rgb(image))
    except UnidentifiedImageError:
        if path.suffix.lower() not in SUFFIXES:
            raise NotAnImage("not an image") from None
        raise UnreadableImage(_why_unknown(path)) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"too large ({_line(error)}); make it smaller") from None
    except Exception as error:  # decoders fail on broken files in ways of their own
        raise UnreadableImage(f"cannot be read ({_line(error)}); restore or remove it") from None


def _as_rgb(image: Image.Image) -> Image.Image | np.ndarray:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would cut off the upper ones
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are fractions without a known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _why_unknown(path: Path) -> str:
    if path.stat().st_size == 0:
        return "empty file; restore or remove it"
    if path.suffix.lower() in (".heic", ".heif"):
        return "HEIC is not supported; convert it to JPEG"
    return "not an image in spite of its name; restore or remove it"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
