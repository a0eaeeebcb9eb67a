"""What the margin heads share: cosine logits, with a margin in the column of each sample's own class."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.head.cosines import cosines

_ROWS_AT_ONCE = 65536  # centres drawn together, where a process keeps only some of them


class MarginHead(nn.Module, ABC):
    """Logits s * cos(embedding, class centre), the margin applied to each sample's own class.

    `weight` (out_features, in_features) holds a centre per class, of any length; from scratch Glorot-uniform. `s` and
    `m` are plain numbers, read at every forward: a trainer may change them between steps (margin warm-up). So is
    `step`, the number of the step, which is for those who draw at random, see ShardedHead.
    s <= 0 or m < 0 raises ValueError.

    With `rows` the head is a shard: it holds the centres of these classes alone, the very ones that the whole head
    would have drawn, and its forward is for ShardedHead to call.

    Everything is computed in float32 at least, also under autocast: half precision cannot tell small angles apart.
    Beside the logits themselves nothing of shape (N, out_features) is made, nor any copy of the centres.
    """

    def __init__(self, in_features: int, out_features: int, s: float, m: float, rows: range | None = None):
        super().__init__()
        if not s > 0:
            raise ValueError(f"{type(self).__name__}: the scale s is {s}, and must be positive")
        if not m >= 0:
            raise ValueError(f"{type(self).__name__}: the margin m is {m}, and must not be negative")
        self.in_features, self.out_features = in_features, out_features
        self.s, self.m, self.step = s, m, 0
        self.rows = range(out_features) if rows is None else rows
        self.weight = nn.Parameter(torch.empty(len(self.rows), in_features))
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """The Glorot-uniform centres of own classes; drawing those of the others too gives every shard its own."""
        bound = math.sqrt(6 / (self.in_features + self.out_features))
        for start in range(0, self.out_features, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, self.out_features)
            first, last = max(start, self.rows.start), min(stop, self.rows.stop)
            if (first, last) == (start, stop):
                self.weight[start - self.rows.start : stop - self.rows.start].uniform_(-bound, bound)
                continue
            drawn = torch.empty(stop - start, self.in_features).uniform_(-bound, bound)
            if first < last:
                self.weight[first - self.rows.start : last - self.rows.start] = drawn[first - start : last - start]

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (N, in_features) of any length, labels (N,) int64 -> scaled logits (N, out_features)."""
        return self.logits(embeddings, self.weight, labels)

    def logits(self, embeddings: Tensor, weight: Tensor, columns: Tensor, absent: bool = False) -> Tensor:
        """The same for any centres, weight (C, in_features), of which columns (N,) names each sample's own.

        With `absent`, columns may be -1: that sample's own class is not among them, and its logits have no margin.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings, weight = F.normalize(_float32(embeddings)), _float32(weight)
            own = columns.clamp_min(0) if absent else columns
            logits, centers = cosines(embeddings * self.s, weight, own)  # (N, C), (N, in_features)
            margin_delta = self.s * self.margin_delta(embeddings, F.normalize(centers))
            if absent:
                margin_delta = torch.where(columns >= 0, margin_delta, 0.0)
            # Adding to the target column, unlike overwriting it, leaves the gradient of the logits as it is: no copy.
            rows = torch.arange(len(own), device=own.device)
            return logits.index_put_((rows, own), margin_delta, accumulate=True)

    @abstractmethod
    def margin_delta(self, embeddings: Tensor, own: Tensor) -> Tensor:
        """What the margin adds to the cosines (N,) of embeddings and their own centres, (N, D) of unit length both."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, s={self.s}, m={self.m}"


def _float32(vectors: Tensor) -> Tensor:
    """In float32, or as they are if that is more."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
