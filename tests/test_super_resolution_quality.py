"""PSNR and SSIM beside slow formulas, and the grid of samples."""

import numpy as np
import pytest
import torch

from applications.super_resolution.quality import Validation, measure
from model.super_resolution import RCAN, init_as_interpolation
from util.super_resolution import enlarge, to_levels, to_unit
from util.transform import degrade, shrink


@pytest.fixture
def faces() -> np.ndarray:
    """(5, 112, 112, 3) uint8, smooth."""
    return shrink(np.random.default_rng(4).integers(0, 256, (5, 9, 9, 3), dtype=np.uint8), 112)


def luma_of(image: np.ndarray) -> np.ndarray:
    """Y of BT.601 in the range 16 to 235, with the coefficients as the standard has them."""
    return 16 + (image / 255) @ np.array([65.481, 128.553, 24.966])


def slow_psnr(one: np.ndarray, other: np.ndarray) -> float:
    difference = one.astype(float) - other.astype(float)
    return 10 * np.log10(255**2 / np.mean(difference**2))


def slow_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004 on windows of 7x7, all of the same weight, with sample variances."""
    one, other = (
        np.lib.stride_tricks.sliding_window_view(image.astype(float), (7, 7)).reshape(-1, 49) for image in (one, other)
    )
    x, y = one.mean(axis=1), other.mean(axis=1)
    cov = ((one - x[:, None]) * (other - y[:, None])).sum(axis=1) / 48
    vx, vy = one.var(axis=1, ddof=1), other.var(axis=1, ddof=1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * x * y + c1) * (2 * cov + c2) / ((x**2 + y**2 + c1) * (vx + vy + c2))))


def test_figures_are_those_of_the_formulas(faces):
    rng = np.random.default_rng(1)
    worse = np.clip(faces + rng.normal(0, 12, faces.shape), 0, 255).astype(np.uint8)
    quality = measure(worse, faces)
    pairs = list(zip(worse, faces, strict=True))
    lumas = [(luma_of(one), luma_of(other)) for one, other in pairs]
    assert quality.psnr_rgb == pytest.approx(np.mean([slow_psnr(*pair) for pair in pairs]), abs=1e-9)
    assert quality.psnr_luma == pytest.approx(np.mean([slow_psnr(*pair) for pair in lumas]), abs=1e-3)
    assert quality.ssim_luma == pytest.approx(np.mean([slow_ssim(*pair) for pair in lumas]), abs=1e-5)
    channels = [slow_ssim(one[:, :, c], other[:, :, c]) for one, other in pairs for c in range(3)]
    assert quality.ssim_rgb == pytest.approx(np.mean(channels), abs=1e-6)


def test_equal_images_have_figures_that_can_be_averaged(faces):
    quality = measure(faces, faces)
    assert (quality.psnr_luma, quality.psnr_rgb) == (100, 100)
    assert quality.ssim_luma == pytest.approx(1) and quality.ssim_rgb == pytest.approx(1)


def test_levels_are_clipped_and_rounded():
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.7]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_levels(values)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255]
    everything = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    assert torch.equal(to_levels(to_unit(everything)), everything)
    assert to_unit(everything).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_validation_measures_network_and_bicubic(faces, scale):
    validation = Validation(faces, scale, batch_size=2)
    low = shrink(faces, 112 // scale)
    assert validation.bicubic == measure(degrade(faces, 112 // scale), faces)
    network = RCAN(scale, 4, 1, 1, 2)
    init_as_interpolation(network)
    network.train()
    evaluation = validation(network, torch.device("cpu"))
    assert network.training
    enlarged = enlarge(network.eval(), torch.from_numpy(low)).numpy()
    assert evaluation.network == measure(enlarged, faces)
    assert evaluation.bicubic == validation.bicubic
    assert evaluation.samples.shape == (4 * 114 - 2, 5 * 114 - 2, 3)
    rows = [
        np.kron(low[1], np.ones((scale, scale, 1), np.uint8)),
        degrade(faces, 112 // scale)[1],
        enlarged[1],
        faces[1],
    ]
    for number, expected in enumerate(rows):
        assert np.array_equal(evaluation.samples[114 * number :][:112, 114 : 114 + 112], expected)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_new_network_interpolates(faces, scale):
    """Within what a kernel of three pixels can do, away from the border, where convolutions see black."""
    torch.manual_seed(2)
    network = RCAN(scale, 8, 2, 2, 4).eval()
    init_as_interpolation(network)
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = torch.stack([0.02 * rows, 0.02 * columns, 0.6 - 0.01 * rows])[None]
    with torch.no_grad():
        large = network(ramp)[0, :, 8 * scale : 16 * scale, 8 * scale : 16 * scale]
    places = (torch.arange(8 * scale, 16 * scale) + 0.5) / scale - 0.5
    assert torch.allclose(large[0], 0.02 * places[:, None].expand(-1, 8 * scale), atol=1e-5)
    assert torch.allclose(large[1], 0.02 * places[None].expand(8 * scale, -1), atol=1e-5)
    assert torch.allclose(large[2], 0.6 - 0.01 * places[:, None].expand(-1, 8 * scale), atol=1e-5)


def test_init_as_interpolation_needs_three_channels():
    with pytest.raises(ValueError, match="2 channels cannot carry 3 colors"):
        init_as_interpolation(RCAN(2, 2, 1, 1, 1))
