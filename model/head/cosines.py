"""Cosines with many class centres, without a copy of the centres."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORTEST = 1e-12  # a length that is divided by, as in torch's normalize
# Numbers of the centres that are worked on together: what the cache of a core holds, or much for a GPU.
_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}


def cosines(embeddings: Tensor, weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """embeddings (N, D), weight (C, D) of centres of any length, columns (N,) -> products with the unit centres (N, C),
    and the centres that columns name, as they are (N, D).

    The products are divided by the centres' lengths, and not the centres: of shape (C, D) nothing is made but the
    gradient. Both outputs are given together because their gradients then meet in that one matrix.
    """
    return _Cosines.apply(embeddings, weight, columns)


class _Cosines(torch.autograd.Function):
    """For e . w / |w|, the gradient of w is that of w / |w|, P = sum of g e / |w|, less its part along w."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        length, products = weight.new_empty(len(weight)), weight.new_empty(len(embeddings), len(weight))
        for rows in _blocks(weight):
            length[rows] = torch.linalg.vector_norm(weight[rows], dim=1).clamp_min_(_SHORTEST)
            torch.div(F.linear(embeddings, weight[rows]), length[rows], out=products[:, rows])
        ctx.save_for_backward(embeddings, weight, columns, length)
        return products, weight.index_select(0, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_named: Tensor) -> tuple[Tensor, Tensor, None]:
        embeddings, weight, columns, length = ctx.saved_tensors
        of_embeddings, of_weight = torch.zeros_like(embeddings), torch.empty_like(weight)
        for rows in _blocks(weight):
            centers, each = weight[rows], gradient[:, rows] / length[rows]
            torch.mm(each.T, embeddings, out=of_weight[rows])
            along = (of_weight[rows] * centers).sum(1).div_(length[rows] ** 2)
            of_weight[rows].addcmul_(centers, along[:, None], value=-1)
            of_embeddings.addmm_(each, centers)
        return of_embeddings, of_weight.index_add_(0, columns, of_named), None


def _blocks(weight: Tensor) -> Iterator[slice]:
    size = max(1, _AT_ONCE.get(weight.device.type, _AT_ONCE["cuda"]) // weight.shape[1])
    return (slice(start, start + size) for start in range(0, len(weight), size))
