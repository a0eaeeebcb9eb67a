"""Paint a texture with polygons in face coordinates; build the curves and the noise for it."""

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
Color = np.ndarray | tuple[int, int, int]
NOTHING: list[np.ndarray] = []  # no clip


class Canvas:
    """A texture and its brushes, which take one polygon (n, 2) in face coordinates or a list of polygons."""

    def __init__(self, head: Head, image: np.ndarray):
        self.head = head
        self.image = image
        self._rows = image.reshape(len(image), -1)
        self.skin = palette(SKIN_TONES, head.person.skin)

    def line(self, shapes: Shapes, width: float, color: Color, alpha: float = 1, blur: float = 0) -> None:
        """Draw open lines; `width` and `blur` are in pixels of the face."""
        self.area(shapes, color, alpha, blur=blur, width=width)

    def _place(self, shapes: Shapes) -> tuple[np.ndarray, list[int]]:
        """Return the texture pixels (n, 2) of the points of all shapes, and the index at which each shape ends."""
        shapes = shapes if isinstance(shapes, list) else [shapes]
        points = np.concatenate(shapes)
        column = (self.head.angle(points[:, 0], points[:, 1]) - self.head.angles[0, 0]) * (ACROSS / STEP)
        placed = np.empty_like(points)
        placed[:, 0] = column + (ACROSS - 1) / 2
        placed[:, 1] = (points[:, 1] - TOP) * DOWN + (DOWN - 1) / 2
        return placed, list(itertools.accumulate(len(shape) for shape in shapes))

    def area(
        self, shapes: Shapes, color: Color, alpha: float = 1, blur: float = 0, clip: Shapes = NOTHING, width: float = 0
    ) -> None:
        """Fill polygons inside the polygons `clip`, or draw open lines. `alpha` is the opacity from 0 to 1."""
        if alpha < 0.02:
            return
        placed, ends = self._place(shapes)
        # Only the box around the shapes is computed.
        margin = int(6 * blur + width + 3)
        low = np.maximum(placed.min(axis=0).astype(int) - margin, 0)
        high = np.minimum(placed.max(axis=0).astype(int) + margin + 2, self.image.shape[1::-1])
        if (high <= low).any():
            return
        mask = _mask(placed, ends, low=low, high=high, width=width)
        if blur:
            mask = cv2.GaussianBlur(mask, (0, 0), blur * DOWN)
        if clip is not NOTHING:
            mask = cv2.multiply(mask, _mask(*self._place(clip), low=low, high=high), scale=1 / 255)
        # Rows of interleaved channels, because broadcasting over a last axis of three is many times slower.
        patch = self._rows[low[1] : high[1], 3 * low[0] : 3 * high[0]]
        weight = cv2.merge([mask] * 3).reshape(patch.shape) * np.float32(alpha / 255)
        ink = np.empty((high[0] - low[0], 3), np.float32)
        ink[:] = color
        # Blend with the ink; 0.5 rounds to the nearest integer when the result is stored as uint8.
        patch[:] = patch + (ink.ravel() - patch) * weight + np.float32(0.5)


def both(shape: np.ndarray) -> list[np.ndarray]:
    """Return a shape and its mirror image on the other side of the face."""
    return [shape, shape * (-1, 1)]


def _mask(placed: np.ndarray, ends: list[int], low: np.ndarray, high: np.ndarray, width: float = 0) -> np.ndarray:
    """Draw shapes with anti-aliasing into the box from `low` to `high`: (h, w) uint8."""
    mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
    fixed = np.rint((placed - low) * 2**_SHIFT).astype(np.int32)
    shapes = [fixed[start:end] for start, end in itertools.pairwise([0, *ends])]
    if not width:
        cv2.fillPoly(mask, shapes, 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    else:
        thickness = max(1, round(width * DOWN))
        cv2.polylines(mask, shapes, False, 255, thickness=thickness, lineType=cv2.LINE_AA, shift=_SHIFT)
    return mask


@functools.cache
def noise(kind: str) -> np.ndarray:
    """Return a noise texture, (320, 480) float32, of mean 0 and standard deviation 1.

    `kind` is "strands" (stretched downwards), "curls" or "grain".
    """
    seed, across, down = {"strands": (7, 0.8, 14.0), "curls": (8, 2.4, 2.4), "grain": (9, 0.7, 0.7)}[kind]
    raw = np.random.default_rng(seed).standard_normal(_NOISE_SIZE).astype(np.float32)
    soft = cv2.GaussianBlur(raw, (0, 0), across, sigmaY=down, borderType=cv2.BORDER_REFLECT)
    return (soft - soft.mean()) / soft.std()


def curve(points: list[tuple[float, float]], count: int = 13) -> np.ndarray:
    """Return a smooth (Catmull-Rom) curve through the points, (count, 2)."""
    return _spline(len(points), count) @ np.array(points, np.float64)


@functools.cache
def _spline(points: int, count: int) -> np.ndarray:
    """Return the matrix (count, points) that turns points into a curve."""
    p = np.eye(points)
    # Continue the curve in a straight line beyond both ends, by one point each.
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    at = np.linspace(0, points - 1, count)
    index = np.minimum(at.astype(int), points - 2)
    t = (at - index)[:, None]
    a, b, c, d = (p[index + k] for k in range(4))  # the four control points around each sample
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def ellipse(x: float, y: float, wide: float, high: float, count: int = 20) -> np.ndarray:
    """Return an ellipse as a polygon, (count, 2)."""
    return _circle(count) * (wide, high) + (x, y)


@functools.cache
def _circle(count: int) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def arch(half: float, ends: float, middle: float, flank: float | None = None) -> np.ndarray:
    """Return a symmetric curve from (-half, ends) over (0, middle) to (half, ends), (17, 2).

    The curve passes the height `flank` at half the width.
    """
    if flank is None:
        flank = ends + 0.75 * (middle - ends)
    return curve([(-half, ends), (-half / 2, flank), (0, middle), (half / 2, flank), (half, ends)], 17)
