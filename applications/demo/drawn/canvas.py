"""A texture that is painted with polygons in face coordinates, and the curves and noise to paint with."""

import functools
import itertools

import cv2
import numpy as np

from applications.demo.drawn.person import SKIN_TONES, palette
from applications.demo.drawn.shape import ROWS, STEP, TOP, Head

ACROSS, DOWN = 3, 2  # texture pixels per column and row of the mesh
_NOISE_SIZE = (ROWS * DOWN, 480)
_SHIFT = 4  # bits of sub-pixel precision in OpenCV's polygons

Shapes = np.ndarray | list[np.ndarray]


class Canvas:
    """A texture, and brushes that take polygons (n, 2) in face coordinates, one or a list of them."""

    def __init__(self, head: Head, image: np.ndarray):
        self.head, self.image = head, image
        self._rows = image.reshape(len(image), -1)
        self.skin = palette(SKIN_TONES, head.person.skin)

    def area(
        self, shapes: Shapes, color: np.ndarray, alpha: float = 1, blur: float = 0, clip: Shapes | None = None
    ) -> None:
        """Fills polygons; blur in pixels of the face; outside the polygons `clip` nothing is painted."""
        self._brush(shapes, None, color, alpha, blur, clip)

    def line(self, shapes: Shapes, width: float, color: np.ndarray, alpha: float = 1, blur: float = 0) -> None:
        """Draws open lines; width and blur in pixels of the face."""
        self._brush(shapes, width, color, alpha, blur, None)

    def _place(self, shapes: Shapes) -> tuple[np.ndarray, list[int]]:
        """Face coordinates -> texture pixels of all shapes (n, 2), and where each shape ends."""
        shapes = shapes if isinstance(shapes, list) else [shapes]
        points = np.concatenate(shapes)
        column = (self.head.angle(points[:, 0], points[:, 1]) - self.head.angles[0, 0]) * (ACROSS / STEP)
        placed = np.empty_like(points)
        placed[:, 0] = column + (ACROSS - 1) / 2
        placed[:, 1] = (points[:, 1] - TOP) * DOWN + (DOWN - 1) / 2
        return placed, list(itertools.accumulate(len(shape) for shape in shapes))

    def _brush(
        self, shapes: Shapes, width: float | None, color: np.ndarray, alpha: float, blur: float, clip: Shapes | None
    ) -> None:
        if alpha < 0.02:
            return
        placed, ends = self._place(shapes)
        margin = int(6 * blur + (width or 0) + 3)
        low = np.maximum(placed.min(axis=0).astype(int) - margin, 0)
        high = np.minimum(placed.max(axis=0).astype(int) + margin + 2, self.image.shape[1::-1])
        if (high <= low).any():
            return
        mask = _mask(placed, ends, low, high, width)
        if blur:
            mask = cv2.GaussianBlur(mask, (0, 0), blur * DOWN)
        if clip is not None:
            mask = cv2.multiply(mask, _mask(*self._place(clip), low, high, None), scale=1 / 255)
        # Rows of interleaved channels: broadcasting over a last axis of three is many times slower.
        patch = self._rows[low[1] : high[1], 3 * low[0] : 3 * high[0]]
        weight = cv2.merge([mask] * 3).reshape(patch.shape) * np.float32(alpha / 255)
        ink = np.empty((high[0] - low[0], 3), np.float32)
        ink[:] = color
        patch[:] = patch + (ink.ravel() - patch) * weight + np.float32(0.5)


def both(shape: np.ndarray) -> list[np.ndarray]:
    """A shape and its mirror image on the other side of the face."""
    return [shape, shape * (-1, 1)]


def _mask(placed: np.ndarray, ends: list[int], low: np.ndarray, high: np.ndarray, width: float | None) -> np.ndarray:
    """Shapes, drawn with anti-aliasing into the box from low to high: (h, w) uint8."""
    mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
    fixed = np.rint((placed - low) * 2**_SHIFT).astype(np.int32)
    shapes = [fixed[start:end] for start, end in itertools.pairwise([0, *ends])]
    if width is None:
        cv2.fillPoly(mask, shapes, 255, cv2.LINE_AA, _SHIFT)
    else:
        cv2.polylines(mask, shapes, False, 255, max(1, round(width * DOWN)), cv2.LINE_AA, _SHIFT)
    return mask


@functools.cache
def noise(kind: str) -> np.ndarray:
    """A noise texture of mean 0 and deviation 1, (320, 480) float32: `strands` run down, `curls`, or `grain`."""
    seed, across, down = {"strands": (7, 0.8, 14.0), "curls": (8, 2.4, 2.4), "grain": (9, 0.7, 0.7)}[kind]
    raw = np.random.default_rng(seed).standard_normal(_NOISE_SIZE).astype(np.float32)
    soft = cv2.GaussianBlur(raw, (0, 0), across, sigmaY=down, borderType=cv2.BORDER_REFLECT)
    return (soft - soft.mean()) / soft.std()


def curve(points: list[tuple[float, float]], count: int = 13) -> np.ndarray:
    """A smooth (Catmull-Rom) curve through the points, (count, 2)."""
    return _spline(len(points), count) @ np.array(points, np.float64)


@functools.cache
def _spline(points: int, count: int) -> np.ndarray:
    """The matrix (count, points) that turns points into a curve; beyond its ends the curve goes on straight."""
    p = np.eye(points)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    at = np.linspace(0, points - 1, count)
    index = np.minimum(at.astype(int), points - 2)
    t = (at - index)[:, None]
    a, b, c, d = (p[index + k] for k in range(4))
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def ellipse(x: float, y: float, wide: float, high: float, count: int = 20) -> np.ndarray:
    """An ellipse as a polygon, (count, 2)."""
    return _circle(count) * (wide, high) + (x, y)


@functools.cache
def _circle(count: int) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def arch(half: float, ends: float, middle: float, flank: float | None = None) -> np.ndarray:
    """A symmetric curve from (-half, ends) over (0, middle); at half the width it passes `flank`."""
    flank = ends + 0.75 * (middle - ends) if flank is None else flank
    return curve([(-half, ends), (-half / 2, flank), (0, middle), (half / 2, flank), (half, ends)], 17)
