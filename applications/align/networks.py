"""The three networks of MTCNN, for inference only.

Zhang et al., "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks", 2016. Each network
takes pixels from `normalize` and returns logits. P-Net sees a complete image and has one output for each window of
12x12 pixels at a stride of 2. R-Net sees crops of 24x24 pixels, O-Net crops of 48x48. A face logit is the difference of
the two logits of a softmax, so its sigmoid is the probability of a face.
"""

import numpy as np
import torch
from torch import nn

from applications.align.weights import load_weights

# P-Net's receptive field and stride, in pixels.
WINDOW = 12
STRIDE = 2


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Convert (N, H, W, 3) RGB uint8 to (N, 3, H, W) float32, (x - 127.5) / 128, in channels_last memory order."""
    return pixels.permute(0, 3, 1, 2).float().sub_(127.5).mul_(1 / 128)


class ProposalNet(nn.Module):
    """P-Net: (N, 3, H, W) -> face logit (N, H', W') and box offsets (N, H', W', 4), H' = (H - 10) // 2 for even H."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(*_conv(3, 10, 3), _pool(2, ceil=True), *_conv(10, 16, 3), *_conv(16, 32, 3), nn.Conv2d(32, 6, 1))
        )
        _fill(self.features, load_weights("pnet"), outputs=4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.features(x).permute(0, 2, 3, 1)
        return out[..., 5] - out[..., 4], out[..., :4]


class RefinementNet(nn.Module):
    """R-Net: (N, 3, 24, 24) -> face logit (N,) and box offsets (N, 4)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(*_conv(3, 28, 3), _pool(3, ceil=True), *_conv(28, 48, 3), _pool(3), *_conv(48, 64, 2)),
            *(_Flatten(), nn.Linear(576, 128), nn.PReLU(128), nn.Linear(128, 6)),
        )
        _fill(self.features, load_weights("rnet"), outputs=4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.features(x)
        return out[:, 5] - out[:, 4], out[:, :4]


class OutputNet(nn.Module):
    """O-Net: (N, 3, 48, 48) -> face logit (N,), box offsets (N, 4) and landmarks (N, 5, 2).

    Landmarks are x, y as fractions of the box's width and height.
    """

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(*_conv(3, 32, 3), _pool(3, ceil=True), *_conv(32, 64, 3), _pool(3), *_conv(64, 64, 3)),
            *(_pool(2, ceil=True), *_conv(64, 128, 2)),
            *(_Flatten(), nn.Linear(1152, 256), nn.PReLU(256), nn.Linear(256, 16)),
        )
        _fill(self.features, load_weights("onet"), outputs=6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = self.features(x)
        landmarks = out[:, 4:14].unflatten(1, (2, 5)).transpose(1, 2)  # five x, then five y
        return out[:, 15] - out[:, 14], out[:, :4], landmarks


def _conv(before: int, after: int, size: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, size), nn.PReLU(after)


def _pool(size: int, ceil: bool = False) -> nn.Module:
    return nn.MaxPool2d(size, 2, ceil_mode=ceil)


class _Flatten(nn.Module):
    """(N, C, H, W) -> (N, H * W * C), a view of channels_last memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def _fill(layers: nn.Sequential, arrays: list[np.ndarray], outputs: int) -> None:
    """Copy Keras arrays into the layers, in order. Raise ValueError if a shape differs.

    The last arrays (`outputs` of them: kernel, bias, kernel, bias ...) belong to output layers with the same input,
    which are one layer here.
    """
    last = arrays[-outputs:]
    remaining = [*arrays[:-outputs], np.concatenate(last[0::2], axis=-1), np.concatenate(last[1::2])]
    channels = 0
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            kernel = remaining.pop(0).transpose(3, 2, 0, 1)  # (out, in, H, W)
            _set(layer.weight, kernel)
            _set(layer.bias, remaining.pop(0))
            channels = layer.out_channels
        elif isinstance(layer, nn.Linear):
            matrix = remaining.pop(0).T  # (out, in)
            if channels:  # the first dense layer: Keras flattened (W, H, C), and we flatten (H, W, C)
                side = round((matrix.shape[1] / channels) ** 0.5)
                matrix = matrix.reshape(-1, side, side, channels).transpose(0, 2, 1, 3).reshape(matrix.shape)
                channels = 0
            _set(layer.weight, matrix)
            _set(layer.bias, remaining.pop(0))
        elif isinstance(layer, nn.PReLU):
            _set(layer.weight, remaining.pop(0).reshape(-1))
    assert not remaining


def _set(parameter: torch.Tensor | None, values: np.ndarray) -> None:
    assert parameter is not None
    if parameter.shape != values.shape:
        raise ValueError(f"weights of shape {values.shape} for a layer of shape {tuple(parameter.shape)}")
    parameter.data = torch.tensor(values.copy())
    parameter.requires_grad_(False)


def build(network: type[nn.Module], device: torch.device) -> nn.Module:
    """Return a network with its weights, in eval mode on the device."""
    return network().eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
