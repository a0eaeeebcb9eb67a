import numpy as np
import pytest

from applications.align.boxes import calibrate, distance_to_center, square, suppress


def random_boxes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 100, (count, 2))
    boxes = np.hstack([start, start + rng.uniform(5, 60, (count, 2))])
    return boxes, rng.permutation(count) / count, rng.integers(0, 4, count)


def overlap(a: np.ndarray, b: np.ndarray, of_smaller: bool) -> float:
    """As counted in pixels, both ends of a box inside."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(width, 0) * max(height, 0)
    area_a, area_b = (a[2] - a[0] + 1) * (a[3] - a[1] + 1), (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return shared / (min(area_a, area_b) if of_smaller else area_a + area_b - shared)


def suppress_slowly(boxes, scores, groups, threshold, of_smaller) -> list[int]:
    kept = []
    for index in sorted(range(len(boxes)), key=lambda index: -scores[index]):
        rivals = [other for other in kept if groups[other] == groups[index]]
        if all(overlap(boxes[index], boxes[other], of_smaller) <= threshold for other in rivals):
            kept.append(index)
    return sorted(kept)


@pytest.mark.parametrize("of_smaller", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_suppress_matches_slow_reference(threshold, of_smaller, seed):
    boxes, scores, groups = random_boxes(80, seed)
    kept = suppress(boxes, scores, groups, threshold, of_smaller)
    assert kept.tolist() == suppress_slowly(boxes, scores, groups, threshold, of_smaller)
    assert 0 < len(kept) < 80 or threshold == 0.7


def test_suppress_without_boxes():
    assert suppress(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), 0.5).tolist() == []


def test_suppress_keeps_boxes_of_other_groups():
    boxes = np.array([[0.0, 0, 9, 9]] * 3)
    assert suppress(boxes, np.array([0.7, 0.9, 0.8]), np.array([0, 1, 0]), 0.5).tolist() == [1, 2]


def test_calibrate_offsets_are_fractions_of_the_size():
    moved = calibrate(np.array([[10.0, 20, 19, 39]]), np.array([[0.1, 0.1, -0.2, 0.5]]))
    np.testing.assert_allclose(moved, [[11, 22, 17, 49]])


def test_square_keeps_longer_side_and_center():
    squares = square(np.array([[10.0, 20, 19, 39], [0, 0, 29, 9], [5, 5, 8, 8]]))
    np.testing.assert_allclose(squares, [[5, 20, 24, 39], [0, -10, 29, 19], [5, 5, 8, 8]])


def test_distance_to_center_of_the_image():
    boxes = np.array([[40.0, 20, 60, 30], [40, 10, 60, 20]])
    np.testing.assert_allclose(distance_to_center(boxes, width=100, height=50), [0, 10])
