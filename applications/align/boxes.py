"""Operations on boxes of faces, (N, 4) x1 y1 x2 y2 in pixels.

Both ends belong to the box, as in the original MTCNN: the width is x2 - x1 + 1.
"""

import numpy as np


def sizes(boxes: np.ndarray) -> np.ndarray:
    """Return (N, 2) widths and heights."""
    return boxes[:, 2:] - boxes[:, :2] + 1


def suppress(
    boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, threshold: float, of_smaller: bool = False
) -> np.ndarray:
    """Return the ascending indices of the boxes that non-maximum suppression keeps in each of the groups (N,).

    A box is removed if its overlap with a kept box of its group is above the threshold: the intersection divided by
    the union or, with `of_smaller`, by the area of the smaller box.
    """
    areas = sizes(boxes).prod(axis=1)
    left = np.lexsort((-scores, groups))  # the boxes not yet decided, by group and falling score
    kept = [left[:0]]
    # Each round keeps the best box of every group and removes the boxes that overlap with it.
    while len(left):
        is_best = np.r_[True, np.diff(groups[left]) != 0]
        best = left[is_best][np.cumsum(is_best) - 1]  # for each box, the best box of its group
        kept.append(left[is_best])
        low = np.maximum(boxes[left, :2], boxes[best, :2])
        high = np.minimum(boxes[left, 2:], boxes[best, 2:])
        intersection = np.clip(high - low + 1, 0, None).prod(axis=1)
        union = areas[left] + areas[best] - intersection
        reference = np.minimum(areas[left], areas[best]) if of_smaller else union
        left = left[(intersection <= threshold * reference) & ~is_best]
    return np.sort(np.concatenate(kept))


def calibrate(boxes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Move the four sides by `offsets` (N, 4), which are fractions of the width and height."""
    return boxes + np.tile(sizes(boxes), 2) * offsets


def square(boxes: np.ndarray) -> np.ndarray:
    """Return squares with the longer side and the center of each box, rounded to integer pixels."""
    size = sizes(boxes)
    side = size.max(axis=1, keepdims=True)
    start = boxes[:, :2] + (size - side) / 2
    return np.round(np.hstack([start, start + side - 1]))


def distance_to_center(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return (N,) distances in pixels from the centers of the boxes to the center of a width x height image."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.linalg.norm(centers - np.array([width, height]) / 2, axis=1)
