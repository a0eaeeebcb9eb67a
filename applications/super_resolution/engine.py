"""One epoch of training a super resolution network."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from util.super_resolution import to_unit
from util.training.engine import Report, check_loss
from util.training.optim import ramp_at

_WARMUP = 0.05  # fraction of all steps


def cosine_at(step: int, steps: int, highest: float) -> float:
    """Return the learning rate of step 0, 1, ...: linear warm-up over a twentieth of `steps`, times half a cosine.

    The cosine falls from `highest` to 0. Without the warm-up, Adam's first steps destroy the interpolation that a new
    network starts with.
    """
    return highest * ramp_at(step, steps, _WARMUP) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def train_one_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    steps_per_epoch: int,
    epoch: int,
    lr_at: Callable[[int], float],
    device: torch.device,
    report: Report,
    report_every: int,
    identity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    identity_weight: float = 0.0,
) -> dict[str, float]:
    """Train on all batches of one epoch with the loss L1 + identity_weight * identity.

    Args:
        network: the network, on the device.
        optimizer: of its parameters.
        batches: small (B, n, n, 3) and large (B, scale * n, scale * n, 3) RGB uint8 images.
        steps_per_epoch: the number of batches.
        epoch: from 0.
        lr_at: the learning rate of a step, counted over all epochs.
        device: where the network is.
        report: called with (steps done, averages so far) every `report_every` steps and at the end. Only then are
            numbers copied from the device.
        report_every: steps between reports.
        identity: the identity term of (enlarged, real) images, or None.
        identity_weight: weight of the identity term.

    Returns:
        The epoch's averages: loss and l1 (of pixels in [0, 1]), identity if it is used, and the last lr.

    Raises:
        RunError: the loss is not finite at a report.
    """
    network.train()
    names = ("loss", "l1", "identity") if identity else ("loss", "l1")
    totals = torch.zeros(len(names), device=device)
    averages: dict[str, float] = {}
    for index, (low, high) in enumerate(batches):
        lr = lr_at(epoch * steps_per_epoch + index)
        for group in optimizer.param_groups:
            group["lr"] = lr
        real = to_unit(high.to(device, non_blocking=True))
        enlarged = network(to_unit(low.to(device, non_blocking=True)))
        l1 = nn.functional.l1_loss(enlarged, real)
        terms = [l1, identity(enlarged, real)] if identity else [l1]
        loss = l1 + identity_weight * terms[1] if identity else l1
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        totals += torch.stack([loss.detach(), *(term.detach() for term in terms)])
        done = index + 1
        if done % report_every == 0 or done == steps_per_epoch:
            averages = dict(zip(names, (totals / done).tolist(), strict=True)) | {"lr": lr}
            steps = range(max(0, done - report_every) + 1, done + 1)  # since the last report
            check_loss(averages["loss"], epoch, steps, "Lower --lr")
            report(done, averages)
    return averages
