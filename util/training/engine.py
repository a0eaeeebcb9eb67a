"""One epoch of training."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import nn

from util.device import prefetch_to_device
from util.errors import RunError
from util.training.optim import Schedule
from util.transform import normalize

Report = Callable[[int, dict[str, float]], None]
# From embeddings (B, D) and labels (B,) to the loss and, for all samples that it is of, the ranks of their labels.
Objective = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class TrainingStep:
    """Forward, backward and update on one batch: everything but what the schedule changes.

    The batch is worked through in `accumulate` parts, whose gradients add up to those of the whole batch: to rounding,
    the weights are those of a single part, except that batch norm normalises each part by itself. `scaler` is for fp16,
    see util.device. `objective` takes the place of head and criterion where the head is spread over processes, or
    sampled. Nothing here waits for a GPU, except the scaler.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        objective: Objective | None = None,
    ):
        self.backbone, self.head, self.criterion = backbone, head, criterion
        self.objective = objective or self._whole
        self.optimizer, self.device, self.accumulate = optimizer, device, accumulate
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 images and (B,) labels on the device -> (3,): loss, prec1 and prec5 of the batch."""
        self.optimizer.zero_grad(set_to_none=True)
        size = -(-len(labels) // self.accumulate)
        *parts, last = zip(images.split(size), labels.split(size), strict=True)
        # DistributedDataParallel exchanges gradients once, with the last part.
        with getattr(self.backbone, "no_sync", nullcontext)():
            totals = [self._backward(*part, share=len(part[1]) / len(labels)) for part in parts]
        totals.append(self._backward(*last, share=len(last[1]) / len(labels)))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack(totals).sum(dim=0)

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
        loss, ranks = self.objective(self.backbone(normalize(images)), labels)
        loss = loss * share
        self.scaler.scale(loss).backward()
        return torch.cat([loss.detach()[None], topk_accuracy(ranks) * share])

    def _whole(self, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(embeddings, labels)
        return self.criterion(logits, labels), target_rank(logits.detach(), labels)


def train_one_epoch(
    step: TrainingStep,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    schedule: Schedule,
    epoch: int,
    report: Report,
    report_every: int = 100,
) -> dict[str, float]:
    """Trains on `batches` ((B, H, W, 3) uint8 images and (B,) labels), the steps of epoch 0, 1, ... of `schedule`.

    Returns the epoch's averages: loss, prec1 and prec5 (per cent, of the logits that the loss sees, margin included),
    and the last lr. `report(steps done, averages so far)` is called every `report_every` steps and at the end, and only
    then are numbers fetched from the device. Raises RunError there if the loss is no longer finite.
    """
    step.backbone.train()
    step.head.train()
    totals = torch.zeros(3, device=step.device)
    averages: dict[str, float] = {}
    for index, (images, labels) in enumerate(prefetch_to_device(batches, step.device)):
        number = epoch * schedule.steps_per_epoch + index
        for group in step.optimizer.param_groups:
            group["lr"] = schedule.lr_at(number)
        step.head.m, step.head.step = schedule.margin_at(number), number
        totals += step(images, labels)
        done = index + 1
        if done % report_every == 0 or done == schedule.steps_per_epoch:
            averages = _averages(totals, done) | {"lr": schedule.lr_at(number)}
            if not math.isfinite(averages["loss"]):
                raise RunError(
                    f"the loss became {averages['loss']} in epoch {epoch + 1}, between steps "
                    f"{max(0, done - report_every) + 1} and {done}; lower --lr, or raise --warmup_epochs"
                )
            report(done, averages)
    return averages


def precision(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, C) logits -> (2,): the per cent of samples whose class is the highest, and among the five highest."""
    return topk_accuracy(target_rank(logits, labels))


def target_rank(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N,) how many classes have a larger logit than each label: 0 for the highest."""
    return (logits > logits.gather(1, labels[:, None])).sum(dim=1)


def topk_accuracy(ranks: torch.Tensor) -> torch.Tensor:
    """(N,) ranks of the labels -> (2,): the per cent of them that are the highest, and among the five highest."""
    return torch.stack([(ranks < k).float().mean() * 100 for k in (1, 5)])


def _averages(totals: torch.Tensor, steps: int) -> dict[str, float]:
    return dict(zip(("loss", "prec1", "prec5"), (totals / steps).tolist(), strict=True))
