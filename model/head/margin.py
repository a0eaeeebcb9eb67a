"""What the margin heads share: cosine logits, with a margin in the column of each sample's own class."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MarginHead(nn.Module, ABC):
    """Logits s * cos(embedding, class centre), the margin applied to each sample's own class.

    `weight` (out_features, in_features) holds a centre per class, of any length; from scratch Glorot-uniform. `s` and
    `m` are plain numbers, read at every forward: a trainer may change them between steps (margin warm-up).
    s <= 0 or m < 0 raises ValueError.

    Everything is computed in float32 at least, also under autocast: half precision cannot tell small angles apart.
    Beside the logits themselves nothing of shape (N, out_features) is made.
    """

    def __init__(self, in_features: int, out_features: int, s: float, m: float):
        super().__init__()
        if not s > 0:
            raise ValueError(f"{type(self).__name__}: the scale s is {s}, and must be positive")
        if not m >= 0:
            raise ValueError(f"{type(self).__name__}: the margin m is {m}, and must not be negative")
        self.in_features, self.out_features = in_features, out_features
        self.s, self.m = s, m
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (N, in_features) of any length, labels (N,) int64 -> scaled logits (N, out_features)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings, centres = _unit(embeddings), _unit(self.weight)
            logits = F.linear(embeddings * self.s, centres)  # (N, out_features)
            # Adding to the target column, unlike overwriting it, leaves the gradient of the logits as it is: no copy.
            rows = torch.arange(len(labels), device=labels.device)
            return logits.index_put_((rows, labels), self.s * self.added(embeddings, centres, labels), accumulate=True)

    @abstractmethod
    def added(self, embeddings: Tensor, centres: Tensor, labels: Tensor) -> Tensor:
        """What the margin adds to the cosine with the own class, (N,); embeddings and centres have unit length."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, s={self.s}, m={self.m}"


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)))
