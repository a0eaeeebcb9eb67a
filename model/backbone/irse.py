"""The improved residual networks of the ArcFace paper, with and without squeeze-and-excitation.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (2019), section 3.1; Hu et al.,
"Squeeze-and-Excitation Networks" (2018). Module names are face.evoLVe's, so that its public checkpoints load with
strict=True.
"""

from torch import Tensor, nn

from model.backbone.recompute import Block

BLOCKS_PER_STAGE = {50: (3, 4, 14, 3), 101: (3, 13, 30, 3), 152: (3, 8, 36, 3)}
STAGE_CHANNELS = (64, 128, 256, 512)


class ImprovedResNet(nn.Module):
    """(N, 3, S, S) RGB in [-1, 1] -> (N, embedding_size), not normalized; S is input_size, 112 or 224.

    depth is 50, 101 or 152; squeeze adds squeeze-and-excitation to every block. A dropout of 0.5 precedes the last
    linear layer. Initial weights: convolutions and the linear layer Glorot-uniform, biases 0, batch norms the identity,
    PReLU slopes 0.25.
    """

    def __init__(self, depth: int, squeeze: bool, input_size: int = 112, embedding_size: int = 512):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )  # (N, 64, S, S)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(512 * (input_size // 16) ** 2, embedding_size),
            nn.BatchNorm1d(embedding_size),
        )
        blocks: list[nn.Module] = []
        in_channels = 64
        for channels, count in zip(STAGE_CHANNELS, BLOCKS_PER_STAGE[depth], strict=True):
            for index in range(count):
                blocks.append(_Block(in_channels, channels, stride=2 if index == 0 else 1, squeeze=squeeze))
                in_channels = channels
        self.body = nn.Sequential(*blocks)  # (N, 512, S / 16, S / 16)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(images)))


class _Block(Block):
    """BN, conv, PReLU, conv with the stride, BN; the shortcut only subsamples if the number of channels stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, squeeze: bool):
        super().__init__()
        if in_channels == channels:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        layers = [
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        if squeeze:
            layers.append(_SqueezeExcitation(channels))
        self.res_layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut_layer(x) + self.res_layer(x)


class _SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation: scale each channel by a gate in (0, 1), computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.relu(self.fc1(self.avg_pool(x)))).sigmoid()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
