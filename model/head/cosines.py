"""Cosines between embeddings and many class centers, without a copy of the centers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.blocks import row_blocks

_MIN_LENGTH = 1e-12  # a shorter center is divided by this, as in torch's normalize
# Elements of the centers in a block: they fit the cache of a CPU core, or keep a GPU busy.
_BLOCK_SIZE = {"cpu": 2**18, "cuda": 2**26}


def cosines(embeddings: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products with all normalized class centers, and the centers of the target classes.

    Divides the products by the lengths of the centers instead of normalizing the (C, D) matrix, so no copy of it is
    made. Both outputs come from one autograd Function, so that their gradients accumulate in one (C, D) buffer.

    Args:
        embeddings: (N, D); of unit length if the products should be cosines.
        weight: (C, D) class centers of any length.
        target: (N,) int64 rows of `weight`.

    Returns:
        Products (N, C) with the centers scaled to unit length, and weight[target] (N, D), not scaled.
    """
    return _Cosines.apply(embeddings, weight, target)


# Derivation. Let y_ij = e_i . w_j / |w_j|, g_ij = dL/dy_ij and q_ij = g_ij / |w_j|. Then
#     dL/de_i = sum_j q_ij w_j
#     dL/dw_j = p_j - (p_j . w_j / |w_j|^2) w_j   with p_j = sum_i q_ij e_i,   since d(1/|w|)/dw = -w / |w|^3.
# The second term is the radial part of p_j: scaling w_j does not change y_ij, so the gradient has no part along w_j.
# The second output is weight[target], so its gradient is added to the target rows of dL/dw.
class _Cosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        length = weight.new_empty(len(weight))
        products = weight.new_empty(len(embeddings), len(weight))
        for rows in row_blocks(weight, _BLOCK_SIZE):
            length[rows] = torch.linalg.vector_norm(weight[rows], dim=1).clamp_min_(_MIN_LENGTH)
            torch.div(F.linear(embeddings, weight[rows]), length[rows], out=products[:, rows])
        ctx.save_for_backward(embeddings, weight, target, length)
        return products, weight.index_select(0, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_selected: Tensor) -> tuple[Tensor, Tensor, None]:
        embeddings, weight, target, length = ctx.saved_tensors
        grad_embeddings = torch.zeros_like(embeddings)
        grad_weight = torch.empty_like(weight)
        for rows in row_blocks(weight, _BLOCK_SIZE):
            centers = weight[rows]
            scaled = grad[:, rows] / length[rows]  # q, (N, rows)
            torch.mm(scaled.T, embeddings, out=grad_weight[rows])  # p
            radial = (grad_weight[rows] * centers).sum(1).div_(length[rows] ** 2)
            grad_weight[rows].addcmul_(centers, radial[:, None], value=-1)
            grad_embeddings.addmm_(scaled, centers)
        return grad_embeddings, grad_weight.index_add_(0, target, grad_selected), None
