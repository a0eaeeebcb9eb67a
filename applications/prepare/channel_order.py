"""Detect by the color of skin whether an aligned face was stored with red and blue swapped.

Skin of any tone reflects more red light than blue. In the middle of an aligned face, from the eyes to the mouth and
between the outer corners of the eyes, red exceeds blue by 64 of 255 levels in the median of 6,922 aligned faces of LFW.
With the rule below, one of these faces counts as swapped, and 3 do not when they are.
"""

import numpy as np

# Rows and columns of the middle of the face, as fractions of the image.
_ROWS = (45 / 112, 95 / 112)
_COLUMNS = (30 / 112, 82 / 112)
# Red and blue must differ by this number of levels. Grey images, and images with an even color cast, are undecided.
MARGIN = 5.0
RIGHT, UNDECIDED, SWAPPED = 0, 1, 2
# A set counts as swapped if more than half of its decided images are, and at least this number is decided.
MIN_DECIDED = 10


def classify_channel_order(image: np.ndarray) -> int:
    """Return RIGHT, UNDECIDED or SWAPPED for an aligned face, (H, W, 3) RGB uint8."""
    height, width = image.shape[:2]
    rows = slice(round(_ROWS[0] * height), round(_ROWS[1] * height))
    columns = slice(round(_COLUMNS[0] * width), round(_COLUMNS[1] * width))
    red, _, blue = image[rows, columns].reshape(-1, 3).mean(axis=0)
    if red - blue > MARGIN:
        return RIGHT
    return SWAPPED if red - blue < -MARGIN else UNDECIDED


def describe_channel_order(orders: np.ndarray) -> tuple[str, str]:
    """Return a fact and a warning, which may be empty, about the channel orders (N,) of the images of a set."""
    right, undecided, swapped = (int((orders == kind).sum()) for kind in (RIGHT, UNDECIDED, SWAPPED))
    decided = right + swapped
    fact = f"colors: {right} like skin, {swapped} as if red and blue were swapped, {undecided} undecided (grey)"
    warning = ""
    if decided >= MIN_DECIDED and swapped > right:
        warning = "red and blue look swapped (BGR instead of RGB) in the whole set. Exchange them and make it again"
    elif decided >= MIN_DECIDED and swapped > max(1, 0.01 * decided):
        warning = f"red and blue look swapped in {swapped} images. Look at the first of them"
    return fact, warning
