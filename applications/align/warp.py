"""From five landmarks to an aligned face: the similarity transform to ArcFace's template, and the warp."""

import cv2
import numpy as np

from util.face import ARCFACE_TEMPLATE, FACE_SIZE


def similarity(landmarks: np.ndarray, template: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift, without reflection, from `landmarks` to `template`, both (N, 2).

    -> (2, 3) float64: template ≈ landmarks @ M[:, :2].T + M[:, 2]. Fitted from the template to the landmarks and then
    inverted, as MATLAB's cp2tform does, which aligned the published training and verification sets: the errors that are
    made small are those in the photograph. The other direction gives faces about 1 % smaller.
    Raises ValueError where the landmarks have no direction and no size.
    """
    return cv2.invertAffineTransform(_umeyama(np.asarray(template, np.float64), np.asarray(landmarks, np.float64)))


def _umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares of target ≈ source @ M[:, :2].T + M[:, 2]: Umeyama, "Least-squares estimation of transformation
    parameters between two point patterns", 1991, equations 34 to 42."""
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    source_part, target_part = source - source_mean, target - target_mean
    u, singular, v = np.linalg.svd(target_part.T @ source_part)
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    scale = singular @ signs / (source_part**2).sum()
    if not scale > 0:
        raise ValueError("landmarks that lie on one point have no direction and no size")
    matrix = scale * (u * signs) @ v
    return np.hstack([matrix, (target_mean - matrix @ source_mean)[:, None]])


def align(image: np.ndarray, landmarks: np.ndarray, size: int = FACE_SIZE) -> np.ndarray:
    """The face whose (5, 2) landmarks are given, upright: (H, W, 3) RGB uint8 -> (size, size, 3).

    Bilinear; black where it reaches outside of the image. A face more than twice as large as it will be is first
    averaged down by a whole factor, since bilinear sampling alone would skip pixels.
    """
    matrix = similarity(landmarks, ARCFACE_TEMPLATE * size / FACE_SIZE)
    factor = int(1 / np.linalg.norm(matrix[0, :2]))
    if factor >= 2:
        image, matrix = _averaged(image, matrix, factor, size)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)


def _averaged(image: np.ndarray, matrix: np.ndarray, factor: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of the image that the warp needs, smaller by `factor`, and the matrix that belongs to it."""
    inverse = cv2.invertAffineTransform(matrix)
    corners = np.array([[0, 0, 1], [size, 0, 1], [0, size, 1], [size, size, 1]]) @ inverse.T
    limit = np.array(image.shape[1::-1])
    start = np.clip(np.floor(corners.min(axis=0)) - 2 * factor, 0, limit).astype(int)
    stop = np.clip(np.ceil(corners.max(axis=0)) + 2 * factor, 0, limit).astype(int)
    stop = start + np.maximum((stop - start) // factor, 1) * factor  # whole blocks
    stop = np.minimum(stop, limit)
    part = image[start[1] : stop[1], start[0] : stop[0]]
    if min(part.shape[:2]) < factor:
        return image, matrix
    small = cv2.resize(part, (part.shape[1] // factor, part.shape[0] // factor), interpolation=cv2.INTER_AREA)
    # Pixel k of `small` is the mean of pixels start + k * factor and the next factor - 1: its centre lies between them.
    shift = matrix[:, :2] @ (start + (factor - 1) / 2) + matrix[:, 2]
    return small, np.hstack([matrix[:, :2] * factor, shift[:, None]])
