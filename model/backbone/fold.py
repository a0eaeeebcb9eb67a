"""Batch norms folded into the convolutions before and after them, for a faster backbone that only evaluates."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.backbone import iresnet

# Children that run one after the other, in modules that are not nn.Sequential.
_CHAINS = {iresnet.IResNet: (("conv1", "bn1"),), iresnet._Block: (("bn1", "conv1", "bn2"), ("conv2", "bn3"))}


def fold_batch_norm(backbone: nn.Module) -> nn.Module:
    """Return a copy in eval mode with the same embeddings, up to rounding, that needs less time.

    In eval mode a batch norm scales and shifts each channel. The convolution before or after it can do both. The copy
    shares no tensor with `backbone`, requires no gradients and cannot be trained.
    """
    folded = copy.deepcopy(backbone).eval().requires_grad_(False)
    for module in list(folded.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d) and child.kernel_size == child.stride == 1:
                setattr(module, name, nn.Identity())  # IR's shortcuts: a slow copy of the input
        if isinstance(module, nn.Sequential):
            _fold_chain(module, tuple(name for name, _ in module.named_children()))
        for names in _CHAINS.get(type(module), ()):
            _fold_chain(module, names)
    return folded


def _fold_chain(parent: nn.Module, names: tuple[str, ...]) -> None:
    """Fold the batch norms among consecutive children; an Identity takes the place of each."""
    for first, second in pairwise(names):
        before = getattr(parent, first)
        after = getattr(parent, second)
        if isinstance(after, nn.BatchNorm2d) and isinstance(before, nn.Conv2d | _ShiftedConv):
            fused = before.followed_by(after) if isinstance(before, _ShiftedConv) else fuse_conv_bn_eval(before, after)
            setattr(parent, first, fused)
            setattr(parent, second, nn.Identity())
        elif isinstance(before, nn.BatchNorm2d) and isinstance(after, nn.Conv2d):
            setattr(parent, first, nn.Identity())
            setattr(parent, second, _ShiftedConv(before, after))


class _ShiftedConv(nn.Module):
    """A batch norm and the 3x3 convolution of stride 1 after it, as one convolution.

    The convolution pads with zeros after the batch norm. So the folded shift must not be added where the kernel
    overlaps the padding. forward subtracts it in the border rows and columns, and adds it back once at the corners,
    where it was subtracted twice.
    """

    taps: Tensor

    def __init__(self, norm: nn.BatchNorm2d, convolution: nn.Conv2d):
        super().__init__()
        assert convolution.kernel_size == (3, 3) and convolution.padding == (1, 1) and convolution.stride == (1, 1)
        assert convolution.padding_mode == "zeros" and convolution.groups == 1 and convolution.bias is None
        # The batch norm is x * scale + shift; the scale goes into the weight, the shift into the bias.
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        self.convolution = copy.deepcopy(convolution)
        self.convolution.weight = nn.Parameter(convolution.weight * scale[:, None, None], requires_grad=False)
        # What the shift adds to each output channel through each of the 3x3 taps of the kernel: (out, 3, 3).
        taps = torch.einsum("oiyx,i->oyx", convolution.weight, shift)
        self.convolution.bias = nn.Parameter(taps.sum((1, 2)), requires_grad=False)
        self.register_buffer("taps", taps)

    def followed_by(self, norm: nn.BatchNorm2d) -> "_ShiftedConv":
        """Fold one more batch norm, which runs after the convolution, into this module."""
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        self.convolution = fuse_conv_bn_eval(self.convolution, norm)
        self.taps = self.taps * scale[:, None, None]
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        for edge in (0, -1):
            # At the first (last) row, the first (last) row of taps lies on the padding; the same for columns.
            y[:, :, edge] -= self.taps[:, edge].sum(1)[:, None]
            y[:, :, :, edge] -= self.taps[:, :, edge].sum(1)[:, None]
            for other in (0, -1):
                y[:, :, edge, other] += self.taps[:, edge, other]
        return y
