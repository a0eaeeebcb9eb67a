"""Initial weights that interpolate, so that training does not have to learn interpolation first."""

import torch
from torch import nn

from model.super_resolution.rcan import RCAN

_COLORS = 3


@torch.no_grad()
def init_as_interpolation(network: RCAN) -> None:
    """Initialize a new network so that it enlarges by quadratic interpolation.

    Three channels carry the colors past the residual groups, whose last convolution starts at zero. Each doubling
    interpolates with three pixels in each direction, which fits its 3x3 convolution and is exact for parabolas. All
    other weights stay as they are. Raises ValueError if the network has fewer channels than colors.
    """
    if network.sf.out_channels < _COLORS:
        raise ValueError(f"{network.sf.out_channels} channels cannot carry {_COLORS} colors. Take more channels")
    nn.init.zeros_(network.conv1.weight)
    assert network.conv1.bias is not None
    nn.init.zeros_(network.conv1.bias)
    identity = torch.zeros(3, 3)
    identity[1, 1] = 1
    # The four pixels that replace one pixel, in the order of PixelShuffle: (4, 3, 3).
    halves = _half_pixel_kernels()
    doubling = torch.stack([torch.outer(vertical, horizontal) for vertical in halves for horizontal in halves])
    _carry_colors(network.sf, identity[None])
    for layer in network.upscale:
        if isinstance(layer, nn.Conv2d):
            _carry_colors(layer, doubling)
    _carry_colors(network.conv2, identity[None])


def _half_pixel_kernels() -> list[torch.Tensor]:
    """Return the weights of three pixels for the points a quarter of a pixel before and after the middle pixel."""
    # Lagrange polynomials through the points -1, 0 and 1, at x.
    return [torch.tensor([x * (x - 1) / 2, 1 - x * x, x * (x + 1) / 2]) for x in (-0.25, 0.25)]


def _carry_colors(layer: nn.Conv2d, kernels: torch.Tensor) -> None:
    """Set output channels k c ... k c + k - 1 to color c filtered by the k kernels (k, 3, 3)."""
    count = len(kernels)
    assert layer.bias is not None
    layer.weight[: _COLORS * count] = 0
    layer.bias[: _COLORS * count] = 0
    for color in range(_COLORS):
        layer.weight[color * count : (color + 1) * count, color] = kernels
