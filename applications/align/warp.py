"""Align a face by its five landmarks: fit the similarity transform to ArcFace's template, and warp the image."""

import cv2
import numpy as np

from util.face import ARCFACE_TEMPLATE, FACE_SIZE


def similarity(landmarks: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Return the (2, 3) float64 matrix M of the similarity transform from `landmarks` to `template`, both (N, 2).

    template is close to landmarks @ M[:, :2].T + M[:, 2], without reflection. The transform is fitted from the template
    to the landmarks (least squares, Umeyama 1991) and then inverted, so the errors in the photograph are minimized.
    MATLAB's cp2tform, which aligned the published training and verification sets, does the same. Fitting in the
    other direction gives faces that are about 1 % smaller.

    Raises ValueError if all landmarks lie on one point.
    """
    return cv2.invertAffineTransform(_umeyama(np.asarray(template, np.float64), np.asarray(landmarks, np.float64)))


def _umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return M with the least squares of target - (source @ M[:, :2].T + M[:, 2]).

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991, equations 34 to
    42. skimage's SimilarityTransform agrees to 1e-13, but rounds differently: single pixels of a face would change.
    """
    source_mean = source.mean(axis=0)
    target_mean = target.mean(axis=0)
    centered_source = source - source_mean
    centered_target = target - target_mean
    u, singular, v = np.linalg.svd(centered_target.T @ centered_source)
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])  # excludes a reflection
    scale = singular @ signs / (centered_source**2).sum()
    if not scale > 0:
        raise ValueError("landmarks that lie on one point have no direction and no size")
    matrix = scale * (u * signs) @ v
    return np.hstack([matrix, (target_mean - matrix @ source_mean)[:, None]])


def align(image: np.ndarray, landmarks: np.ndarray, size: int = FACE_SIZE) -> np.ndarray:
    """Return the upright face with the given landmarks, (size, size, 3), black outside the image.

    The image is (H, W, 3) uint8; the landmarks are (5, 2) x, y in pixels: eyes, nose, corners of the mouth. The image
    is sampled bilinearly. A face that is more than twice as large as the result is first averaged down by an integer
    factor, because bilinear sampling alone would skip pixels.
    """
    matrix = similarity(landmarks, np.array(ARCFACE_TEMPLATE) * size / FACE_SIZE)
    factor = int(1 / np.linalg.norm(matrix[0, :2]))
    if factor >= 2:
        image, matrix = _average_down(image, matrix, factor, size)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)


def _average_down(image: np.ndarray, matrix: np.ndarray, factor: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of the image that the warp needs, `factor` times smaller, and the matrix for it."""
    # The corners of the result, in pixels (x, y) of the image.
    inverse = cv2.invertAffineTransform(matrix)
    corners = np.array([[0, 0, 1], [size, 0, 1], [0, size, 1], [size, size, 1]]) @ inverse.T
    # The rectangle around them with a margin, extended to complete blocks of factor x factor pixels.
    limit = np.array(image.shape[1::-1])
    start = np.clip(np.floor(corners.min(axis=0)) - 2 * factor, 0, limit).astype(int)
    stop = np.clip(np.ceil(corners.max(axis=0)) + 2 * factor, 0, limit).astype(int)
    stop = start + np.maximum((stop - start) // factor, 1) * factor
    stop = np.minimum(stop, limit)
    part = image[start[1] : stop[1], start[0] : stop[0]]
    if min(part.shape[:2]) < factor:
        return image, matrix
    small = cv2.resize(part, (part.shape[1] // factor, part.shape[0] // factor), interpolation=cv2.INTER_AREA)
    # Pixel k of `small` is the mean of pixels start + k * factor and the next factor - 1: its center lies between them.
    shift = matrix[:, :2] @ (start + (factor - 1) / 2) + matrix[:, 2]
    return small, np.hstack([matrix[:, :2] * factor, shift[:, None]])
