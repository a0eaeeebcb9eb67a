"""ArcFace: an angle added to the angle between an embedding and its class centre."""

import math

import torch
from torch import Tensor

from model.head.margin import MarginHead


class ArcFace(MarginHead):
    """Target logit s * cos(theta + m), with m in radians.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (2019), equation 3. Beyond
    theta = pi - m, where cos(theta + m) would rise again, the target is s * (cos(theta) - m * sin(m)), as in the
    authors' first code; with easy_margin the margin holds only where cos(theta) > 0, and the target is s * cos(theta)
    elsewhere.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.5,
        easy_margin: bool = False,
        rows: range | None = None,
    ):
        super().__init__(in_features, out_features, s, m, rows)
        self.easy_margin = easy_margin

    def margin_delta(self, embeddings: Tensor, own: Tensor) -> Tensor:
        cosine = (embeddings * own).sum(1)
        # sqrt(1 - cos^2) loses its digits near cos = +-1, and its gradient is infinite there. For unit vectors a, b
        # the same is |a - b| * |a + b| / 2: exact for the smallest angles, with a gradient of finite length.
        sine = torch.linalg.vector_norm(embeddings - own, dim=1) * torch.linalg.vector_norm(embeddings + own, dim=1) / 2
        shifted = cosine * (math.cos(self.m) - 1) - sine * math.sin(self.m)  # cos(theta + m) - cos(theta)
        if self.easy_margin:
            return torch.where(cosine > 0, shifted, 0.0)
        return torch.where(cosine > -math.cos(self.m), shifted, -self.m * math.sin(self.m))
