"""RCAN: Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", ECCV 2018.

The keys of the state dict are the same as in the public PyTorch implementation (yjn870's RCAN-pytorch), so that its
checkpoints load.
"""

import torch
from torch import nn


class RCAN(nn.Module):
    """Network that enlarges RGB images in [0, 1]: (N, 3, h, w) -> (N, 3, scale * h, scale * w), not clipped.

    Args:
        scale: a power of two, 2 or more.
        num_features: channels of the residual groups, which run at the small size.
        num_rg: number of residual groups.
        num_rcab: number of residual channel attention blocks in a group.
        reduction: channel attention squeezes the channels by this factor; it must divide num_features.

    Raises:
        ValueError: scale or reduction is not possible.
    """

    def __init__(self, scale: int, num_features: int = 64, num_rg: int = 10, num_rcab: int = 20, reduction: int = 16):
        super().__init__()
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"RCAN enlarges by a power of two (2, 4, 8 ...), not by {scale}")
        if num_features % reduction:
            raise ValueError(f"{num_features} channels cannot be squeezed by {reduction}. It must divide them")
        self.scale = scale
        self.sizes = dict(num_features=num_features, num_rg=num_rg, num_rcab=num_rcab, reduction=reduction)
        self.sf = _conv(3, num_features)
        self.rgs = nn.Sequential(*(_Group(num_features, num_rcab, reduction) for _ in range(num_rg)))
        self.conv1 = _conv(num_features, num_features)
        doublings: list[nn.Module] = []
        for _ in range(scale.bit_length() - 1):  # log2(scale)
            doublings += [_conv(num_features, 4 * num_features), nn.PixelShuffle(2)]
        self.upscale = nn.Sequential(*doublings)
        self.conv2 = _conv(num_features, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shallow = self.sf(images)
        deep = self.conv1(self.rgs(shallow))
        return self.conv2(self.upscale(shallow + deep))


class _Residual(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.module = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.module(x)


class _Group(_Residual):
    def __init__(self, channels: int, blocks: int, reduction: int):
        super().__init__(*(_Block(channels, reduction) for _ in range(blocks)), _conv(channels, channels))


class _Block(_Residual):
    def __init__(self, channels: int, reduction: int):
        super().__init__(
            _conv(channels, channels), nn.ReLU(inplace=True), _conv(channels, channels), _Attention(channels, reduction)
        )


class _Attention(nn.Module):
    """Channel attention: scale each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.module = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.module(x)


def _conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)
