"""Log probability of each sample's target class, with little memory and over classes that are split over ranks."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.blocks import row_blocks

# Logits in a block: they fit the cache of a CPU core, or keep a GPU busy.
_BLOCK_SIZE = {"cpu": 2**18, "cuda": 2**23}


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log(softmax(logits)) (N,) of the labels (N,) int64, for logits (N, C), in float32 or float64."""
    return _LogProbability.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, False)[0]


def sharded_log_probability(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probability and the rank of each target where the classes are split over ranks.

    The call is collective. It needs two all-reduces of 2N numbers: the maximum together with the target logit, which
    one rank knows; then the sum of exponentials together with the number of larger logits. Backward communicates
    nothing, provided that all ranks compute the same loss from the result.

    Args:
        logits: (N, C_local) float32 or float64, for the classes of this rank and the same N samples on all ranks.
        target: (N,) int64 column of the sample's class; -1 if another rank has this class.

    Returns:
        (N,) log probabilities, and (N,) number of classes with a larger logit than the target. Equal on all ranks.
    """
    return _LogProbability.apply(logits, target, True)


# Derivation. For sample i with logits z_ij, probabilities p_ij = softmax(z_i)_j and target t:
#     log p_it = z_it - log sum_j exp(z_ij),   so   d log p_it / d z_ij = [j == t] - p_ij.
# With g_i = dL / d log p_it, dL / d z_ij is -g_i p_ij for j != t, and g_i (1 - p_it) for j == t. The second is computed
# as -expm1(log p_it) g_i, which keeps its digits near p_it = 1. Nothing of shape (N, C) is made but this gradient;
# log_softmax and its loss keep two more tensors of this shape.
class _LogProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, sharded: bool) -> tuple[Tensor, Tensor]:
        index = target.clamp_min(0)[:, None]
        # Logit of the target; -inf where another rank has the class, so that MAX over ranks finds it.
        target_logit = torch.where(target >= 0, logits.gather(1, index)[:, 0], -math.inf)
        largest = logits.amax(1)
        if sharded:
            largest, target_logit = _all_reduce_pair(largest, target_logit, dist.ReduceOp.MAX)
        total = torch.empty_like(largest)  # sum of exp(logit - largest)
        target_rank = torch.empty_like(largest)  # logits above the target's; computed only if sharded
        for rows in row_blocks(logits, _BLOCK_SIZE):
            block = logits[rows]
            total[rows] = (block - largest[rows, None]).exp_().sum(1)
            if sharded:
                target_rank[rows] = (block > target_logit[rows, None]).sum(1).to(target_rank.dtype)
        if sharded:
            total, target_rank = _all_reduce_pair(total, target_rank, dist.ReduceOp.SUM)
        log_prob = (target_logit - largest) - total.log()
        ctx.save_for_backward(logits, target, largest + total.log(), log_prob)
        ctx.mark_non_differentiable(target_rank)
        return log_prob, target_rank

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, target, normalizer, log_prob = ctx.saved_tensors
        # -g p for all classes ...
        grad = torch.empty_like(logits)
        for rows in row_blocks(logits, _BLOCK_SIZE):
            torch.sub(logits[rows], normalizer[rows, None], out=grad[rows])
            grad[rows].exp_().mul_(-grad_log_prob[rows, None])
        # ... and g (1 - p) for the target; an ignored target leaves column 0 unchanged.
        index = target.clamp_min(0)[:, None]
        target_grad = torch.where(target >= 0, -torch.expm1(log_prob) * grad_log_prob, grad.gather(1, index)[:, 0])
        return grad.scatter_(1, index, target_grad[:, None]), None, None


def _all_reduce_pair(first: Tensor, second: Tensor, operation: Any) -> tuple[Tensor, Tensor]:
    """Reduce two (N,) tensors over ranks in one message."""
    if not dist.is_initialized():
        return first, second
    both = torch.stack([first, second])
    dist.all_reduce(both, operation)
    return both[0], both[1]
