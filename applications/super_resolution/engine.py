"""The training step of a super resolution network, and its learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from util.super_resolution import to_unit
from util.training.engine import Step
from util.training.optim import ramp_at

_WARMUP = 0.05  # fraction of all steps


@dataclass(frozen=True)
class CosineSchedule:
    """Learning rate of each step 0, 1, ... of a run: linear warm-up over a twentieth of it, times half a cosine.

    The cosine falls from `lr` to 0. Without the warm-up, Adam's first steps destroy the interpolation that a new
    network starts with.
    """

    steps_per_epoch: int
    epochs: int
    lr: float

    def lr_at(self, step: int) -> float:
        steps = self.epochs * self.steps_per_epoch
        return self.lr * ramp_at(step, steps, _WARMUP) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2

    def margin_at(self, step: int) -> None:
        """Return None: there is no margin."""


class SuperResolutionStep(Step):
    """A step with the loss L1 + identity_weight * identity. Its values are the loss and its terms.

    Args:
        network: the network, on the device.
        optimizer: of its parameters.
        device: where the network is.
        identity: the identity term of (enlarged, real) images, or None.
        identity_weight: weight of the identity term.
        agree: see Step.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        identity: Callable[[Tensor, Tensor], Tensor] | None = None,
        identity_weight: float = 0.0,
        agree: Callable[[Tensor], bool] = bool,
    ):
        super().__init__((network,), optimizer, device, agree=agree)
        self.names = ("loss", "l1", "identity") if identity else ("loss", "l1")
        self._identity = identity
        self._identity_weight = identity_weight

    def backward(self, images: Tensor, target: Tensor, margin: float | None, step: int) -> Tensor:
        """Add the gradients for small images (B, n, n, 3) and large ones (B, scale * n, scale * n, 3), RGB uint8."""
        real = to_unit(target)
        enlarged = self.networks[0](self.prepare(images))
        l1 = nn.functional.l1_loss(enlarged, real)
        terms = [l1]
        loss = l1
        if self._identity:
            identity = self._identity(enlarged, real)
            terms.append(identity)
            loss = l1 + self._identity_weight * identity
        loss.backward()
        return torch.stack([loss.detach(), *(term.detach() for term in terms)])

    def prepare(self, images: Tensor) -> Tensor:
        return to_unit(images)
