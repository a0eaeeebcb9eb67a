"""Losses of the probability that a network gives to the right class."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from model.loss.log_probability import log_probability


class Loss(nn.Module, ABC):
    """The mean over samples of a function of the log probability of each sample's own class."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (N, C) of any size, labels (N,) int64 -> a scalar, computed in float32 at least."""
        return self.of(log_probability(logits, labels))

    @abstractmethod
    def of(self, log_p: Tensor) -> Tensor:
        """Log probabilities (N,), each of a sample's own class -> a scalar."""


class CrossEntropy(Loss):
    """The mean over samples of -log(p), where p is the probability of the sample's own class."""

    def of(self, log_p: Tensor) -> Tensor:
        return -log_p.mean()


class FocalLoss(Loss):
    """The mean over samples of (1 - p)^gamma * -log(p): cross entropy in which samples already right count less.

    Lin et al., "Focal Loss for Dense Object Detection" (2017), equation 4; gamma 0 is cross entropy, gamma < 0 raises
    ValueError. The weight is applied to each sample before the mean, and is part of the gradient.
    """

    def __init__(self, gamma: float = 2.0):
        super().__init__()
        if not gamma >= 0:
            raise ValueError(f"FocalLoss: gamma is {gamma}, and must not be negative")
        self.gamma = gamma

    def of(self, log_p: Tensor) -> Tensor:
        # expm1 gives 1 - p without rounding p; the floor keeps the gradient of x^gamma finite at x = 0 for gamma < 1.
        miss = -torch.expm1(log_p)
        weight = miss.clamp_min(torch.finfo(miss.dtype).tiny) ** self.gamma
        return -(weight * log_p).mean()
