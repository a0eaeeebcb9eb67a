"""One epoch of training."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from util.errors import RunError
from util.optim import Schedule
from util.transform import normalise

Report = Callable[[int, dict[str, float]], None]


def train_one_epoch(
    backbone: nn.Module,
    head: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    schedule: Schedule,
    epoch: int,
    device: torch.device,
    report: Report,
    report_every: int = 100,
) -> dict[str, float]:
    """Trains on `batches` ((B, H, W, 3) uint8 images and (B,) labels), the steps of epoch 0, 1, ... of `schedule`.

    Returns the epoch's averages: loss, prec1 and prec5 (per cent, of the logits that the loss sees, margin included),
    and the last lr. `report(steps done, averages so far)` is called every `report_every` steps and at the end, and only
    then are numbers fetched from the device. Raises RunError there if the loss is no longer finite.
    """
    backbone.train()
    head.train()
    totals = torch.zeros(3, device=device)
    averages: dict[str, float] = {}
    for index, (images, labels) in enumerate(batches):
        step = epoch * schedule.steps_per_epoch + index
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        head.m = schedule.margin_at(step)

        labels = labels.to(device, non_blocking=True)
        logits = head(backbone(normalise(images.to(device, non_blocking=True))), labels)
        loss = criterion(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        totals += torch.cat([loss.detach()[None], precision(logits.detach(), labels)])
        done = index + 1
        if done % report_every == 0 or done == schedule.steps_per_epoch:
            averages = _averages(totals, done) | {"lr": schedule.lr_at(step)}
            if not math.isfinite(averages["loss"]):
                raise RunError(
                    f"the loss became {averages['loss']} in epoch {epoch + 1}, between steps "
                    f"{max(0, done - report_every) + 1} and {done}; lower --lr, or raise --warmup_epochs"
                )
            report(done, averages)
    return averages


def precision(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, C) logits -> (2,): the per cent of samples whose class is the highest, and among the five highest."""
    target = logits.gather(1, labels[:, None])
    rank = (logits > target).sum(dim=1)  # of each label among the classes, 0 the highest
    return torch.stack([(rank < k).float().mean() * 100 for k in (1, 5)])


def _averages(totals: torch.Tensor, steps: int) -> dict[str, float]:
    return dict(zip(("loss", "prec1", "prec5"), (totals / steps).tolist(), strict=True))
