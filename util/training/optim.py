"""Parameter groups, optimizers, and schedules as pure functions of the step."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float, vectors: bool = True) -> list[dict]:
    """Return two groups of the trainable parameters: with weight decay, and without.

    Args:
        modules: backbone and head.
        weight_decay: of all parameters but batch norm.
        vectors: False: no weight decay of parameters with one dimension either, as in timm: biases, slopes, layer norm.
    """
    modules = list(modules)
    norm_ids: set[int] = set()
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                norm_ids.update(id(parameter) for parameter in layer.parameters())
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                is_spared = id(parameter) in norm_ids or (parameter.ndim == 1 and not vectors)
                group = spared if is_spared else decayed
                group.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def build_sgd(
    modules: Sequence[nn.Module],
    lr: float,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
    backbone_lr: float | None = None,
) -> torch.optim.SGD:
    """Return SGD over parameter_groups().

    Fused, except for fp16. If a gradient overflows in the first step and the step is skipped, fused SGD keeps a
    momentum that was never written (torch 2.11 and 2.13). First steps in fp16 often overflow.

    Args:
        modules: backbone and head.
        lr: initial learning rate; a schedule changes it.
        momentum: of SGD.
        weight_decay: of all parameters but batch norm.
        dtype: in which the backbone computes.
        backbone_lr: learning rate of the first module, as a multiple of `lr`. If it is given, the module has groups of
            its own, with it as `lr_factor`, and may be frozen for some steps: fused SGD needs the momentum of all
            parameters of a group, or of none.
    """
    groups = split_backbone(parameter_groups(modules, weight_decay), modules[0], lr, backbone_lr)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=dtype != torch.float16)


def build_adamw(
    modules: Sequence[nn.Module], lr: float, weight_decay: float, backbone_lr: float | None = None
) -> torch.optim.AdamW:
    """Return fused AdamW with betas 0.9 and 0.999. Only matrices, convolutions and positions have weight decay.

    The arguments are those of build_sgd().
    """
    groups = split_backbone(parameter_groups(modules, weight_decay, vectors=False), modules[0], lr, backbone_lr)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def split_backbone(groups: list[dict], backbone: nn.Module, lr: float, backbone_lr: float | None) -> list[dict]:
    """Split each group into the parameters of the backbone, with a learning rate of their own, and the others."""
    if backbone_lr is None:
        return groups
    ids = {id(parameter) for parameter in backbone.parameters()}
    split = []
    for group in groups:
        ours = [parameter for parameter in group["params"] if id(parameter) in ids]
        others = [parameter for parameter in group["params"] if id(parameter) not in ids]
        split.append(group | {"params": ours, "lr": lr * backbone_lr, "lr_factor": backbone_lr})
        split.append(group | {"params": others})
    return [group for group in split if group["params"]]


class StepSchedule(Protocol):
    """Learning rate and margin of each step 0, 1, ... of a run."""

    @property
    def steps_per_epoch(self) -> int: ...

    def lr_at(self, step: int) -> float: ...

    def margin_at(self, step: int) -> float | None: ...


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then the learning rate falls by one of three decays; the margin has a warm-up of its own.

    step: the rate is divided by 10 at each of the stages. poly: the square of the fraction of the steps that are left
    after the warm-up, as PolyScheduler of arcface_torch. cosine: half a cosine over these steps. The last two end at 0.
    """

    steps_per_epoch: int
    lr: float  # after the warm-up
    warmup_epochs: float  # in which the learning rate rises linearly
    stages: tuple[int, ...]  # epochs after which the learning rate is divided by 10
    margin: float  # after the warm-up
    margin_warmup_epochs: float
    decay: str = "step"  # or poly, cosine
    epochs: int = 0  # of the complete run, for poly and cosine

    def lr_at(self, step: int) -> float:
        rate = self.lr * ramp_at(step, self.steps_per_epoch, self.warmup_epochs)
        if self.decay == "step":
            return rate * 0.1 ** sum(step >= stage * self.steps_per_epoch for stage in self.stages)
        warmup_steps = self.warmup_epochs * self.steps_per_epoch
        steps = self.epochs * self.steps_per_epoch
        if step <= warmup_steps:
            return rate
        left = (steps - step) / (steps - warmup_steps)
        return rate * left**2 if self.decay == "poly" else rate * (1 - math.cos(math.pi * left)) / 2

    def margin_at(self, step: int) -> float:
        return self.margin * ramp_at(step, self.steps_per_epoch, self.margin_warmup_epochs)


def ramp_at(step: int, steps_per_epoch: int, epochs: float) -> float:
    """Return a factor that rises linearly to 1 over `epochs` epochs: never 0, and always 1 if epochs is 0."""
    steps = epochs * steps_per_epoch
    return min(1.0, (step + 1) / steps) if steps else 1.0
