"""ArcFace: a margin added to the angle between an embedding and the center of its class."""

import math
from typing import Any

import torch
from torch import Tensor

from model.head.margin import MarginHead, Samples


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
        **options: Any,
    ):
        super().__init__(in_features, out_features, s=s, m=m, **options)
        self.easy_margin = easy_margin

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        return angular_delta(samples, margin, self.easy_margin)


def angular_delta(samples: Samples, margin: float | Tensor, easy_margin: bool = False) -> Tensor:
    """Return cos(theta + margin) - cos(theta) (N,), and ArcFace's replacement where theta + margin exceeds pi.

    `margin` is one number of radians, or one for each sample (N,).
    """
    cos_margin = margin.cos() if isinstance(margin, Tensor) else math.cos(margin)
    sin_margin = margin.sin() if isinstance(margin, Tensor) else math.sin(margin)
    cosine = samples.cosine
    delta = cosine * (cos_margin - 1) - samples.sine * sin_margin
    if easy_margin:
        return torch.where(cosine > 0, delta, 0.0)
    return torch.where(cosine > -cos_margin, delta, -margin * sin_margin)
