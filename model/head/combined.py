"""SphereFace, and the combined margin: the angle is multiplied, then increased, and the cosine reduced."""

import math
from typing import Any

from torch import Tensor

from model.head.arcface import angular_delta
from model.head.margin import MarginHead, Samples


class SphereFace(MarginHead):
    """Target logit s * psi(m * theta), with psi(x) = (-1)^k * cos(x) - 2k for x in [k * pi, (k + 1) * pi].

    Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition" (CVPR 2017), for any real m >= 1. The
    paper uses m = 4 with embeddings that are not normalized, and mixes psi with the plain cosine. With normalized
    embeddings m = 4 is hard to train. The defaults are from the authors' later code for normalized embeddings
    (OpenSphere; Liu et al., "SphereFace Revived", TPAMI 2022). A margin below 1 in a call counts as 1: none.
    """

    def __init__(self, in_features: int, out_features: int, s: float = 30.0, m: float = 1.5, **options: Any):
        super().__init__(in_features, out_features, s=s, m=m, **options)
        self.check(m >= 1, f"the margin m is {m}. It multiplies the angle and must be 1 or more")

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        return _psi(max(1.0, margin) * samples.angle) - samples.cosine


class CombinedMargin(MarginHead):
    """Target logit s * (cos(m1 * theta + m2) - m3).

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (2019), equation 4. The names and the
    defaults are those of arcface_torch. Where the angle exceeds pi: with m1 = 1, the cosine is as in ArcFace, so that
    (1, m, 0) is ArcFace and (1, 0, m) is CosFace; otherwise as in SphereFace, so that (m, 0, 0) is SphereFace.

    There is no margin m: `margin` in a call is a factor of m1 - 1, m2 and m3, and 1 by default.

    Args:
        in_features: size of an embedding.
        out_features: number of classes.
        s: scale of the cosines.
        m1: factor of the angle, above 0.
        m2: added to the angle, in radians.
        m3: subtracted from the cosine.
        **options: see MarginHead.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        **options: Any,
    ):
        super().__init__(in_features, out_features, s=s, m=1.0, **options)
        self.check(m1 > 0, f"m1 is {m1}. It must be positive")
        self.check(m2 >= 0 and m3 >= 0, f"m2 is {m2} and m3 is {m3}. They must not be negative")
        self.m1 = m1
        self.m2 = m2
        self.m3 = m3

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        if self.m1 == 1:
            return angular_delta(samples, margin * self.m2) - margin * self.m3
        factor = 1 + margin * (self.m1 - 1)
        return _psi(factor * samples.angle + margin * self.m2) - samples.cosine - margin * self.m3


def _psi(angle: Tensor) -> Tensor:
    """Return the cosine of the angle (N,), continued beyond pi so that it falls everywhere."""
    k = (angle.detach() / math.pi).floor()
    return (1 - 2 * k.remainder(2)) * angle.cos() - 2 * k
