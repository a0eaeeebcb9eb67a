import cv2
import numpy as np
import pytest

from applications.align import align
from applications.align.warp import similarity
from util import face

ARCFACE_TEMPLATE = np.array(face.ARCFACE_TEMPLATE)


def moved(points: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    angle = np.radians(degrees)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * points @ rotation.T + shift


def test_similarity_matches_reference_matrices(golden):
    reference = np.load(golden / "similarity.npz")
    for landmarks, matrix in zip(reference["landmarks"], reference["matrices"], strict=True):
        np.testing.assert_allclose(similarity(landmarks, reference["reference"]), matrix, atol=1e-4)
    np.testing.assert_allclose(ARCFACE_TEMPLATE, reference["reference"], atol=1e-4)


def test_similarity_recovers_exact_transform():
    landmarks = moved(ARCFACE_TEMPLATE, degrees=25, scale=3.5, shift=(70, -20))
    matrix = similarity(landmarks, ARCFACE_TEMPLATE)
    np.testing.assert_allclose(landmarks @ matrix[:, :2].T + matrix[:, 2], ARCFACE_TEMPLATE, atol=1e-9)
    assert np.linalg.det(matrix[:, :2]) == pytest.approx(1 / 3.5**2)


def test_similarity_minimizes_errors_in_the_photograph():
    """Solve for the four numbers of the transform from the template to the landmarks, by linear least squares."""
    landmarks = moved(ARCFACE_TEMPLATE, -10, 2.0, (30, 40)) + np.random.default_rng(1).normal(0, 4, (5, 2))
    x, y = ARCFACE_TEMPLATE.T
    ones, none = np.ones(5), np.zeros(5)
    equations = np.vstack([np.stack([x, -y, ones, none], axis=1), np.stack([y, x, none, ones], axis=1)])
    a, b, shift_x, shift_y = np.linalg.lstsq(equations, landmarks.T.reshape(-1), rcond=None)[0]
    inverse = cv2.invertAffineTransform(np.array([[a, -b, shift_x], [b, a, shift_y]]))
    np.testing.assert_allclose(similarity(landmarks, ARCFACE_TEMPLATE), inverse, atol=1e-9)


def test_similarity_has_no_reflection():
    mirrored = ARCFACE_TEMPLATE * [-1, 1] + [112, 0]
    matrix = similarity(mirrored, ARCFACE_TEMPLATE)
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize("size", [112, 64, 224])
def test_align_scales_the_template_with_the_size(size):
    landmarks = moved(ARCFACE_TEMPLATE, 8, 1.3, (20, 30))
    canvas = np.zeros((260, 260, 3), np.uint8)
    for point in np.rint(landmarks).astype(int):
        cv2.circle(canvas, point.tolist(), 3, (255, 255, 255), -1)
    aligned = align(canvas, landmarks, size)
    assert aligned.shape == (size, size, 3) and aligned.dtype == np.uint8
    for x, y in np.rint(ARCFACE_TEMPLATE * size / 112).astype(int):
        assert aligned[y, x].min() > 200


def test_align_outside_of_the_photograph_is_black():
    aligned = align(np.full((60, 60, 3), 200, np.uint8), ARCFACE_TEMPLATE)
    assert (aligned[:59, :59] == 200).all() and (aligned[61:] == 0).all() and (aligned[:, 61:] == 0).all()


@pytest.mark.parametrize("scale", [2.5, 3.7, 8.5])
def test_align_averages_large_faces(scale):
    """Check that a fine pattern of black and white becomes grey, and that a ramp stays in place."""
    landmarks = moved(ARCFACE_TEMPLATE, 0, scale, (40, 60))
    pattern = (np.indices((1000, 1000)).sum(axis=0) % 2 * 255).astype(np.uint8)
    aligned = align(np.repeat(pattern[:, :, None], 3, axis=2), landmarks)
    inner = aligned[2:100, 2:100]
    assert np.abs(inner.astype(int) - 127).max() <= (60 if scale == 3.7 else 2)  # a factor of 3 leaves 1 of 9
    ramp = np.repeat(np.linspace(0, 255, 1000).astype(np.uint8)[None, :, None], 1000, axis=0).repeat(3, axis=2)
    x = np.arange(10, 100)
    expected = (scale * x + 40) * 255 / 999
    np.testing.assert_allclose(align(ramp, landmarks)[50, 10:100, 0], expected, atol=1.5)


def test_align_large_face_at_the_edge_is_black_outside():
    landmarks = moved(ARCFACE_TEMPLATE, 0, 4.0, (-200, -200))
    aligned = align(np.full((300, 300, 3), 200, np.uint8), landmarks)
    assert (aligned[:48] == 0).all() and (aligned[52:100, 52:100] == 200).all()


def test_similarity_refuses_landmarks_on_one_point():
    with pytest.raises(ValueError, match="one point"):
        similarity(np.full((5, 2), 7.0), ARCFACE_TEMPLATE)
