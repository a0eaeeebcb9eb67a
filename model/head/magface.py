"""MagFace: an angular margin that grows with the length of the embedding, and a reward for long embeddings."""

from typing import Any

import torch
from torch import Tensor

from model.head.arcface import angular_delta
from model.head.margin import MarginHead, Samples, at_least_float32


class MagFace(MarginHead):
    """Target logit s * cos(theta + m(a)), where m(a) grows linearly from l_m at length a = l_a to u_m at a = u_a.

    Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality Assessment" (CVPR 2021).
    Lengths are limited to [l_a, u_a]. The margin passes a gradient to the length. The regularizer
    lambda_g * mean(a / u_a^2 + 1 / a) makes embeddings longer. It must be added to the loss.

    There is no margin m: `margin` in a call is a factor of m(a), and 1 by default. Beyond theta = pi - m(a) the target
    is as in ArcFace. The authors' public code has easy_margin on: no margin where cos(theta) <= 0.

    Args:
        in_features: size of an embedding.
        out_features: number of classes.
        s: scale of the cosines.
        l_a: smallest length, above 0.
        u_a: largest length.
        l_m: margin of the smallest length, in radians.
        u_m: margin of the largest length.
        lambda_g: weight of the regularizer. 35 in the paper.
        easy_margin: leave out the margin where cos(theta) <= 0.
        **options: see MarginHead.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_m: float = 0.45,
        u_m: float = 0.8,
        lambda_g: float = 35.0,
        easy_margin: bool = False,
        **options: Any,
    ):
        super().__init__(in_features, out_features, s=s, m=1.0, **options)
        self.check(0 < l_a < u_a, f"l_a is {l_a} and u_a is {u_a}. They must be positive and rising")
        self.check(0 <= l_m <= u_m, f"l_m is {l_m} and u_m is {u_m}. They must not be negative or falling")
        self.check(lambda_g >= 0, f"lambda_g is {lambda_g}. It must not be negative")
        self.l_a = l_a
        self.u_a = u_a
        self.l_m = l_m
        self.u_m = u_m
        self.lambda_g = lambda_g
        self.easy_margin = easy_margin

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        lengths = samples.lengths.clamp(self.l_a, self.u_a)
        return angular_delta(samples, margin * (slope * (lengths - self.l_a) + self.l_m), self.easy_margin)

    def regularizer(self, embeddings: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(at_least_float32(embeddings), dim=1).clamp(self.l_a, self.u_a)
        return self.lambda_g * (lengths / self.u_a**2 + 1 / lengths).mean()
