"""Boxes of faces, (N, 4) x1 y1 x2 y2 in pixels, both ends inside as in the original MTCNN: widths are x2 - x1 + 1."""

import numpy as np


def sizes(boxes: np.ndarray) -> np.ndarray:
    """(N, 2) width and height."""
    return boxes[:, 2:] - boxes[:, :2] + 1


def suppress(
    boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, threshold: float, of_smaller: bool = False
) -> np.ndarray:
    """Non-maximum suppression within each group of boxes: ascending indices of those that stay.

    The box with the highest score stays, and those of its group go whose overlap with it is above the threshold; then
    the highest of the rest, and so on. The overlap is the intersection over the union, or over the smaller of the two.
    All groups are worked on at once: a round takes the best box of each.
    """
    left, (width, height) = np.lexsort((-scores, groups)), sizes(boxes).T
    areas = width * height
    kept = [left[:0]]
    while len(left):
        starts = np.r_[True, np.diff(groups[left]) != 0]
        best = left[starts][np.cumsum(starts) - 1]  # for each box that is left, the best of its group
        kept.append(left[starts])
        low, high = np.maximum(boxes[left, :2], boxes[best, :2]), np.minimum(boxes[left, 2:], boxes[best, 2:])
        shared = np.clip(high - low + 1, 0, None).prod(axis=1)
        smaller = np.minimum(areas[left], areas[best])
        whole = smaller if of_smaller else areas[left] + areas[best] - shared
        left = left[(shared <= threshold * whole) & ~starts]
    return np.sort(np.concatenate(kept))


def calibrate(boxes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Moves the four sides by `offsets` (N, 4), shares of the width and height."""
    return boxes + np.tile(sizes(boxes), 2) * offsets


def square(boxes: np.ndarray) -> np.ndarray:
    """The square of the longer side around the same centre, in whole pixels."""
    size = sizes(boxes)
    side = size.max(axis=1, keepdims=True)
    start = boxes[:, :2] + (size - side) / 2
    return np.round(np.hstack([start, start + side - 1]))


def distance_to_center(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """(N,) distance in pixels between the centres of the boxes and that of the image."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.linalg.norm(centers - np.array([width, height]) / 2, axis=1)
