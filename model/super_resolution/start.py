"""Weights to start from, so that the first epochs are not spent on learning what interpolation is."""

import torch
from torch import nn

from model.super_resolution.rcan import RCAN

_COLORS = 3


@torch.no_grad()
def init_as_interpolation(network: RCAN) -> None:
    """Makes a new network enlarge by interpolation; what it learns is then what interpolation lacks.

    Three of its channels carry the colours past the residual groups, whose last convolution starts at zero, through
    doublings with a quadratic kernel, which sees three pixels as these convolutions do. Between pixels a quarter of a
    pixel apart the kernel is exact for parabolas. All other weights keep the values that they were drawn with.
    Raises ValueError for a network that has fewer channels than colours.
    """
    if network.sf.out_channels < _COLORS:
        raise ValueError(f"{network.sf.out_channels} channels cannot carry {_COLORS} colours; take more")
    nn.init.zeros_(network.conv1.weight)
    nn.init.zeros_(network.conv1.bias)
    center = torch.zeros(3, 3)
    center[1, 1] = 1
    doubling = torch.stack([torch.outer(rows, columns) for rows in _halves() for columns in _halves()])  # (4, 3, 3)
    _carry(network.sf, center[None])
    for layer in network.upscale:
        if isinstance(layer, nn.Conv2d):
            _carry(layer, doubling)
    _carry(network.conv2, center[None])


def _halves() -> list[torch.Tensor]:
    """The weights of three pixels for a point a quarter of a pixel before, and after, the middle one."""
    return [torch.tensor([x * (x - 1) / 2, 1 - x * x, x * (x + 1) / 2]) for x in (-0.25, 0.25)]


def _carry(layer: nn.Conv2d, kernels: torch.Tensor) -> None:
    """Colour c comes out of `layer` in channels k c to k c + k - 1, each by one of the k kernels, of colour c alone."""
    count = len(kernels)
    layer.weight[: _COLORS * count] = 0
    layer.bias[: _COLORS * count] = 0
    for color in range(_COLORS):
        layer.weight[color * count : (color + 1) * count, color] = kernels
