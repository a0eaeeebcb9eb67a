"""Focal loss: cross entropy in which samples that are already right count less."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """The mean over samples of (1 - p)^gamma * -log(p), where p is the probability of the sample's own class.

    Lin et al., "Focal Loss for Dense Object Detection" (2017), equation 4; gamma 0 is cross entropy, gamma < 0 raises
    ValueError. The weight is applied to each sample before the mean, and is part of the gradient.
    """

    def __init__(self, gamma: float = 2.0):
        super().__init__()
        if not gamma >= 0:
            raise ValueError(f"FocalLoss: gamma is {gamma}, and must not be negative")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (N, C) of any size, labels (N,) int64 -> a scalar, computed in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cross_entropy = F.cross_entropy(logits, labels, reduction="none")  # (N,) -log(p)
        # expm1 gives 1 - p without rounding p; the floor keeps the gradient of x^gamma finite at x = 0 for gamma < 1.
        miss = -torch.expm1(-cross_entropy)
        weight = miss.clamp_min(torch.finfo(miss.dtype).tiny) ** self.gamma
        return (weight * cross_entropy).mean()
