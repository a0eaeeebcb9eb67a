"""Tells whether an aligned face was stored with red and blue swapped, by the colour of its skin.

Skin, of whatever tone, sends back more red light than blue. In the middle of an aligned face, from the eyes to the
mouth and between the outer corners of the eyes, red is above blue by 64 of 255 levels in the median of 6,922 aligned
faces of LFW. By the rule below, one of them counts as swapped, and 3 do not when they are.
"""

import numpy as np

# Rows and columns of the middle of the face, as parts of the image.
_ROWS, _COLUMNS = (45 / 112, 95 / 112), (30 / 112, 82 / 112)
# Levels by which red and blue must differ for a statement. Grey images, and those with an even colour cast, are below.
MARGIN = 5.0
RIGHT, UNDECIDED, SWAPPED = 0, 1, 2
# A set counts as swapped if more than half of at least so many images that can be judged are.
LEAST = 10


def judge(image: np.ndarray) -> int:
    """RIGHT, UNDECIDED or SWAPPED for an aligned face, (H, W, 3) RGB uint8."""
    height, width = image.shape[:2]
    rows, columns = (slice(round(a * n), round(b * n)) for (a, b), n in ((_ROWS, height), (_COLUMNS, width)))
    red, _, blue = image[rows, columns].reshape(-1, 3).mean(axis=0)
    return SWAPPED if red - blue < -MARGIN else RIGHT if red - blue > MARGIN else UNDECIDED


def describe(judged: np.ndarray) -> tuple[str, str]:
    """A fact and a warning, which may be empty, about the judgements (N,) on the images of a set."""
    right, undecided, swapped = (int((judged == kind).sum()) for kind in (RIGHT, UNDECIDED, SWAPPED))
    fact = f"colours: {right} like skin, {swapped} as if red and blue were swapped, {undecided} undecided (grey)"
    if right + swapped >= LEAST and swapped > right:
        return fact, "red and blue look swapped (BGR instead of RGB) in the whole set; make it anew with them exchanged"
    if right + swapped >= LEAST and swapped > max(1, 0.01 * (right + swapped)):
        return fact, f"red and blue look swapped in {swapped} images; look at the first of them"
    return fact, ""
