"""Losses that depend on the probability of the target class alone."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from model.loss.log_probability import log_probability


class Loss(nn.Module, ABC):
    """Mean over samples of a function of the target class's log probability."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of logits (N, C) and labels (N,) int64, computed in float32 or float64."""
        return self.from_log_prob(log_probability(logits, labels))

    @abstractmethod
    def from_log_prob(self, log_prob: Tensor) -> Tensor:
        """Return the scalar loss of the target classes' log probabilities (N,)."""


class CrossEntropy(Loss):
    """Mean over samples of -log(p), where p is the probability of the target class."""

    def from_log_prob(self, log_prob: Tensor) -> Tensor:
        return -log_prob.mean()


class FocalLoss(Loss):
    """Mean over samples of (1 - p)^gamma * -log(p): cross entropy in which well classified samples count less.

    Lin et al., "Focal Loss for Dense Object Detection" (2017), equation 4; gamma 0 is cross entropy. The weight
    (1 - p)^gamma is applied to each sample before the mean, and its gradient is included. A negative gamma raises
    ValueError.
    """

    def __init__(self, gamma: float = 2.0):
        super().__init__()
        if not gamma >= 0:
            raise ValueError(f"FocalLoss: gamma is {gamma}. It must not be negative")
        self.gamma = gamma

    def from_log_prob(self, log_prob: Tensor) -> Tensor:
        # expm1 computes 1 - p without rounding p. The floor keeps the gradient of x^gamma finite at 0 for gamma < 1.
        miss = -torch.expm1(log_prob)
        weight = miss.clamp_min(torch.finfo(miss.dtype).tiny) ** self.gamma
        return -(weight * log_prob).mean()
