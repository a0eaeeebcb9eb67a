"""How near enlarged faces come to the real ones: PSNR and SSIM, by scikit-image.

Conventions, which change the numbers: images are uint8; `rgb` is over the three channels together (of SSIM, the mean
over them); `luma` is the Y of ITU-R BT.601 as skimage.color.rgb2ycbcr gives it, from 16 to 235 and not rounded, against
a range of 255, as papers on super resolution have it. SSIM is with scikit-image's default window, 7x7 and uniform. No
border is cut off. Figures are the means over the images.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from util.super_resolution import enlarge
from util.transform import SIZE, degrade, shrink

_EQUAL = 100.0  # dB of two images that do not differ, in place of infinity
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
    """The quality of (N, H, W, 3) RGB uint8 images, beside what they should be."""
    rows = [_of_one(image, true) for image, true in zip(images, truth, strict=True)]
    return Quality(*np.mean(rows, axis=0).tolist())


def _of_one(image: np.ndarray, true: np.ndarray) -> list[float]:
    luma, true_luma = (rgb2ycbcr(pixels)[:, :, 0] for pixels in (image, true))
    return [
        _psnr(true_luma, luma),
        _psnr(true, image),
        structural_similarity(true_luma, luma, data_range=255),
        structural_similarity(true, image, data_range=255, channel_axis=2),
    ]


def _psnr(true: np.ndarray, image: np.ndarray) -> float:
    with np.errstate(divide="ignore"):  # of equal images
        return min(peak_signal_noise_ratio(true, image, data_range=255), _EQUAL)


class Validation:
    """Faces to judge a network by, beside bicubic interpolation, which is measured once."""

    def __init__(self, faces: np.ndarray, scale: int, batch_size: int):
        """`faces`: (V, 112, 112, 3) RGB uint8."""
        blocks = np.split(faces, range(_BLOCK, len(faces), _BLOCK))
        self._faces, self._batch_size = faces, batch_size
        self._low, self._degraded = (
            np.concatenate([resample(block, SIZE // scale) for block in blocks]) for resample in (shrink, degrade)
        )
        self.bicubic = measure(self._degraded, faces)

    def __len__(self) -> int:
        return len(self._faces)

    def __call__(self, network: nn.Module, device: torch.device) -> tuple[Quality, np.ndarray]:
        """The quality of what the network makes of the small faces, and a grid of samples, (H, W, 3) RGB uint8.

        The network is put into eval mode and back.
        """
        was_training = network.training
        network.eval()
        parts = [
            enlarge(network, torch.from_numpy(self._low[start : start + self._batch_size]).to(device)).cpu().numpy()
            for start in range(0, len(self), self._batch_size)
        ]
        network.train(was_training)
        enlarged = np.concatenate(parts)
        return measure(enlarged, self._faces), self._grid(enlarged)

    def _grid(self, enlarged: np.ndarray, columns: int = 8, gap: int = 2) -> np.ndarray:
        """Rows: the small faces with their pixels shown, bicubic, the network's, the real ones."""
        factor = SIZE // self._low.shape[1]
        pixels = self._low[:columns].repeat(factor, axis=1).repeat(factor, axis=2)
        rows = [pixels, *(images[:columns] for images in (self._degraded, enlarged, self._faces))]
        cells = np.pad(np.stack(rows), ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
        cells = cells.transpose(0, 2, 1, 3, 4)  # (4, H, columns, W, 3)
        return cells.reshape(cells.shape[0] * cells.shape[1], -1, 3)[:-gap, :-gap]
