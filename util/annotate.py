"""Draw faces that were found onto images, all (H, W, 3) RGB uint8."""

from functools import cache
from typing import Any

import cv2
import numpy as np

GREEN, ORANGE, INK, PAPER = (40, 200, 90), (240, 150, 30), (40, 40, 40), (250, 250, 250)


@cache
def _font() -> Any:
    return cv2.FontFace("sans")  # of OpenCV 5; it has Korean, Chinese and Japanese characters


def text_size(text: str, size: int) -> tuple[int, int]:
    """Return width and height of a line of text whose letters are `size` pixels high."""
    (_, _, width, height) = cv2.getTextSize((0, 0), text, (0, 0), _font(), size)
    return width, height


def draw_text(image: np.ndarray, text: str, left: int, bottom: int, size: int, color: tuple[int, int, int]) -> None:
    """Draw a line of text on an image, with its base line at `bottom`."""
    cv2.putText(image, text, (left, bottom), color, _font(), size)


def draw_face(
    image: np.ndarray,
    box: np.ndarray,
    landmarks: np.ndarray,
    label: str = "",
    color: tuple[int, int, int] = GREEN,
) -> None:
    """Draw the box, the landmarks and a label on an image, in place.

    Args:
        image: (H, W, 3) RGB uint8.
        box: (4,) x1 y1 x2 y2 in pixels.
        landmarks: (5, 2) x, y in pixels.
        label: a line of text above the box, or inside it at the upper edge of the image.
        color: RGB.
    """
    width = image.shape[1]
    scale = max(image.shape[:2]) / 600
    thick = max(1, round(2 * scale))
    left, top, right, bottom = np.rint(box).astype(int).tolist()
    cv2.rectangle(image, (left, top), (right, bottom), color, thickness=thick, lineType=cv2.LINE_AA)
    for point in np.rint(landmarks).astype(int).tolist():
        cv2.circle(image, point, radius=max(2, thick), color=color, thickness=-1, lineType=cv2.LINE_AA)
    if label:
        size = max(12, round(18 * scale))
        text_width, _ = text_size(label, size)
        bar = round(1.4 * size)
        start = min(max(0, left), max(0, width - text_width - size // 2))
        base = top if top >= bar else max(top, 0) + bar
        cv2.rectangle(image, (start, base - bar), (start + text_width + size // 2, base), color, thickness=-1)
        draw_text(image, label, start + size // 4, base - round(0.35 * size), size, INK)
