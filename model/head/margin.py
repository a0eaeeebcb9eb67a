"""The base class of margin heads: cosine logits, with a margin on the target class of each sample."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.head.cosines import cosines

_INIT_ROWS = 65536  # rows of a shard that are initialized together


@dataclass(frozen=True)
class Samples:
    """The N samples of a call and the centers of their classes: what a margin may depend on."""

    features: Tensor  # (N, D) embeddings of any length
    embeddings: Tensor  # (N, D) of unit length
    centers: Tensor  # (N, D) of unit length; meaningless where the target is -1
    target: Tensor  # (N,) row of each sample's class; -1 if another rank has the class
    step: int
    sharded: bool  # other ranks have the centers of the targets -1

    @cached_property
    def lengths(self) -> Tensor:
        """Return the lengths of the embeddings (N,)."""
        return torch.linalg.vector_norm(self.features, dim=1)

    @cached_property
    def cosine(self) -> Tensor:
        """Return the cosine of the angle between embedding and center (N,)."""
        return (self.embeddings * self.centers).sum(1)

    @cached_property
    def sine(self) -> Tensor:
        """Return the sine of the angle between embedding and center (N,).

        |a - b| * |a + b| / 2 for unit vectors a and b. It is exact for the smallest angles and has a gradient of finite
        length. sqrt(1 - cos^2) loses its digits near cos = +-1, with an infinite gradient there.
        """
        difference = torch.linalg.vector_norm(self.embeddings - self.centers, dim=1)
        return difference * torch.linalg.vector_norm(self.embeddings + self.centers, dim=1) / 2

    @cached_property
    def angle(self) -> Tensor:
        """Return the angle between embedding and center (N,), in radians."""
        return torch.atan2(self.sine, self.cosine)

    def all_cosines(self) -> Tensor:
        """Return `cosine` without a gradient, also for classes of other ranks. Collective if sharded."""
        cosine = torch.where(self.target >= 0, self.cosine.detach(), -math.inf)
        if self.sharded and dist.is_initialized():
            dist.all_reduce(cosine, dist.ReduceOp.MAX)
        return cosine


class MarginHead(nn.Module, ABC):
    """Logits s * cos(embedding, class center), with a margin on the target class of each sample.

    `weight` (out_features, in_features) holds one center for each class, of any length, initialized Glorot-uniform.
    Everything is computed in float32 or float64, also under autocast: half precision cannot tell small angles apart.
    Unless a subclass needs more, forward makes no tensor of shape (N, out_features) apart from the logits, and no copy
    of the centers.

    Some heads keep statistics of the training samples in buffers. In training mode each call updates them, so with
    gradient accumulation each micro-batch does. They are part of the state dict and equal on all ranks.

    Args:
        in_features: size of an embedding.
        out_features: number of classes.
        s: scale of the cosines, above 0.
        m: margin, 0 or more; forward uses it if no other margin is given.
        rows: classes of a shard. The head then holds only these rows of the weight, equal to the same rows of a head
            with all classes and the same seed. PartialFC computes the logits of a shard. None: all classes.
        interclass_filtering_threshold: in (0, 1]: the logits of other classes are set to 0 where their cosine is above
            it. An image labeled with the wrong identity is then not pushed away from the right one (An et al.,
            "Killing Two Birds with One Stone", CVPR 2022). 0: off.
        seed: random margins depend on (seed, step).
        sub_centers: K, for a subclass in which each class has K centers; `weight` is then (out_features, K,
            in_features).

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float,
        m: float,
        rows: range | None = None,
        interclass_filtering_threshold: float = 0.0,
        seed: int = 0,
        sub_centers: int | None = None,
    ):
        super().__init__()
        self.check(s > 0, f"the scale s is {s}. It must be positive")
        self.check(m >= 0, f"the margin m is {m}. It must not be negative")
        threshold = interclass_filtering_threshold
        self.check(0 <= threshold <= 1, f"interclass_filtering_threshold is {threshold}. It must be from 0 to 1")
        self.in_features = in_features
        self.out_features = out_features
        self.s = s
        self.m = m
        self.rows = range(out_features) if rows is None else rows
        self.interclass_filtering_threshold = interclass_filtering_threshold
        self.seed = seed
        center_shape = (in_features,) if sub_centers is None else (sub_centers, in_features)
        self.weight = nn.Parameter(torch.empty(len(self.rows), *center_shape))
        self.reset_parameters()

    def check(self, valid: bool, message: str) -> None:
        """Raise ValueError with the name of the class and the message, unless `valid`."""
        if not valid:
            raise ValueError(f"{type(self).__name__}: {message}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the weight Glorot-uniform.

        The random numbers of the other shards are generated too and discarded. So the weight of a class does not depend
        on the number of processes.
        """
        bound = math.sqrt(6 / (self.in_features + self.out_features))
        for start in range(0, self.out_features, _INIT_ROWS):
            stop = min(start + _INIT_ROWS, self.out_features)
            # The classes of this block that the shard holds: first ... last - 1.
            first = max(start, self.rows.start)
            last = min(stop, self.rows.stop)
            if first == start and last == stop:  # the full block: no temporary copy
                self.weight[start - self.rows.start : stop - self.rows.start].uniform_(-bound, bound)
                continue
            block = torch.empty(stop - start, *self.weight.shape[1:]).uniform_(-bound, bound)
            if first < last:
                self.weight[first - self.rows.start : last - self.rows.start] = block[first - start : last - start]

    def forward(self, embeddings: Tensor, labels: Tensor, margin: float | None = None, step: int = 0) -> Tensor:
        """Return the scaled logits of all classes.

        Args:
            embeddings: (N, in_features), of any length.
            labels: (N,) int64 class of each sample.
            margin: replaces `m` in this call, for a margin that changes during training.
            step: number of the step in the run, from 0; it selects random margins.

        Returns:
            (N, out_features) logits in float32 or float64.
        """
        return self.logits(embeddings, self.weight, labels, margin=margin, step=step)

    def logits(
        self,
        embeddings: Tensor,
        weight: Tensor,
        target: Tensor,
        margin: float | None = None,
        step: int = 0,
        sharded: bool = False,
    ) -> Tensor:
        """Return the scaled logits for any class centers.

        Args:
            embeddings: (N, in_features), of any length.
            weight: (C, in_features) class centers, or (C, K, in_features).
            target: (N,) int64 row of `weight` of each sample's class. -1: the class has no row in `weight`, and the
                sample gets no margin.
            margin: replaces `m` in this call.
            step: number of the step in the run.
            sharded: the other ranks of the process group compute the other classes of the same samples now. Heads
                that compare the samples of a batch then learn the target cosines of all samples (one all-reduce).

        Returns:
            (N, C) logits in float32 or float64.
        """
        margin = self.m if margin is None else margin
        with torch.autocast(embeddings.device.type, enabled=False):
            features = at_least_float32(embeddings)
            embeddings = F.normalize(features)
            is_local = target >= 0
            index = target.clamp_min(0)  # row 0 stands in for an ignored target; its margin is set to 0 below
            logits, centers = self.scaled_cosines(embeddings * self.s, at_least_float32(weight), index)
            samples = Samples(features, embeddings, F.normalize(centers), target=target, step=step, sharded=sharded)
            position = (torch.arange(len(target), device=target.device), index)
            if self.interclass_filtering_threshold > 0:
                is_filtered = logits > self.s * self.interclass_filtering_threshold
                is_filtered[position] &= ~is_local
                logits = logits.masked_fill_(is_filtered, 0.0)
            logits = self.adjust_other_logits(logits, samples, margin)
            delta = self.s * self.margin_delta(samples, margin)
            delta = torch.where(is_local, delta, 0.0)
            # Adding to the target logit, unlike overwriting it, passes the gradient of the logits on without a copy.
            return logits.index_put_(position, delta, accumulate=True)

    def scaled_cosines(self, embeddings: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the products (N, C) with the normalized centers, and the centers (N, D) of the target classes."""
        return cosines(embeddings, weight, index)

    def adjust_other_logits(self, logits: Tensor, samples: Samples, margin: float) -> Tensor:
        """Return the logits (N, C) after a change, possibly in place, of all but the target logits."""
        return logits

    @abstractmethod
    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        """Return the change (N,) of the target cosine, target(theta) - cos(theta), before the scale s.

        `margin` is the margin of this step. A margin of 0 changes nothing.
        """

    def regularizer(self, embeddings: Tensor) -> Tensor:
        """Return a scalar that the training step adds to the loss of the embeddings (N, in_features)."""
        return embeddings.new_zeros(())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, s={self.s}, m={self.m}"


def at_least_float32(vectors: Tensor) -> Tensor:
    """Convert half precision to float32."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
