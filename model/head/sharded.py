"""A margin head whose classes are spread over processes, or sampled: every process has logits of its own share."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.head.margin import MarginHead
from model.loss.focal import Loss
from model.loss.log_probability import sharded_log_probability


def shard_range(classes: int, rank: int, ranks: int) -> range:
    """The classes of one of `ranks` processes: contiguous; the first ones have one more where it does not divide."""
    size, more = divmod(classes, ranks)
    start = rank * size + min(rank, more)
    return range(start, start + size + (rank < more))


class PartialFC:
    """From the embeddings of this process to the loss of the samples of all, with a shard of the head.

    The processes are those of torch.distributed's default group, or this one, where there is none; all call it at
    once, with as many samples each. Embeddings and labels are gathered, so that each process has the logits of all
    samples for its own classes. Gradients are those of the mean loss over all samples: the head's are whole, and the
    embeddings' are multiplied by the number of processes, since DistributedDataParallel takes the mean of the
    backbone's gradients, where the sum is due.

    With a sample_rate below 1 only that share of the classes takes part in the softmax (Partial FC: An et al., "Killing
    Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC", CVPR 2022): those
    of the samples, filled up with others of the shard, drawn anew from (seed, step, rank). If there are more samples
    than that, as many classes as samples.
    """

    def __init__(self, head: MarginHead, loss: Loss, sample_rate: float = 1.0, seed: int = 0):
        if not 0 < sample_rate <= 1:
            raise ValueError(f"ShardedHead: sample_rate is {sample_rate}, and must be above 0, and 1 at most")
        self.head, self.loss, self._sample_rate, self._seed = head, loss, sample_rate, seed
        self._rank = dist.get_rank() if dist.is_initialized() else 0

    def __call__(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """embeddings (B, D) and labels (B,) of this process -> the loss, a scalar, and ranks (N,), of all N samples.

        A rank is the number of classes, of those that take part, whose logit is larger than that of the sample's own.
        """
        samples, labels = all_gather_with_grad(embeddings.to(self.head.weight.dtype)), _all_gather(labels)
        rows = self.head.rows
        columns = torch.where((labels >= rows.start) & (labels < rows.stop), labels - rows.start, -1)
        weight = self.head.weight
        if self._sample_rate < 1:
            chosen = self.sampled(columns)
            weight = weight.index_select(0, chosen)
            columns = torch.where(columns >= 0, torch.searchsorted(chosen, columns), -1)
        logits = self.head.logits(samples, weight, columns, absent=True)
        log_p, ranks = sharded_log_probability(logits, columns)
        return self.loss.of(log_p), ranks

    def sampled(self, columns: Tensor) -> Tensor:
        """Ascending numbers of own classes: all in columns (N,), where -1 is none, and random ones. Without a wait."""
        size = len(self.head.rows)
        count = min(size, max(math.ceil(self._sample_rate * size), len(columns)))
        draws = torch.Generator(columns.device).manual_seed(_mixed(self._seed, self.head.step, self._rank))
        priority = torch.rand(size + 1, generator=draws, device=columns.device)
        priority[torch.where(columns >= 0, columns, size)] = 2.0  # the last place stands for no class
        return priority[:size].topk(count).indices.sort().values


def _mixed(*numbers: int) -> int:
    """A seed of 63 bits from whole numbers, by the steps of SplitMix64 (Steele et al., 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def all_gather_with_grad(embeddings: Tensor) -> Tensor:
    """(B, D) of each process -> (N, D) of all. Backward sums the gradients over processes, times their number."""
    return _Gathered.apply(embeddings)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor) -> Tensor:
        return _all_gather(embeddings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if not dist.is_initialized():
            return gradient
        ranks = dist.get_world_size()
        own = gradient.new_empty(len(gradient) // ranks, *gradient.shape[1:])
        _REDUCE_SCATTER(own, gradient.contiguous())
        return own.mul_(ranks)


def _all_gather(values: Tensor) -> Tensor:
    if not dist.is_initialized():
        return values
    everything = values.new_empty(len(values) * dist.get_world_size(), *values.shape[1:])
    _ALL_GATHER(everything, values.contiguous())
    return everything


# torch 2.13 gave them new names, and warns of the old ones.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
