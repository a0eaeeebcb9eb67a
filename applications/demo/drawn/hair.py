"""Hair and beard, laid over the pixels of the view, finer than the texture of the skin."""

import cv2
import numpy as np

from applications.demo.drawn.canvas import ACROSS, DOWN, noise
from applications.demo.drawn.paint import hair_color
from applications.demo.drawn.shape import Head, smoothstep


def comb(
    image: np.ndarray, head: Head, column: np.ndarray, row: np.ndarray, hair: np.ndarray, beard: np.ndarray
) -> np.ndarray:
    """Lays beard and hair over `image`, (h, w, 3) float32 without light, in place; returns how much of the skin shines.

    `column` and `row` say which point of the mesh each pixel shows, `hair` and `beard` are Head's fields there; all
    of them, and what is returned (0 to 1), are (h, w) float32.
    """
    p = head.person
    bare = np.ones_like(hair)
    strength = max(p.beard, 0) + (0.3 if p.moustache > 0.25 else 0)
    if p.feminine < 0 and strength > 0.3:
        grain = 0.6 * _pattern("grain", column, row) + 0.5 * _pattern("strands", column, row)
        weight = np.clip(beard * (0.95 + 0.3 * grain) * min(strength * 1.5, 1), 0, 0.93)
        _lay(image, hair_color(head, grey_shift=-3) * 0.85, weight, 1 + 0.12 * grain)
        bare -= weight
    curl = min(max(p.curl, 0), 1)
    column = column + np.float32(head.first + 16 * p.parting + 9 * p.widow)  # each person has strands of their own
    strands = (1 - 0.8 * curl) * _pattern("strands", column, row)
    if curl > 0:
        strands += curl * _pattern("curls", column, row)
    thin = 1 - 0.25 * max(p.balding, 0) * max(head.ageing, 0)
    weight = np.clip((hair + strands * (0.6 + 0.5 * curl)) * 0.6 + 0.5, 0, 1) * thin
    gloss = 0.22 * np.exp(-(((hair - 7.5) / 3.5) ** 2)) * (1 - 0.6 * curl)
    tone = (0.72 + 0.28 * smoothstep((hair + 3) / 9) + gloss) * (1 + 0.13 * strands)
    _lay(image, hair_color(head), weight, tone)
    return bare * (1 - 0.8 * weight)


def _pattern(kind: str, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The noise at each pixel; beyond its edges it is mirrored."""
    return cv2.remap(noise(kind), column * ACROSS, row * DOWN, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _lay(image: np.ndarray, color: np.ndarray, weight: np.ndarray, tone: np.ndarray) -> None:
    """Image + weight * (tone * colour - image), channel by channel."""
    for channel in range(3):
        below = image[:, :, channel]
        below += weight * (tone * np.float32(color[channel]) - below)
