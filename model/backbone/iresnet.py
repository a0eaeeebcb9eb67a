"""InsightFace's improved residual networks (arcface_torch), with its module names: public checkpoints load strictly.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (2019). The block comes from Han et al.,
"Deep Pyramidal Residual Networks" (2017), with PReLU.
"""

from torch import Tensor, nn

from model.backbone.recompute import Block

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


class IResNet(nn.Module):
    """(N, 3, 112, 112) RGB in [-1, 1] -> (N, embedding_size), not normalized; depth is 18, 34, 50 or 100.

    The scale of the last batch norm is frozen at 1. With cosine logits only directions count, and a scale for each
    coordinate would let training suppress some coordinates. The scale stays in the state dict, without a gradient.

    Initial weights: convolutions normal with standard deviation 0.1 (a batch norm follows each), the linear layer as in
    PyTorch, batch norms the identity, PReLU slopes 0.25.
    """

    def __init__(self, depth: int, embedding_size: int = 512):
        super().__init__()
        blocks = BLOCKS_PER_STAGE[depth]
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        self.layer1 = _stage(64, 64, blocks[0])  # (N, 64, 56, 56)
        self.layer2 = _stage(64, 128, blocks[1])
        self.layer3 = _stage(128, 256, blocks[2])
        self.layer4 = _stage(256, 512, blocks[3])  # (N, 512, 7, 7)
        self.bn2 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 7 * 7, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.bn2(x).flatten(1)))


class _Block(Block):
    """BN, conv, BN, PReLU, conv with the stride, BN; `downsample` projects the first shortcut of a stage."""

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    """Build a stage, whose first block halves the resolution."""
    downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))
    first = _Block(in_channels, channels, stride=2, downsample=downsample)
    return nn.Sequential(first, *(_Block(channels, channels, stride=1, downsample=None) for _ in range(blocks - 1)))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.1)
