"""MobileFaceNet: inverted residuals with depthwise convolutions and a global depthwise convolution at the end.

Chen et al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices" (2018), in the
variant and with the module names of InsightFace's `mbf`, so that its public checkpoints load with strict=True.
"""

from torch import Tensor, nn

from model.backbone.recompute import Block


class MobileFaceNet(nn.Module):
    """(N, 3, 112, 112) RGB in [-1, 1] -> (N, embedding_size), not normalized.

    Scale 1 is the paper's network: blocks of 64 and 128 output channels, hidden channels of 128, 256 and 512, and 512
    channels before the embedding. `scale` multiplies the output channels alone; 2 is the default of InsightFace's
    `mbf`. `width` multiplies all channels. So scale 2 with width 0.5 has the output channels of the paper, but only
    half of its hidden and last channels; it is not the paper's network.

    Initial weights: convolutions and the last linear layer He-normal by fan-out, batch norms the identity, PReLU slopes
    0.25. The fan-out is counted within a group, because a depthwise filter feeds one channel only.
    """

    def __init__(self, embedding_size: int = 512, scale: int = 2, width: float = 1.0):
        super().__init__()
        base, narrow, middle, wide = (int(channels * width) for channels in (64, 128, 256, 512))
        first = base * scale
        second = narrow * scale
        self.layers = nn.Sequential(
            _conv_bn_prelu(3, first, kernel=3, stride=2),  # (N, 64, 56, 56) with scale 1 and width 1
            _conv_bn_prelu(first, first, kernel=3, groups=base),
            _bottleneck(_Bottleneck, first, hidden=narrow, out_channels=first, stride=2),  # (N, 64, 28, 28)
            _residual_stage(4, first, hidden=narrow),
            _bottleneck(_Bottleneck, first, hidden=middle, out_channels=second, stride=2),  # (N, 128, 14, 14)
            _residual_stage(6, second, hidden=middle),
            _bottleneck(_Bottleneck, second, hidden=wide, out_channels=second, stride=2),  # (N, 128, 7, 7)
            _residual_stage(2, second, hidden=middle),
        )
        self.conv_sep = _conv_bn_prelu(second, wide, kernel=1)
        self.features = _Layers(
            _Layers(*_conv_bn(wide, wide, kernel=7, padding=0, groups=wide)),  # (N, 512, 1, 1)
            nn.Flatten(),
            nn.Linear(wide, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.conv_sep(self.layers(images)))


class _Layers(nn.Module):
    """Modules in sequence under the name `layers`, as in the keys of the public checkpoints."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Bottleneck(Block, _Layers):
    pass


class _Residual(_Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int | None = None, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    padding = kernel // 2 if padding is None else padding
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=False
    )
    return convolution, nn.BatchNorm2d(out_channels)


def _conv_bn_prelu(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> _Layers:
    return _Layers(*_conv_bn(in_channels, out_channels, kernel, stride, groups=groups), nn.PReLU(out_channels))


def _bottleneck(
    block: type[_Bottleneck], in_channels: int, hidden: int, out_channels: int, stride: int = 1
) -> _Bottleneck:
    """Build a block: widen to `hidden` channels, filter each one (depthwise), project without an activation."""
    return block(
        _conv_bn_prelu(in_channels, hidden, kernel=1),
        _conv_bn_prelu(hidden, hidden, kernel=3, stride=stride, groups=hidden),
        _Layers(*_conv_bn(hidden, out_channels, kernel=1)),
    )


def _residual_stage(blocks: int, channels: int, hidden: int) -> _Layers:
    return _Layers(*(_bottleneck(_Residual, channels, hidden, channels) for _ in range(blocks)))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=(2 / module.out_features) ** 0.5)
