"""Pyramid levels of many images, packed side by side on canvases of one size, so that a network sees few large inputs.

A level is a whole image made smaller; one that is larger than a canvas is cut into pieces that overlap as far as the
network looks, so that nothing is seen differently and an image of any size takes bounded memory.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

SIDE = 512  # of a canvas, in pixels; larger ones fall out of a processor's cache
FACTOR = 0.707  # from level to level


@dataclass(frozen=True)
class Piece:
    """A rectangle of a level of an image, in pixels of the level. `scale`: size of the level / size of the image."""

    image: int
    level: int
    scale: float
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Place:
    """Where a piece lies: the number of its canvas, and its corner there."""

    canvas: int
    top: int
    left: int


def scales(height: int, width: int, min_face: float, window: int) -> list[float]:
    """Scales at which a window of `window` pixels sees faces of min_face pixels and more, the largest scale first."""
    scale, found = window / min_face, []
    while min(height, width) * scale > window:
        found.append(scale)
        scale *= FACTOR
    return found


def level_size(image: np.ndarray, scale: float) -> tuple[int, int]:
    """Height and width of a level of a (H, W, 3) image."""
    return math.ceil(image.shape[0] * scale), math.ceil(image.shape[1] * scale)


def resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear and antialiased, as Pillow does it: (N, H, W, 3) uint8 -> (N, height, width, 3)."""
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    return F.interpolate(nchw, (height, width), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()


def cut(image: int, level: int, scale: float, height: int, width: int, overlap: int) -> Iterator[Piece]:
    """The pieces of a level, none larger than a canvas; each shares `overlap` pixels with the next."""
    for top, rows in _spans(height, overlap):
        for left, columns in _spans(width, overlap):
            yield Piece(image, level, scale, top, left, rows, columns)


def _spans(length: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the pieces of a line."""
    starts = range(0, max(length - overlap, 1), SIDE - overlap)
    return ((start, min(SIDE, length - start)) for start in starts)


def pack(pieces: Iterable[Piece]) -> list[tuple[Piece, Place]]:
    """Places pieces on canvases: in shelves, the highest first, each on the first shelf that has room for it.

    Corners are at even pixels, where a network of stride 2 looks.
    """
    shelves: list[list[int]] = []  # canvas, top, height, pixels in use
    filled: list[int] = []  # of each canvas, rows in use
    places = []
    for piece in sorted(pieces, key=lambda piece: piece.height, reverse=True):
        height, width = piece.height + piece.height % 2, piece.width + piece.width % 2
        shelf = next((shelf for shelf in shelves if shelf[2] >= height and SIDE - shelf[3] >= width), None)
        if shelf is None:
            canvas = next((number for number, rows in enumerate(filled) if SIDE - rows >= height), len(filled))
            if canvas == len(filled):
                filled.append(0)
            shelf = [canvas, filled[canvas], height, 0]
            shelves.append(shelf)
            filled[canvas] += height
        places.append((piece, Place(shelf[0], shelf[1], shelf[3])))
        shelf[3] += width
    return places


def paint(images: list[np.ndarray], placed: list[tuple[Piece, Place]]) -> list[np.ndarray]:
    """Canvases with the pieces of (H, W, 3) uint8 images on them: (rows, SIDE, 3) uint8 each, rows as far as in use."""
    rows: dict[int, int] = {}
    for piece, place in placed:
        rows[place.canvas] = max(rows.get(place.canvas, 0), place.top + piece.height)
    # Multiples of 32: a network's plan for an input is kept for its shape.
    canvases = [np.zeros((math.ceil(rows[canvas] / 32) * 32, SIDE, 3), np.uint8) for canvas in range(len(rows))]
    levels: dict[tuple[int, int], np.ndarray] = {}
    for piece, place in placed:
        key = (piece.image, piece.level)
        if key not in levels:
            image = images[piece.image]
            levels[key] = resize(image[None], *level_size(image, piece.scale))[0]
        part = levels[key][piece.top : piece.top + piece.height, piece.left : piece.left + piece.width]
        canvases[place.canvas][place.top :, place.left :][: piece.height, : piece.width] = part
    return canvases
