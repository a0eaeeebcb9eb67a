"""One epoch of training."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from util.device import prefetch_to_device
from util.errors import RunError
from util.training.optim import Schedule
from util.transform import normalize

Report = Callable[[int, dict[str, float]], None]
# (embeddings (B, D), labels (B,), margin, step) -> (scalar loss, target rank (N,) of every sample in the loss)
LossFn = Callable[[Tensor, Tensor, float | None, int], tuple[Tensor, Tensor]]


class TrainingStep:
    """Forward, backward and optimizer update for one batch.

    The batch is split into `accumulate` micro-batches, whose gradients add up. Up to rounding, the new weights do not
    depend on `accumulate`, except that batch norm normalizes each micro-batch separately. Nothing here waits for a GPU,
    except the scaler.

    Args:
        backbone: may be wrapped in DataParallel or DistributedDataParallel.
        head: called with (embeddings, labels, margin=...).
        criterion: called with (logits, labels).
        optimizer: has the parameters of the backbone and the head.
        device: where the batches are.
        accumulate: micro-batches per batch.
        scaler: scales the loss for fp16, see util.device.
        loss_fn: replaces head and criterion if the head is sampled or split over ranks; usually a PartialFC.
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
        loss_fn: LossFn | None = None,
    ):
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.loss_fn = loss_fn or self._dense_loss
        self.optimizer = optimizer
        self.device = device
        self.accumulate = accumulate
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)

    def __call__(self, images: Tensor, labels: Tensor, margin: float | None = None, step: int = 0) -> Tensor:
        """Train on one batch.

        Args:
            images: (B, H, W, 3) uint8 RGB, on the device.
            labels: (B,) int64, on the device.
            margin: margin of this step; None: the head's own m.
            step: number of the step in the run, from 0.

        Returns:
            (3,) loss, top-1 and top-5 accuracy in percent, on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        size = -(-len(labels) // self.accumulate)
        *micro_batches, last = zip(images.split(size), labels.split(size), strict=True)
        totals = []
        # DistributedDataParallel averages the gradients over ranks once, in the backward of the last micro-batch.
        with getattr(self.backbone, "no_sync", nullcontext)():
            for micro_batch in micro_batches:
                totals.append(self._backward(*micro_batch, margin, step, weight=len(micro_batch[1]) / len(labels)))
        totals.append(self._backward(*last, margin, step, weight=len(last[1]) / len(labels)))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack(totals).sum(dim=0)

    def _backward(self, images: Tensor, labels: Tensor, margin: float | None, step: int, *, weight: float) -> Tensor:
        loss, target_rank = self.loss_fn(self.backbone(normalize(images)), labels, margin, step)
        loss = loss * weight
        self.scaler.scale(loss).backward()
        return torch.cat([loss.detach()[None], topk_accuracy(target_rank) * weight])

    def _dense_loss(self, embeddings: Tensor, labels: Tensor, margin: float | None, step: int) -> tuple[Tensor, Tensor]:
        logits = self.head(embeddings, labels, margin=margin)
        return self.criterion(logits, labels), target_rank(logits.detach(), labels)


def train_one_epoch(
    step: TrainingStep,
    batches: Iterable[tuple[Tensor, Tensor]],
    schedule: Schedule,
    epoch: int,
    report: Report,
    report_every: int = 100,
) -> dict[str, float]:
    """Train on all batches of one epoch.

    Numbers are copied from the device only when `report` is called.

    Args:
        step: trains on one batch.
        batches: (B, H, W, 3) uint8 images and (B,) labels, schedule.steps_per_epoch of them.
        schedule: learning rate and margin of each step.
        epoch: from 0.
        report: called with the finished steps and the averages so far, every `report_every` steps and at the end.
        report_every: in steps.

    Returns:
        Averages over the epoch: loss, prec1 and prec5 (top-1 and top-5 accuracy in percent, of the logits in the loss,
        with the margin), and the last learning rate as lr.

    Raises:
        RunError: the loss was no longer finite at a report.
    """
    step.backbone.train()
    step.head.train()
    totals = torch.zeros(3, device=step.device)
    averages: dict[str, float] = {}
    for index, (images, labels) in enumerate(prefetch_to_device(batches, step.device)):
        global_step = epoch * schedule.steps_per_epoch + index
        for group in step.optimizer.param_groups:
            group["lr"] = schedule.lr_at(global_step)
        totals += step(images, labels, margin=schedule.margin_at(global_step), step=global_step)
        done = index + 1
        if done % report_every == 0 or done == schedule.steps_per_epoch:
            loss, top1, top5 = (totals / done).tolist()
            averages = {"loss": loss, "prec1": top1, "prec5": top5, "lr": schedule.lr_at(global_step)}
            steps = range(max(0, done - report_every) + 1, done + 1)  # since the last report
            check_loss(loss, epoch, steps, "Lower --lr, or raise --warmup_epochs")
            report(done, averages)
    return averages


def check_loss(loss: float, epoch: int, steps: range, fix: str) -> None:
    """Raise RunError, ending in `fix`, if the loss is not finite. `epoch` counts from 0, `steps` of it from 1."""
    if not math.isfinite(loss):
        raise RunError(f"the loss became {loss} in epoch {epoch + 1}, between steps {steps[0]} and {steps[-1]}. {fix}")


def target_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of classes (N,) with a larger logit than each label: 0 if the label has the highest."""
    return (logits > logits.gather(1, labels[:, None])).sum(dim=1)


def topk_accuracy(target_rank: Tensor) -> Tensor:
    """Return top-1 and top-5 accuracy (2,) in percent, from the target ranks (N,)."""
    return torch.stack([(target_rank < k).float().mean() * 100 for k in (1, 5)])
