"""What happens to pixels between the decoder and the network: one definition each, all on RGB uint8 (H, W, 3).

`normalise` is the only place where pixels become floats.
"""

import cv2
import numpy as np
import torch
from torch.nn import functional as F

SIZE = 112  # what the networks see
RESIZED = 128  # what crops are cut from
_LUMA = np.array([0.299, 0.587, 0.114])  # how red, green and blue add up to grey (ITU-R BT.601)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1], in channels_last memory order (no copy of the layout)."""
    return images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def train_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Resizes a square image to 128x128, cuts a random 112x112 window and flips it every other time."""
    down, right, flip = rng.random(3).tolist()  # one call: each costs as much as cutting the window
    top, left = int(down * (RESIZED - SIZE + 1)), int(right * (RESIZED - SIZE + 1))
    resized = cv2.resize(image, (RESIZED, RESIZED), interpolation=cv2.INTER_LINEAR)
    crop = resized[top : top + SIZE, left : left + SIZE]
    return cv2.flip(crop, 1) if flip < 0.5 else crop  # a view of reversed columns would be slow to copy


def train_warp(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The strong augmentation, for few images: geometry, colour, blur and erasing, all milder than what harms a face.

    Rotation up to 12 degrees, scale 0.95 to 1.25 (1.14 is what the plain crop does), shift up to 8 pixels, flip;
    brightness, contrast and colour jitter; now and then grey, blurred, or with a rectangle erased. -> (112, 112, 3).
    """
    angle, scale = rng.uniform(-12, 12), rng.uniform(0.95, 1.25) * SIZE / image.shape[0]
    matrix = cv2.getRotationMatrix2D(((image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2), angle, scale)
    matrix[:, 2] += (SIZE - image.shape[0]) / 2 + rng.uniform(-8, 8, size=2)
    if rng.random() < 0.5:
        matrix[0] = [0, 0, SIZE - 1] - matrix[0]
    warped = cv2.warpAffine(image, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    warped = _jitter_color(warped, rng)
    if rng.random() < 0.15:
        warped = cv2.GaussianBlur(warped, (0, 0), rng.uniform(0.5, 1.8))
    return _erase(warped, rng) if rng.random() < 0.4 else warped


def _jitter_color(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast around middle grey and balance of colours, brightness, then saturation: one matrix for all."""
    overall, *balance = rng.random(4).tolist()
    contrast = (0.7 + 0.6 * overall) * (0.9 + 0.2 * np.array(balance))
    offset = 127.5 * (1 - contrast) + rng.uniform(-30, 30)
    color = 0.0 if rng.random() < 0.15 else rng.uniform(0.6, 1.2)
    saturate = color * np.eye(3) + (1 - color) * _LUMA  # (3, 3)
    matrix = np.empty((3, 4))
    matrix[:, :3] = saturate * contrast
    matrix[:, 3] = saturate @ offset
    return cv2.transform(image, matrix)


def _erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = rng.integers(SIZE // 6, SIZE // 2, size=2).tolist()
    top, left = rng.integers(0, SIZE - height + 1), rng.integers(0, SIZE - width + 1)
    image[top : top + height, left : left + width] = rng.integers(0, 256, size=3)
    return image


def eval_crop(images: np.ndarray) -> np.ndarray:
    """The evaluation crop of face.evoLVe: bilinear to 128x128, then the centre 112x112.

    (H, W, 3) or (N, H, W, 3) uint8 -> the same with H = W = 112.
    """
    if images.ndim == 3:
        return eval_crop(images[None])[0]
    start = (RESIZED - SIZE) // 2
    window = slice(start, start + SIZE)
    out = np.empty((len(images), SIZE, SIZE, 3), np.uint8)
    for crop, image in zip(out, images, strict=True):
        crop[:] = cv2.resize(image, (RESIZED, RESIZED), interpolation=cv2.INTER_LINEAR)[window, window]
    return out


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Pillow's bicubic (antialiased) resampling of (H, W, 3) or (N, H, W, 3) uint8 images to size x size."""
    return _resample(images, size)


def degrade(images: np.ndarray, size: int) -> np.ndarray:
    """Low resolution as it looks at the network's input: bicubic down to size x size and up again, like Pillow's.

    (H, W, 3) or (N, H, W, 3) uint8, H = W -> the same shape and type. Scale s of the command line is size 112 // s.
    """
    return _resample(shrink(images, size), images.shape[-2])


def _resample(images: np.ndarray, size: int) -> np.ndarray:
    """torch's kernel for bytes rounds as Pillow does: columns first, and each direction to whole grey levels."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    batch = pixels if pixels.ndim == 4 else pixels[None]  # by torch: numpy's strides would lead to a slow layout
    resized = F.interpolate(batch.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy()).reshape(*images.shape[:-3], size, size, 3)
