"""Sub-center ArcFace: several centers for each class."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.head.arcface import ArcFace
from model.head.cosines import cosines


class SubCenterArcFace(ArcFace):
    """ArcFace, in which the cosine of a class is the largest of the cosines with its K centers.

    Deng et al., "Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces" (ECCV 2020). Images with
    a wrong label gather at centers of their own. `weight` is (out_features, k, in_features). The logits need k times
    the memory.
    """

    def __init__(
        self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.5, k: int = 3, **options: Any
    ):
        self.check(k >= 1, f"k is {k}. Each class needs 1 center or more")
        super().__init__(in_features, out_features, s=s, m=m, sub_centers=k, **options)

    def scaled_cosines(self, embeddings: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        k = weight.shape[1]
        with torch.no_grad():
            nearest = torch.einsum("nd,nkd->nk", embeddings, F.normalize(weight[index], dim=2)).argmax(1)
        products, centers = cosines(embeddings, weight.flatten(0, 1), index * k + nearest)
        return products.unflatten(1, (-1, k)).max(2).values, centers
