"""Quality of enlarged faces compared with the real faces: PSNR and SSIM, from scikit-image.

These conventions change the numbers. Images are uint8. `rgb` is over the three channels together (SSIM: the mean over
them). `luma` is the Y of ITU-R BT.601 from skimage.color.rgb2ycbcr, 16 to 235 and not rounded, with a data range of
255, as in papers on super resolution. SSIM uses scikit-image's default window, 7x7 and uniform. No border is cut off.
All numbers are means over the images.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from util.face import FACE_SIZE
from util.super_resolution import enlarge
from util.training.log import image_grid
from util.transform import degrade, shrink

_EQUAL = 100.0  # dB for two equal images, instead of infinity
_BLOCK = 64  # images at a time


@dataclass(frozen=True)
class Quality:
    """PSNR in dB, SSIM up to 1."""

    psnr_luma: float
    psnr_rgb: float
    ssim_luma: float
    ssim_rgb: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(images: np.ndarray, truth: np.ndarray) -> Quality:
    """Return the quality of (N, H, W, 3) RGB uint8 images compared with the true ones."""
    rows = [_measure_image(image, true) for image, true in zip(images, truth, strict=True)]
    return Quality(*np.mean(rows, axis=0).tolist())


def _measure_image(image: np.ndarray, true: np.ndarray) -> list[float]:
    """Return the four values of Quality, in its order."""
    luma = rgb2ycbcr(image)[:, :, 0]
    true_luma = rgb2ycbcr(true)[:, :, 0]
    return [
        _psnr(true_luma, luma),
        _psnr(true, image),
        structural_similarity(true_luma, luma, data_range=255),
        structural_similarity(true, image, data_range=255, channel_axis=2),
    ]


def _psnr(true: np.ndarray, image: np.ndarray) -> float:
    with np.errstate(divide="ignore"):  # equal images
        return min(peak_signal_noise_ratio(true, image, data_range=255), _EQUAL)


@dataclass(frozen=True)
class Evaluation:
    """The quality of a network and of bicubic interpolation on the same faces, and sample images.

    `samples` is (H, W, 3) RGB uint8.
    """

    network: Quality
    bicubic: Quality
    samples: np.ndarray


class Validation:
    """Faces to evaluate a network on. Bicubic interpolation is measured once."""

    def __init__(self, faces: np.ndarray, scale: int, batch_size: int):
        """Shrink `faces`, (V, 112, 112, 3) RGB uint8, by `scale`."""
        blocks = np.split(faces, range(_BLOCK, len(faces), _BLOCK))
        self._faces = faces
        self._batch_size = batch_size
        self._low = np.concatenate([shrink(block, FACE_SIZE // scale) for block in blocks])
        self._degraded = np.concatenate([degrade(block, FACE_SIZE // scale) for block in blocks])
        self.bicubic = measure(self._degraded, faces)

    def __len__(self) -> int:
        return len(self._faces)

    def __call__(self, network: nn.Module, device: torch.device) -> Evaluation:
        """Enlarge the small faces and measure the result. The network is put into eval mode and back."""
        was_training = network.training
        network.eval()
        batches = []
        for start in range(0, len(self), self._batch_size):
            low = torch.from_numpy(self._low[start : start + self._batch_size]).to(device)
            batches.append(enlarge(network, low).cpu().numpy())
        network.train(was_training)
        enlarged = np.concatenate(batches)
        return Evaluation(measure(enlarged, self._faces), self.bicubic, self._samples(enlarged))

    def _samples(self, enlarged: np.ndarray, columns: int = 8) -> np.ndarray:
        """Arrange four rows: the small faces with visible pixels, bicubic, the network's, the real faces."""
        factor = FACE_SIZE // self._low.shape[1]
        pixels = self._low.repeat(factor, axis=1).repeat(factor, axis=2)
        rows = [images[:columns] for images in (pixels, self._degraded, enlarged, self._faces)]
        return image_grid(np.concatenate(rows), columns=len(rows[0]), color=255)
