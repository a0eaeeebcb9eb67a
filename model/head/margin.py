"""The base class of margin heads: cosine logits, with a margin on the target class of each sample."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.head.cosines import cosines

_INIT_ROWS = 65536  # rows of a shard that are initialized together


class MarginHead(nn.Module, ABC):
    """Logits s * cos(embedding, class center), with a margin on the target class of each sample.

    `weight` (out_features, in_features) holds one center for each class, of any length, initialized Glorot-uniform.
    Everything is computed in float32 or float64, also under autocast: half precision cannot tell small angles apart.
    Apart from the logits, forward makes no tensor of shape (N, out_features) and no copy of the centers.

    Args:
        in_features: size of an embedding.
        out_features: number of classes.
        s: scale of the cosines, above 0.
        m: margin, 0 or more; forward uses it if no other margin is given.
        rows: classes of a shard. The head then holds only these rows of the weight, equal to the same rows of a head
            with all classes and the same seed. PartialFC computes the logits of a shard. None: all classes.

    Raises:
        ValueError: s or m is out of range.
    """

    def __init__(self, in_features: int, out_features: int, s: float, m: float, rows: range | None = None):
        super().__init__()
        if not s > 0:
            raise ValueError(f"{type(self).__name__}: the scale s is {s}. It must be positive")
        if not m >= 0:
            raise ValueError(f"{type(self).__name__}: the margin m is {m}. It must not be negative")
        self.in_features = in_features
        self.out_features = out_features
        self.s = s
        self.m = m
        self.rows = range(out_features) if rows is None else rows
        self.weight = nn.Parameter(torch.empty(len(self.rows), in_features))
        self.reset_parameters()

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
            block = torch.empty(stop - start, self.in_features).uniform_(-bound, bound)
            if first < last:
                self.weight[first - self.rows.start : last - self.rows.start] = block[first - start : last - start]

    def forward(self, embeddings: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
        """Return the scaled logits of all classes.

        Args:
            embeddings: (N, in_features), of any length.
            labels: (N,) int64 class of each sample.
            margin: replaces `m` in this call, for a margin that changes during training.

        Returns:
            (N, out_features) logits in float32 or float64.
        """
        return self.logits(embeddings, self.weight, labels, margin=margin)

    def logits(self, embeddings: Tensor, weight: Tensor, target: Tensor, margin: float | None = None) -> Tensor:
        """Return the scaled logits for any class centers.

        Args:
            embeddings: (N, in_features), of any length.
            weight: (C, in_features) class centers.
            target: (N,) int64 row of `weight` of each sample's class. -1: the class has no row in `weight`, and the
                sample gets no margin.
            margin: replaces `m` in this call.

        Returns:
            (N, C) logits in float32 or float64.
        """
        margin = self.m if margin is None else margin
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = F.normalize(_at_least_float32(embeddings))
            index = target.clamp_min(0)  # row 0 stands in for an ignored target; its margin is set to 0 below
            logits, centers = cosines(embeddings * self.s, _at_least_float32(weight), index)  # (N, C), (N, D)
            delta = self.s * self.margin_delta(embeddings, F.normalize(centers), margin)
            delta = torch.where(target >= 0, delta, 0.0)
            # Adding to the target logit, unlike overwriting it, passes the gradient of the logits on without a copy.
            sample = torch.arange(len(target), device=target.device)
            return logits.index_put_((sample, index), delta, accumulate=True)

    @abstractmethod
    def margin_delta(self, embeddings: Tensor, centers: Tensor, margin: float) -> Tensor:
        """Return the change of the target cosine, target(theta) - cos(theta), before the scale s.

        Args:
            embeddings: (N, in_features), of unit length.
            centers: (N, in_features) center of each sample's class, of unit length.
            margin: margin of this step, 0 or more.

        Returns:
            (N,) change of the cosine.
        """

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, s={self.s}, m={self.m}"


def _at_least_float32(vectors: Tensor) -> Tensor:
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
