"""What happens to pixels between the decoder and the network: one definition each, all on RGB uint8 (H, W, 3).

`normalize` is the only place where pixels become floats for a face recognition network.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from util.face import CROP_FROM, FACE_SIZE

_LUMA = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue in a gray level (ITU-R BT.601)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Turn pixels into floats: (N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1].

    Pixels become floats here and nowhere else, on the device of the images. The result is in channels_last memory
    order, so the layout is not copied.
    """
    return images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Undo normalize(): (N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8."""
    return (images * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def train_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Resize a square image to 128x128, cut a random 112x112 window and flip it with probability 0.5."""
    down, right, flip = rng.random(3).tolist()  # one call: each costs as much as cutting the window
    top = int(down * (CROP_FROM - FACE_SIZE + 1))
    left = int(right * (CROP_FROM - FACE_SIZE + 1))
    resized = cv2.resize(image, (CROP_FROM, CROP_FROM), interpolation=cv2.INTER_LINEAR)
    crop = resized[top : top + FACE_SIZE, left : left + FACE_SIZE]
    return cv2.flip(crop, 1) if flip < 0.5 else crop  # a view of reversed columns would be slow to copy


def train_full(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Show all of a square image, (S, S, 3) -> (112, 112, 3), and flip it with probability 0.5."""
    shown = full_crop(image)
    return cv2.flip(shown, 1) if rng.random() < 0.5 else shown


def train_warp(image: np.ndarray, rng: np.random.Generator, full: bool = False) -> np.ndarray:
    """Augment a square image strongly, for sets of few images: (S, S, 3) -> (112, 112, 3) uint8.

    Rotation up to 12 degrees, scale 0.95 to 1.25 (the plain crop has 1.14), shift up to 8 pixels, flip; brightness,
    contrast and color jitter; sometimes gray, blurred, or with a rectangle erased. A face stays recognizable. With
    `full`, the scale is 1.14 times smaller: around the one of complete faces.
    """
    angle = rng.uniform(-12, 12)
    scale = rng.uniform(0.95, 1.25) * FACE_SIZE / image.shape[0]
    if full:
        scale *= FACE_SIZE / CROP_FROM
    # Rotate and scale around the center, move the center to the center of the crop, then shift.
    matrix = cv2.getRotationMatrix2D(((image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2), angle, scale)
    matrix[:, 2] += (FACE_SIZE - image.shape[0]) / 2 + rng.uniform(-8, 8, size=2)
    if rng.random() < 0.5:
        matrix[0] = [0, 0, FACE_SIZE - 1] - matrix[0]  # flip: x -> 111 - x
    warped = cv2.warpAffine(
        image, matrix, (FACE_SIZE, FACE_SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    warped = _jitter_color(warped, rng)
    if rng.random() < 0.15:
        warped = cv2.GaussianBlur(warped, (0, 0), rng.uniform(0.5, 1.8))
    return _erase(warped, rng) if rng.random() < 0.4 else warped


def _jitter_color(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change contrast around middle gray and color balance, brightness, then saturation, in one matrix."""
    overall, *balance = rng.random(4).tolist()
    contrast = (0.7 + 0.6 * overall) * (0.9 + 0.2 * np.array(balance))  # (3,), one for each color
    offset = 127.5 * (1 - contrast) + rng.uniform(-30, 30)
    color = 0.0 if rng.random() < 0.15 else rng.uniform(0.6, 1.2)  # 0 is gray, 1 leaves the saturation
    saturate = color * np.eye(3) + (1 - color) * _LUMA  # (3, 3)
    # saturate @ (contrast * pixel + offset), as the affine map (3, 4) that OpenCV applies to each pixel.
    matrix = np.empty((3, 4))
    matrix[:, :3] = saturate * contrast
    matrix[:, 3] = saturate @ offset
    return cv2.transform(image, matrix)


def _erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fill a random rectangle of the image with one random color, in place."""
    height, width = rng.integers(FACE_SIZE // 6, FACE_SIZE // 2, size=2).tolist()
    top, left = rng.integers(0, FACE_SIZE - height + 1), rng.integers(0, FACE_SIZE - width + 1)
    image[top : top + height, left : left + width] = rng.integers(0, 256, size=3)
    return image


def eval_crop(images: np.ndarray) -> np.ndarray:
    """Crop images for evaluation as face.evoLVe does: bilinear to 128x128, then the center 112x112.

    (H, W, 3) or (N, H, W, 3) uint8 -> (112, 112, 3) or (N, 112, 112, 3) uint8.
    """
    if images.ndim == 3:
        return eval_crop(images[None])[0]
    start = (CROP_FROM - FACE_SIZE) // 2
    window = slice(start, start + FACE_SIZE)
    crops = np.empty((len(images), FACE_SIZE, FACE_SIZE, 3), np.uint8)
    for crop, image in zip(crops, images, strict=True):
        crop[:] = cv2.resize(image, (CROP_FROM, CROP_FROM), interpolation=cv2.INTER_LINEAR)[window, window]
    return crops


def full_crop(images: np.ndarray) -> np.ndarray:
    """Show all of the images, (H, W, 3) or (N, H, W, 3) uint8: bilinear to 112x112 if they have another size."""
    if images.ndim == 4:
        return np.stack([full_crop(image) for image in images]) if len(images) else images
    if images.shape[:2] != (FACE_SIZE, FACE_SIZE):
        images = cv2.resize(images, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_LINEAR)
    return images


# By the names in util.face.CROPS.
TRAIN_CROPS = {"128": train_crop, "whole": train_full}
EVAL_CROPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"128": eval_crop, "whole": full_crop}


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Resample (H, W, 3) or (N, H, W, 3) uint8 images to size x size: Pillow's bicubic with antialiasing."""
    return _resample(images, size)


def degrade(images: np.ndarray, size: int) -> np.ndarray:
    """Simulate low resolution: bicubic down to size x size and up again, like Pillow.

    (H, W, 3) or (N, H, W, 3) uint8, H = W -> the same shape and type. Scale s of the command line is size 112 // s.
    """
    return _resample(shrink(images, size), images.shape[-2])


def _resample(images: np.ndarray, size: int) -> np.ndarray:
    """Resample with torch's kernel for bytes: columns first, each pass rounded to integers, like Pillow."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    batch = pixels if pixels.ndim == 4 else pixels[None]  # by torch: numpy's strides would lead to a slow layout
    resized = F.interpolate(batch.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy()).reshape(*images.shape[:-3], size, size, 3)
