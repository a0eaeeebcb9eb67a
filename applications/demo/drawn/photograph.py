"""Make photographs of rendered faces before alignment: tilted, of any size, anywhere in the picture."""

import math

import cv2
import numpy as np

SIZE = (300, 400)  # height and width
_FRAME = 5  # pixels of the white edge of a print
_CUT = 3  # pixels cut from each side of a face: its outermost pixels are repetitions of others


def photograph(faces: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return prints of the faces, (112, 112, 3) each, on a table: (300, 400, 3) RGB uint8. The first is the largest."""
    # A smooth surface of one color with light and shade on it.
    shade = cv2.resize(rng.uniform(0.7, 1.1, (3, 4)).astype(np.float32), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    picture = shade[:, :, None] * rng.uniform(60, 190, 3).astype(np.float32)
    for number, face in enumerate(faces):
        scale = rng.uniform(1.2, 1.9) if number == 0 else rng.uniform(0.6, 0.9)
        # One face lies in the middle; of two, the first lies on the left and the second on the right.
        fraction = 0.5 if len(faces) == 1 else (0.33, 0.8)[number]
        center = np.array([fraction * SIZE[1], SIZE[0] / 2]) + rng.uniform(-20, 20, 2)
        _add_print(picture, face, scale=scale, angle=math.radians(rng.uniform(-25, 25)), center=center)
    return np.clip(np.rint(picture + rng.normal(0, 2, picture.shape)), 0, 255).astype(np.uint8)


def _add_print(picture: np.ndarray, face: np.ndarray, scale: float, angle: float, center: np.ndarray) -> None:
    """Add a print of a face at `center` (x, y), turned by `angle` in radians, with its shadow."""
    inner = face[_CUT:-_CUT, _CUT:-_CUT].astype(np.float32)
    sheet = cv2.copyMakeBorder(
        inner, _FRAME, _FRAME, left=_FRAME, right=_FRAME, borderType=cv2.BORDER_CONSTANT, value=(245, 245, 240)
    )
    # Scale and turn about the middle of the sheet, and move its middle to `center`.
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle = np.array([sheet.shape[1] - 1, sheet.shape[0] - 1]) / 2
    matrix = np.hstack([turn, (center - turn @ middle)[:, None]])
    cover = cv2.warpAffine(np.ones(sheet.shape[:2], np.float32), matrix, SIZE[::-1])[:, :, None]
    shadow = cv2.GaussianBlur(np.roll(cover[:, :, 0], (4, 3), axis=(0, 1)), (0, 0), 4)[:, :, None]
    picture *= 1 - 0.4 * shadow
    laid = cv2.warpAffine(sheet, matrix, SIZE[::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    picture += (laid - picture) * cover
