"""CurricularFace: ArcFace, in which hard negative classes count more as training advances."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.blocks import row_blocks
from model.head.arcface import ArcFace
from model.head.margin import Samples

# Logits in a block: they fit the cache of a CPU core, or keep a GPU busy.
_BLOCK_SIZE = {"cpu": 2**18, "cuda": 2**23}


class CurricularFace(ArcFace):
    """ArcFace's target logit, and s * cos(theta_j) * (t + cos(theta_j)) for each hard class j.

    Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition" (CVPR 2020). Class j is
    hard for a sample if cos(theta_j) > cos(theta + m), where theta is the angle to the target. The buffer t starts at 0
    and is a moving average of the target cosine over the batches; `momentum` is the weight of its past. With margin 0,
    classes above the target are still hard.

    Needs a tensor of the size of the logits more than ArcFace, and over ranks an all-reduce of one number per sample.
    """

    t: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.5,
        momentum: float = 0.99,
        **options: Any,
    ):
        super().__init__(in_features, out_features, s=s, m=m, **options)
        self.check(0 <= momentum <= 1, f"momentum is {momentum}. It must be from 0 to 1")
        self.momentum = momentum
        self.register_buffer("t", torch.tensor(0.0, dtype=torch.float64))

    def adjust_other_logits(self, logits: Tensor, samples: Samples, margin: float) -> Tensor:
        cosine = samples.all_cosines()
        if self.training:
            self.t.lerp_(cosine.mean().to(self.t), 1 - self.momentum)
        sine = (1 - cosine**2).clamp_min(0).sqrt()
        threshold = cosine * math.cos(margin) - sine * math.sin(margin)  # cos(theta + m)
        return _ReweightHard.apply(logits, samples.target, threshold, self.t, self.s)


class _ReweightHard(torch.autograd.Function):
    """Multiply logits s * cos above s * threshold by t + cos, in place, except the target logits.

    The derivative of cos * (t + cos) is t + 2 * cos. It cannot be told from the result, so it is kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, threshold: Tensor, t: Tensor, s: float) -> Tensor:
        index = target.clamp_min(0)[:, None]
        is_local = (target >= 0)[:, None]
        target_logit = logits.gather(1, index)
        slope = torch.empty_like(logits)
        for rows in row_blocks(logits, _BLOCK_SIZE):
            cosine = logits[rows] / s
            hard = cosine > threshold[rows, None]
            slope[rows] = torch.where(hard, t + 2 * cosine, 1.0)
            logits[rows] *= torch.where(hard, t + cosine, 1.0)
        logits.scatter_(1, index, torch.where(is_local, target_logit, logits.gather(1, index)))
        slope.scatter_(1, index, torch.where(is_local, 1.0, slope.gather(1, index)))
        ctx.mark_dirty(logits)
        ctx.save_for_backward(slope)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None
