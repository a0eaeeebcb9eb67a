"""Training steps, and the loop over the steps of an epoch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.head import MarginHead
from util.console import logger
from util.device import prefetch_to_device
from util.errors import RunError
from util.training.optim import StepSchedule
from util.transform import normalize

Report = Callable[[int, dict[str, float]], None]
# (embeddings (B, D), labels (B,), margin, step) -> (scalar loss, target rank (N,) of every sample in the loss)
LossFn = Callable[[Tensor, Tensor, float | None, int], tuple[Tensor, Tensor]]

MAX_SKIPPED_IN_ROW = 5  # steps without a finite loss and finite gradients
_MAX_SKIPPED_LINES = 10  # on the console in an epoch


class Step(ABC):
    """Forward, backward and optimizer update for one batch. It is skipped if the loss or a gradient is not finite.

    A skipped step changes no weight and no running statistic. With a loss scaler the gradients may overflow until the
    scale is small enough: the scaler skips these steps, and they count as trained.

    Args:
        networks: what is trained: the network that sees the batch, wrapped as it is called, and others, which may be
            shards of a network that is split over the ranks.
        optimizer: has their parameters.
        device: where the batches are.
        scaler: scales the loss for fp16, see util.device.
        agree: returns whether a boolean tensor is true on this rank, and on all others.
        clip_grad_norm: largest norm of the gradients of all networks and shards together. 0: any norm.
    """

    names: tuple[str, ...]  # of the values of a step; the loss is the first
    remedy = "Lower --lr"  # for a loss that is not finite

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        scaler: torch.amp.GradScaler | None = None,
        agree: Callable[[Tensor], bool] = bool,
        clip_grad_norm: float = 0.0,
    ):
        self.networks = networks
        self.optimizer = optimizer
        self.device = device
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.agree = agree
        self.clip_grad_norm = clip_grad_norm
        self._parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self._buffers = [buffer for network in networks for buffer in network.buffers()]

    def __call__(
        self, images: Tensor, target: Tensor, margin: float | None = None, step: int = 0
    ) -> tuple[Tensor, bool]:
        """Train on one batch.

        Args:
            images: (B, H, W, 3) uint8 RGB, on the device.
            target: labels (B,) or images, on the device.
            margin: margin of this step; None: the head's own m.
            step: number of the step in the run, from 0.

        Returns:
            The values (len(names),) on the device, and whether the step counts. It was skipped if not.
        """
        saved = [buffer.clone() for buffer in self._buffers]
        self.optimizer.zero_grad(set_to_none=True)
        values = self.backward(images, target, margin, step)
        is_finite = self.agree(self._is_finite(values[0]))
        if is_finite or self.scaler.is_enabled():  # the scaler skips by itself, and lowers the scale
            if self.clip_grad_norm:
                self.clip_gradients()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if not is_finite:
            for buffer, value in zip(self._buffers, saved, strict=True):
                buffer.copy_(value)
        return values, is_finite

    def _is_finite(self, loss: Tensor) -> Tensor:
        if self.scaler.is_enabled():
            return torch.isfinite(loss) & (self.scaler.get_scale() >= 1)
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        # The norm is the largest absolute value, which cannot overflow.
        return torch.isfinite(loss) & torch.isfinite(nn.utils.get_total_norm(gradients, math.inf))

    def clip_gradients(self) -> None:
        """Scale all gradients down to a norm of clip_grad_norm, if it is larger. Collective."""
        self.scaler.unscale_(self.optimizer)
        first, *others = (
            nn.utils.get_total_norm([each.grad for each in network.parameters() if each.grad is not None]).square()
            for network in self.networks
        )
        for square in others:
            if dist.is_initialized():
                dist.all_reduce(square)
            first = first + square
        nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad_norm, first.sqrt())

    @abstractmethod
    def backward(self, images: Tensor, target: Tensor, margin: float | None, step: int) -> Tensor:
        """Add the gradients of a batch, and return its values (len(names),)."""

    def train(self, mode: bool = True) -> None:
        """Put the networks into training mode, or into eval mode."""
        for network in self.networks:
            network.train(mode)

    @torch.no_grad()
    def has_finite_output(self, images: Tensor) -> bool:
        """Return whether the first network, in eval mode, has a finite output on all ranks."""
        self.train(False)
        output = self.networks[0](self.prepare(images))
        self.train()
        return self.agree(torch.isfinite(output).all())

    def prepare(self, images: Tensor) -> Tensor:
        """Return uint8 RGB images (B, H, W, 3) as the first network is shown them, (B, 3, H, W)."""
        return normalize(images)


class TrainingStep(Step):
    """A step of the backbone and the head. Its values are the loss, and top-1 and top-5 accuracy in percent.

    The batch is split into `accumulate` micro-batches, whose gradients add up. Up to rounding, the new weights do not
    depend on `accumulate`, except that batch norm normalizes each micro-batch separately.

    Args:
        backbone: may be wrapped in DataParallel or DistributedDataParallel.
        head: a MarginHead.
        criterion: called with (logits, labels).
        optimizer: has the parameters of the backbone and the head.
        device: where the batches are.
        accumulate: micro-batches per batch.
        scaler: scales the loss for fp16, see util.device.
        loss_fn: replaces head and criterion if the head is sampled or split over ranks; usually a PartialFC.
        agree: see Step.
        clip_grad_norm: see Step.
    """

    names = ("loss", "prec1", "prec5")
    remedy = "Lower --lr, or raise --warmup_epochs"

    def __init__(
        self,
        backbone: nn.Module,
        head: MarginHead,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        loss_fn: LossFn | None = None,
        agree: Callable[[Tensor], bool] = bool,
        clip_grad_norm: float = 0.0,
    ):
        super().__init__((backbone, head), optimizer, device, scaler=scaler, agree=agree, clip_grad_norm=clip_grad_norm)
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.loss_fn = loss_fn or self._dense_loss
        self.accumulate = accumulate
        self.is_frozen = False  # the head is trained alone: the backbone is in eval mode and gets no gradients

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()

    def backward(self, images: Tensor, target: Tensor, margin: float | None, step: int) -> Tensor:
        size = -(-len(target) // self.accumulate)
        *micro_batches, last = zip(images.split(size), target.split(size), strict=True)
        totals = []
        # DistributedDataParallel averages the gradients over ranks once, in the backward of the last micro-batch.
        with getattr(self.backbone, "no_sync", nullcontext)():
            for micro_batch in micro_batches:
                totals.append(self._backward(*micro_batch, margin, step, weight=len(micro_batch[1]) / len(target)))
        totals.append(self._backward(*last, margin, step, weight=len(last[1]) / len(target)))
        return torch.stack(totals).sum(dim=0)

    def _backward(self, images: Tensor, labels: Tensor, margin: float | None, step: int, *, weight: float) -> Tensor:
        # Without gradients DistributedDataParallel only calls the backbone. It waits for no gradients, and is not in
        # the way of the first step that trains the backbone.
        with torch.set_grad_enabled(not self.is_frozen):
            embeddings = self.backbone(normalize(images))
        loss, target_rank = self.loss_fn(embeddings, labels, margin, step)
        loss = loss * weight
        self.scaler.scale(loss).backward()
        return torch.cat([loss.detach()[None], topk_accuracy(target_rank) * weight])

    def _dense_loss(self, embeddings: Tensor, labels: Tensor, margin: float | None, step: int) -> tuple[Tensor, Tensor]:
        logits = self.head(embeddings, labels, margin=margin, step=step)
        loss = self.criterion(logits, labels) + self.head.regularizer(embeddings)
        return loss, target_rank(logits.detach(), labels)


@dataclass
class EpochProgress:
    """What is done of an epoch. An exact resume within the epoch continues from it."""

    step: int = 0  # finished steps, skipped ones included
    skipped: int = 0
    skipped_in_row: int = 0
    totals: Tensor | None = None  # sums of the values over the steps that were not skipped, on the device
    is_complete: bool = False  # also what follows the last step

    def averages(self, names: Sequence[str]) -> dict[str, float]:
        """Return the mean of each value, NaN if all steps were skipped."""
        if self.totals is None:
            return dict.fromkeys(names, math.nan)
        return dict(zip(names, (self.totals / (self.step - self.skipped)).tolist(), strict=True))

    def move(self, step: int) -> None:
        """Continue at another step of the epoch with the same averages: the size of the batches has changed."""
        if self.totals is not None:
            self.totals *= step / (self.step - self.skipped)
        self.step = step
        self.skipped = 0
        self.is_complete = False


def train_one_epoch(
    step: Step,
    batches: Iterable[tuple[Tensor, Tensor]],
    schedule: StepSchedule,
    epoch: int,
    report: Report,
    report_every: int = 100,
    progress: EpochProgress | None = None,
    after_step: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Train on the batches of one epoch, or on those that are left of it.

    Args:
        step: trains on one batch.
        batches: (B, H, W, 3) uint8 images and their targets.
        schedule: learning rate and margin of each step; the epoch has schedule.steps_per_epoch of them.
        epoch: from 0.
        report: called with the finished steps and the averages so far, every `report_every` steps and at the end.
        report_every: in steps.
        progress: what is done of the epoch; it is updated.
        after_step: called after each step. It may raise to stop there.

    Returns:
        Averages over the epoch: each of step.names, and the last learning rate as lr.

    Raises:
        RunError: MAX_SKIPPED_IN_ROW steps in a row were skipped, or the last one was and the output is not finite.
    """
    progress = progress or EpochProgress()
    step.train()
    first_step = epoch * schedule.steps_per_epoch
    averages = progress.averages(step.names) | {"lr": schedule.lr_at(first_step + progress.step - 1)}
    for images, target in prefetch_to_device(batches, step.device):
        global_step = first_step + progress.step
        lr = schedule.lr_at(global_step)
        for group in step.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        values, is_finite = step(images, target, margin=schedule.margin_at(global_step), step=global_step)
        progress.step += 1
        if is_finite:
            progress.totals = values if progress.totals is None else progress.totals + values
            progress.skipped_in_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_row += 1
            loss = values[0].item()
            what = "a gradient" if math.isfinite(loss) else "the loss"
            where = f"step {progress.step} of epoch {epoch + 1}, at a learning rate of {lr:g}"
            is_last = progress.step == schedule.steps_per_epoch
            if progress.skipped_in_row == MAX_SKIPPED_IN_ROW or (is_last and not step.has_finite_output(images)):
                raise RunError(
                    f"{what} became infinite or not a number in {progress.skipped_in_row} steps in a row, up to "
                    f"{where}. {step.remedy}"
                )
            if progress.skipped <= _MAX_SKIPPED_LINES:
                logger.info(f"warning: {what} is infinite or not a number in {where}: the step is skipped")
        if progress.step % report_every == 0 or progress.step == schedule.steps_per_epoch:
            averages = progress.averages(step.names) | {"lr": lr}
            report(progress.step, averages)
        after_step()
    return averages


def target_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of classes (N,) with a larger logit than each label: 0 if the label has the highest."""
    return (logits > logits.gather(1, labels[:, None])).sum(dim=1)


def topk_accuracy(target_rank: Tensor) -> Tensor:
    """Return top-1 and top-5 accuracy (2,) in percent, from the target ranks (N,)."""
    return torch.stack([(target_rank < k).float().mean() * 100 for k in (1, 5)])
