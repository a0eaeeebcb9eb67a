"""PartialFC: a margin head whose classes are split over processes, or sampled."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.head.margin import MarginHead
from model.loss.focal import Loss
from model.loss.log_probability import sharded_log_probability


def shard_range(num_classes: int, rank: int, world_size: int) -> range:
    """Return the contiguous classes of one rank; lower ranks get one more if the division leaves a remainder."""
    size, remainder = divmod(num_classes, world_size)
    start = rank * size + min(rank, remainder)
    return range(start, start + size + (rank < remainder))


class PartialFC:
    """Loss of the samples of all ranks, from the embeddings of this rank and a head that holds a shard of the classes.

    An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC",
    CVPR 2022. Uses the default process group, or this process alone if there is no group. The call is collective: all
    ranks call it, with equally many samples. Embeddings and labels are gathered, and each rank computes the logits of
    all samples for the classes of its shard.

    The gradients belong to the mean loss over all samples. The gradient of the head is complete. The gradient of the
    embeddings is multiplied by the world size: DistributedDataParallel then averages the gradients of the backbone over
    ranks, but their sum is needed.

    Args:
        head: holds the rows of this rank, see shard_range.
        loss: applied to the log probabilities of the target classes.
        sample_rate: fraction of the shard's classes in the softmax of a step, in (0, 1]. The classes of the samples are
            always included. If the samples outnumber the fraction, as many classes as samples are used.
        seed: the sampled classes depend on (seed, step, rank).

    Raises:
        ValueError: sample_rate is out of range.
    """

    def __init__(self, head: MarginHead, loss: Loss, sample_rate: float = 1.0, seed: int = 0):
        if not 0 < sample_rate <= 1:
            raise ValueError(f"PartialFC: sample_rate is {sample_rate}. It must be above 0 and at most 1")
        self.head = head
        self.loss = loss
        self._sample_rate = sample_rate
        self._seed = seed
        self._rank = dist.get_rank() if dist.is_initialized() else 0

    def __call__(
        self, embeddings: Tensor, labels: Tensor, margin: float | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the target ranks of the N samples of all ranks.

        Args:
            embeddings: (B, D) of this rank.
            labels: (B,) int64 of this rank.
            margin: margin of this step; None: the head's own m.
            step: number of the step in the run, from 0; it selects the sampled classes and random margins.

        Returns:
            Scalar loss, to which the head's regularizer is added, and (N,) number of sampled classes with a larger
            logit than the target class.
        """
        weight: torch.Tensor = self.head.weight
        embeddings = all_gather_with_grad(embeddings.to(weight.dtype))
        labels = _all_gather(labels)
        # Row of each sample's class in this shard; -1 if another rank holds the class.
        rows = self.head.rows
        is_local = (labels >= rows.start) & (labels < rows.stop)
        target = torch.where(is_local, labels - rows.start, -1)
        if self._sample_rate < 1:
            sampled = self.sample_classes(target, step)
            weight = weight.index_select(0, sampled)
            target = torch.where(target >= 0, torch.searchsorted(sampled, target), -1)
        logits = self.head.logits(embeddings, weight, target, margin=margin, step=step, sharded=True)
        log_prob, target_rank = sharded_log_probability(logits, target)
        regularizer = self.head.regularizer(embeddings)
        if dist.is_initialized():
            # Backward adds the gradients of all ranks, and each rank computes this term for all samples.
            fraction = regularizer / dist.get_world_size()
            regularizer = fraction + (regularizer - fraction).detach()
        return self.loss.from_log_prob(log_prob) + regularizer, target_rank

    def sample_classes(self, target: Tensor, step: int) -> Tensor:
        """Return ascending rows of the shard: all that occur in target (N,), and random others. -1 is ignored."""
        size = len(self.head.rows)
        count = min(size, max(math.ceil(self._sample_rate * size), len(target)))
        generator = torch.Generator(target.device).manual_seed(mix_seed(self._seed, step, self._rank))
        # A random priority in [0, 1) for each class, 2 for the target classes; the `count` highest are sampled. Nothing
        # here waits for a GPU. Ignored targets write to one more element, which is cut off.
        priority = torch.rand(size + 1, generator=generator, device=target.device)
        priority[torch.where(target >= 0, target, size)] = 2.0
        return priority[:size].topk(count).indices.sort().values


def mix_seed(*numbers: int) -> int:
    """Return a seed of 63 bits from integers, by the steps of SplitMix64 (Steele et al., 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def all_gather_with_grad(embeddings: Tensor) -> Tensor:
    """Gather (B, D) of each rank into (N, D); backward sums the gradient over ranks, times the world size."""
    return _AllGatherWithGrad.apply(embeddings)


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor) -> Tensor:
        return _all_gather(embeddings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if not dist.is_initialized():
            return grad
        world_size = dist.get_world_size()
        local_grad = grad.new_empty(len(grad) // world_size, *grad.shape[1:])
        _REDUCE_SCATTER(local_grad, grad.contiguous())
        return local_grad.mul_(world_size)


def _all_gather(values: Tensor) -> Tensor:
    if not dist.is_initialized():
        return values
    result = values.new_empty(len(values) * dist.get_world_size(), *values.shape[1:])
    _ALL_GATHER(result, values.contiguous())
    return result


# torch 2.13 renamed both collectives, and warns about the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
