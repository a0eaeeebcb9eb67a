"""AdaFace: a margin that depends on the length of the embedding, compared with the lengths of recent embeddings."""

import math
from typing import Any

import torch
from torch import Tensor

from model.head.margin import MarginHead, Samples

_EPS = 1e-3


class AdaFace(MarginHead):
    """Target logit s * (cos(theta - m * z) - m * (z + 1)), where z in [-1, 1] grows with the embedding's length.

    Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition" (CVPR 2022). z is h times the length's
    distance from the mean in standard deviations. The buffers batch_mean and batch_std are moving averages
    over the batches. As in the authors' code, lengths have no gradient and are limited to [0.001, 100], the target
    cosine is limited to [-0.999, 0.999], and the angle theta - m * z to [0.001, pi - 0.001]. The authors limit the
    cosines of the other classes too, because they compute their acos. Here they are not limited.

    Args:
        in_features: size of an embedding.
        out_features: number of classes.
        s: scale of the cosines.
        m: margin.
        h: concentration: a length one standard deviation above the mean has z = h.
        t_alpha: weight of the newest batch in the moving averages.
        **options: see MarginHead.
    """

    batch_mean: Tensor
    batch_std: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.4,
        h: float = 0.333,
        t_alpha: float = 0.01,
        **options: Any,
    ):
        super().__init__(in_features, out_features, s=s, m=m, **options)
        self.check(h >= 0, f"h is {h}. It must not be negative")
        self.check(0 <= t_alpha <= 1, f"t_alpha is {t_alpha}. It must be from 0 to 1")
        self.h = h
        self.t_alpha = t_alpha
        self.register_buffer("batch_mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("batch_std", torch.tensor(100.0, dtype=torch.float64))

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        lengths = samples.lengths.detach().clamp(1e-3, 100.0)
        if self.training and len(lengths) > 1:  # one sample has no standard deviation
            self.batch_mean.lerp_(lengths.mean().to(self.batch_mean), self.t_alpha)
            self.batch_std.lerp_(lengths.std().to(self.batch_std), self.t_alpha)
        z = ((lengths - self.batch_mean) / (self.batch_std + _EPS) * self.h).clamp(-1.0, 1.0)

        turn = -margin * z
        smallest = math.acos(1 - _EPS)
        turned = samples.angle.detach().clamp(smallest, math.pi - smallest) + turn
        limited = turned.clamp(_EPS, math.pi - _EPS)
        cosine = samples.cosine
        delta = cosine * (turn.cos() - 1) - samples.sine * turn.sin()  # cos(theta + turn) - cos(theta)
        is_limited = (cosine.abs() > 1 - _EPS) | (turned != limited)
        delta = torch.where(is_limited, limited.cos() - cosine, delta)
        return delta - margin * (z + 1)
