"""What the optimizer is given, and everything that changes over time, as pure functions of the step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Two SGD groups over the trainable parameters of `modules`: weight decay on everything but batch norm."""
    modules = list(modules)
    layers = [layer for module in modules for layer in module.modules()]
    norm = [p for layer in layers if isinstance(layer, _BatchNorm) for p in layer.parameters() if p.requires_grad]
    norm_ids = {id(p) for p in norm}
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    rest = [p for p in trainable if id(p) not in norm_ids]
    assert len(norm) + len(rest) == len(trainable), "a parameter was lost, or is in two groups"
    return [{"params": rest, "weight_decay": weight_decay}, {"params": norm, "weight_decay": 0.0}]


def build_sgd(
    modules: Iterable[nn.Module], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype = torch.float32
) -> torch.optim.SGD:
    """SGD over parameter_groups(), for a backbone that computes in `dtype`.

    Fused, except for fp16: a fused first step that is left out because a gradient overflowed leaves a momentum behind
    that was never written (torch 2.11 and 2.13), and the first steps of a run in fp16 commonly overflow.
    """
    groups = parameter_groups(modules, weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=dtype != torch.float16)


@dataclass(frozen=True)
class Schedule:
    """What changes over a run: the learning rate and the margin of each step 0, 1, ..."""

    steps_per_epoch: int
    lr: float
    warmup_epochs: float
    stages: tuple[int, ...]
    margin: float
    margin_warmup_epochs: float

    def lr_at(self, step: int) -> float:
        return lr_at(step, self.steps_per_epoch, self.lr, self.warmup_epochs, self.stages)

    def margin_at(self, step: int) -> float:
        return self.margin * ramp_at(step, self.steps_per_epoch, self.margin_warmup_epochs)


def lr_at(step: int, steps_per_epoch: int, lr: float, warmup_epochs: float, stages: Sequence[int]) -> float:
    """The learning rate of step 0, 1, ...: a linear rise over `warmup_epochs`, then / 10 as each stage's epochs end."""
    rate = lr * ramp_at(step, steps_per_epoch, warmup_epochs)
    return rate * 0.1 ** sum(step >= stage * steps_per_epoch for stage in stages)


def ramp_at(step: int, steps_per_epoch: int, epochs: float) -> float:
    """Rises linearly to 1 over the steps of `epochs` epochs; never 0, and 1 throughout if there are none."""
    steps = epochs * steps_per_epoch
    return min(1.0, (step + 1) / steps) if steps else 1.0
