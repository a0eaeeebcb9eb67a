"""ArcFace: a margin added to the angle between an embedding and the center of its class."""

import math

import torch
from torch import Tensor

from model.head.margin import MarginHead


class ArcFace(MarginHead):
    """Target logit s * cos(theta + m), with m in radians.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (2019), equation 3. Beyond
    theta = pi - m, cos(theta + m) would rise again. There the target is s * (cos(theta) - m * sin(m)), as in the
    authors' first code. With easy_margin the margin applies only where cos(theta) > 0; elsewhere the target is
    s * cos(theta).
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
        super().__init__(in_features, out_features, s=s, m=m, rows=rows)
        self.easy_margin = easy_margin

    def margin_delta(self, embeddings: Tensor, centers: Tensor, margin: float) -> Tensor:
        cosine = (embeddings * centers).sum(1)
        # sin(theta) as |a - b| * |a + b| / 2 for unit vectors a and b. It is exact for the smallest angles and has a
        # gradient of finite length. sqrt(1 - cos^2) loses its digits near cos = +-1, with an infinite gradient there.
        difference = torch.linalg.vector_norm(embeddings - centers, dim=1)
        sine = difference * torch.linalg.vector_norm(embeddings + centers, dim=1) / 2
        delta = cosine * (math.cos(margin) - 1) - sine * math.sin(margin)  # cos(theta + m) - cos(theta)
        if self.easy_margin:
            return torch.where(cosine > 0, delta, 0.0)
        return torch.where(cosine > -math.cos(margin), delta, -margin * math.sin(margin))
