"""Pack the pyramid levels of many images on canvases of one size, so that a network sees few large inputs.

A level is a complete image, reduced. A level that is larger than a canvas is cut into pieces. The pieces overlap by the
network's receptive field, so the network's answers do not change and an image of any size needs bounded memory.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

SIDE = 512  # pixels of a canvas's side; larger canvases leave the cache of a CPU
FACTOR = 0.707  # scale of a level / scale of the level before it


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
    """The position of a piece: the number of its canvas, and its corner on the canvas."""

    canvas: int
    top: int
    left: int


def scales(height: int, width: int, min_face: float, window: int) -> list[float]:
    """Return the scales of an image's pyramid. At the first, largest one a face of `min_face` fills the window."""
    scale = window / min_face
    found = []
    while min(height, width) * scale > window:
        found.append(scale)
        scale *= FACTOR
    return found


def level_size(image: np.ndarray, scale: float) -> tuple[int, int]:
    """Return the height and width of a level of an (H, W, 3) image."""
    return math.ceil(image.shape[0] * scale), math.ceil(image.shape[1] * scale)


def resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (N, H, W, 3) uint8 to (N, height, width, 3), bilinear and antialiased like Pillow."""
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
    return F.interpolate(nchw, (height, width), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()


def cut(image: int, level: int, scale: float, size: tuple[int, int], overlap: int) -> Iterator[Piece]:
    """Yield the pieces of a level of `size` (height, width), none larger than a canvas.

    Neighboring pieces have `overlap` pixels in common. The other arguments are those of Piece.
    """
    height, width = size
    step = SIDE - overlap
    for top in range(0, max(height - overlap, 1), step):
        for left in range(0, max(width - overlap, 1), step):
            rows, columns = min(SIDE, height - top), min(SIDE, width - left)
            yield Piece(image, level, scale, top=top, left=left, height=rows, width=columns)


def pack(pieces: Iterable[Piece]) -> list[tuple[Piece, Place]]:
    """Place pieces on canvases.

    The highest piece comes first. Each piece goes to the first shelf with enough room. Corners are at even pixels, so
    that a network of stride 2 sees the same windows as in the level itself.
    """
    shelves: list[list[int]] = []  # canvas, top, height, columns in use
    filled: list[int] = []  # rows in use of each canvas
    places = []
    for piece in sorted(pieces, key=lambda piece: piece.height, reverse=True):
        height = piece.height + piece.height % 2
        width = piece.width + piece.width % 2
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
    """Return the canvases, (rows, SIDE, 3) uint8 each, with the pieces of the (H, W, 3) uint8 images on them."""
    rows: dict[int, int] = {}  # rows in use of each canvas
    for piece, place in placed:
        rows[place.canvas] = max(rows.get(place.canvas, 0), place.top + piece.height)
    # Multiples of 32, because torch caches its plan for an input by the shape: few shapes, few plans.
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
