"""The log probability of each sample's own class: what every loss here is a function of."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits that are worked on together: what the cache of a core holds, or keeps a GPU busy.
_AT_ONCE = {"cpu": 2**18, "cuda": 2**23}


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (N, C) of any size, labels (N,) int64 -> log(softmax(logits)) of each label, (N,), in float32 at least."""
    return _LogProbability.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, False)[0]


def sharded_log_probability(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the classes are spread over the processes of torch.distributed; N samples, the same in each.

    logits (N, C_own) float32 or wider, of this process's classes; columns (N,) int64, the label's place among them, or
    -1 where another process has it. Returns, the same on all, the log probabilities (N,) and the ranks (N,): how many
    classes have a larger logit than the label.

    Two reductions of 2N numbers: the maximum, with the label's logit, which one process knows; then the sum of the
    exponentials, with the counts of larger logits. The gradient of the logits needs nothing of the others, if all of
    them compute the same loss from what is returned.
    """
    return _LogProbability.apply(logits, columns, True)


class _LogProbability(torch.autograd.Function):
    """d log p_label / d logits = onehot(label) - softmax, made once, in the gradient's own memory.

    Beside the logits and that gradient nothing of shape (N, C) exists, where log_softmax and its loss keep two more.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, sharded: bool) -> tuple[Tensor, Tensor | None]:
        own = columns.clamp_min(0)[:, None]
        known = torch.where(columns >= 0, logits.gather(1, own)[:, 0], -math.inf)
        largest = logits.amax(1)
        if sharded:
            largest, known = _reduced(largest, known, dist.ReduceOp.MAX)
        total, rank = torch.empty_like(largest), torch.empty_like(largest)
        for rows in _blocks(logits):
            block = logits[rows]
            total[rows] = (block - largest[rows, None]).exp_().sum(1)
            if sharded:
                rank[rows] = (block > known[rows, None]).sum(1).to(rank.dtype)
        if sharded:
            total, rank = _reduced(total, rank, dist.ReduceOp.SUM)
        log_p = (known - largest) - total.log()
        ctx.save_for_backward(logits, columns, largest + total.log(), log_p)
        ctx.mark_non_differentiable(rank)
        return log_p, rank

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, columns, normalizer, log_p = ctx.saved_tensors
        # Of the label's own logit it is 1 - p, which expm1 gives without rounding p; elsewhere -p.
        spread = torch.empty_like(logits)
        for rows in _blocks(logits):
            torch.sub(logits[rows], normalizer[rows, None], out=spread[rows])
            spread[rows].exp_().mul_(-gradient[rows, None])
        own = columns.clamp_min(0)[:, None]
        right = torch.where(columns >= 0, -torch.expm1(log_p) * gradient, spread.gather(1, own)[:, 0])
        return spread.scatter_(1, own, right[:, None]), None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _AT_ONCE.get(logits.device.type, 2**22) // max(1, logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _reduced(first: Tensor, second: Tensor, operation: Any) -> tuple[Tensor, Tensor]:
    """Both (N,) reduced over the processes, in one message."""
    if not dist.is_initialized():
        return first, second
    both = torch.stack([first, second])
    dist.all_reduce(both, operation)
    return both[0], both[1]
