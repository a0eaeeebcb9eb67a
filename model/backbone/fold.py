"""A backbone for judging alone, in which batch norms are part of the convolutions beside them."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.backbone import iresnet

# Children that follow each other in a module that is no nn.Sequential.
_CHAINS = {iresnet.IResNet: (("conv1", "bn1"),), iresnet._Block: (("bn1", "conv1", "bn2"), ("conv2", "bn3"))}


def fold_batch_norm(backbone: nn.Module) -> nn.Module:
    """A copy of the backbone in eval mode that gives the same embeddings, to rounding, in less time.

    In eval mode a batch norm is a scale and a shift of each channel, and a convolution before or after it can do both.
    The copy has weights of its own, takes no gradients, and cannot be put back into training; `backbone` is left alone.
    """
    folded = copy.deepcopy(backbone).eval().requires_grad_(False)
    for module in list(folded.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d) and child.kernel_size == child.stride == 1:
                setattr(module, name, nn.Identity())  # IR's shortcuts: a copy of the input, and a slow one
        if isinstance(module, nn.Sequential):
            _fold_chain(module, tuple(name for name, _ in module.named_children()))
        for names in _CHAINS.get(type(module), ()):
            _fold_chain(module, names)
    return folded


def _fold_chain(parent: nn.Module, names: tuple[str, ...]) -> None:
    """Folds the batch norms among children that follow each other; what is left of one passes its input on."""
    for first, second in pairwise(names):
        before, after = getattr(parent, first), getattr(parent, second)
        if isinstance(after, nn.BatchNorm2d) and isinstance(before, nn.Conv2d | _ShiftedConv):
            fused = before.followed_by(after) if isinstance(before, _ShiftedConv) else fuse_conv_bn_eval(before, after)
            setattr(parent, first, fused)
            setattr(parent, second, nn.Identity())
        elif isinstance(before, nn.BatchNorm2d) and isinstance(after, nn.Conv2d):
            setattr(parent, first, nn.Identity())
            setattr(parent, second, _ShiftedConv(before, after))


class _ShiftedConv(nn.Module):
    """A batch norm and the 3x3 convolution after it, of stride 1 with a border of zeros.

    The zeros stand behind the batch norm, so its shift is missing where the filter hangs over the edge: what it would
    have added there is taken back from the outermost rows and columns, and given again to the corners, where two
    edges take it.
    """

    def __init__(self, norm: nn.BatchNorm2d, convolution: nn.Conv2d):
        super().__init__()
        assert convolution.kernel_size == (3, 3) and convolution.padding == (1, 1) and convolution.stride == (1, 1)
        assert convolution.padding_mode == "zeros" and convolution.groups == 1 and convolution.bias is None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        self.convolution = copy.deepcopy(convolution)
        self.convolution.weight = nn.Parameter(convolution.weight * scale[:, None, None], requires_grad=False)
        taps = torch.einsum("oiyx,i->oyx", convolution.weight, shift)  # what the shift adds through each tap
        self.convolution.bias = nn.Parameter(taps.sum((1, 2)), requires_grad=False)
        self.register_buffer("taps", taps)

    def followed_by(self, norm: nn.BatchNorm2d) -> "_ShiftedConv":
        """The same with another batch norm behind it."""
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        self.convolution = fuse_conv_bn_eval(self.convolution, norm)
        self.taps = self.taps * scale[:, None, None]
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        for edge in (0, -1):
            y[:, :, edge] -= self.taps[:, edge].sum(1)[:, None]
            y[:, :, :, edge] -= self.taps[:, :, edge].sum(1)[:, None]
            for other in (0, -1):
                y[:, :, edge, other] += self.taps[:, edge, other]
        return y
