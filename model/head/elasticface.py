"""ElasticFace: ArcFace and CosFace with a random margin for each sample."""

from typing import Any

import torch
from torch import Tensor

from model.head.arcface import ArcFace, angular_delta
from model.head.cosface import CosFace
from model.head.margin import MarginHead, Samples
from model.head.partial_fc import mix_seed


class ElasticArcFace(ArcFace):
    """Target logit s * cos(theta + M), where M is drawn from a normal distribution for each sample.

    Boutros et al., "ElasticFace: Elastic Margin Loss for Deep Face Recognition" (CVPR Workshops 2022). The distribution
    has mean m and standard deviation std. Where theta + M exceeds pi, the target is as in ArcFace. With
    `plus`, the samples of a batch share the drawn margins out: the nearer a sample is to its center, the smaller its
    margin. See ElasticArcFacePlus. In eval mode M is m.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.5,
        std: float = 0.05,
        plus: bool = False,
        **options: Any,
    ):
        super().__init__(in_features, out_features, s=s, m=m, **options)
        self.check(std >= 0, f"std is {std}. It must not be negative")
        self.std = std
        self.plus = plus

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        return angular_delta(samples, draw_margins(self, samples, margin, std=self.std, plus=self.plus))


class ElasticArcFacePlus(ElasticArcFace):
    """ElasticArcFace with `plus` and the standard deviation that its authors use with it."""

    def __init__(
        self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.5, std: float = 0.0175, **options: Any
    ):
        super().__init__(in_features, out_features, s=s, m=m, std=std, plus=True, **options)


class ElasticCosFace(CosFace):
    """Target logit s * (cos(theta) - M), where M is drawn as in ElasticArcFace."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.35,
        std: float = 0.05,
        plus: bool = False,
        **options: Any,
    ):
        super().__init__(in_features, out_features, s=s, m=m, **options)
        self.check(std >= 0, f"std is {std}. It must not be negative")
        self.std = std
        self.plus = plus

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        return -draw_margins(self, samples, margin, std=self.std, plus=self.plus)


class ElasticCosFacePlus(ElasticCosFace):
    """ElasticCosFace with `plus` and the standard deviation that its authors use with it."""

    def __init__(
        self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.35, std: float = 0.02, **options: Any
    ):
        super().__init__(in_features, out_features, s=s, m=m, std=std, plus=True, **options)


def draw_margins(head: MarginHead, samples: Samples, margin: float, *, std: float, plus: bool) -> Tensor:
    """Return a margin for each sample (N,), from the head's seed and the step alone: all ranks draw the same.

    Args:
        head: its m is the margin for which `std` is meant. A smaller margin has a smaller standard deviation.
        samples: of all ranks. Micro-batches of one step draw the same margins.
        margin: mean of this step.
        std: standard deviation.
        plus: samples with a larger target cosine get smaller margins.
    """
    margins = samples.embeddings.new_full((len(samples.embeddings),), margin)
    if not head.training:
        return margins
    generator = torch.Generator(margins.device).manual_seed(mix_seed(head.seed, samples.step))
    noise = torch.randn(len(margins), generator=generator, device=margins.device)
    margins += std * (margin / head.m if head.m else 1.0) * noise.to(margins.dtype)
    if plus:
        # The authors' code indexes the sorted margins with the order of the samples, which is its inverse.
        order = samples.all_cosines().argsort(descending=True, stable=True)
        margins = torch.empty_like(margins).scatter_(0, order, margins.sort().values)
    return margins
