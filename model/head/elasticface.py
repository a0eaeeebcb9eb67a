"""ElasticFace: ArcFace and CosFace with a random margin for each sample."""

from typing import Any

import torch
from torch import Tensor

from model.head.arcface import angular_delta
from model.head.margin import MarginHead, Samples
from model.head.partial_fc import mix_seed


class ElasticHead(MarginHead):
    """A head whose margins are drawn from a normal distribution for each sample, with mean m and deviation std.

    Boutros et al., "ElasticFace: Elastic Margin Loss for Deep Face Recognition" (CVPR Workshops 2022). With `plus`, the
    samples of a batch share the drawn margins out: the nearer a sample is to its center, the smaller its margin. In
    eval mode every margin is m.
    """

    def __init__(
        self, in_features: int, out_features: int, s: float, m: float, std: float, plus: bool = False, **options: Any
    ):
        super().__init__(in_features, out_features, s=s, m=m, **options)
        self.check(std >= 0, f"std is {std}. It must not be negative")
        self.std = std
        self.plus = plus

    def draw_margins(self, samples: Samples, margin: float) -> Tensor:
        """Return a margin for each sample (N,), from the seed and the step alone: all ranks draw the same.

        Args:
            samples: of all ranks. Micro-batches of one step draw the same margins.
            margin: mean of this step. A mean smaller than m has a smaller standard deviation than std.
        """
        margins = samples.embeddings.new_full((len(samples.embeddings),), margin)
        if not self.training:
            return margins
        generator = torch.Generator(margins.device).manual_seed(mix_seed(self.seed, samples.step))
        noise = torch.randn(len(margins), generator=generator, device=margins.device)
        margins += self.std * (margin / self.m if self.m else 1.0) * noise.to(margins.dtype)
        if self.plus:
            # The authors' code indexes the sorted margins with the order of the samples, which is its inverse.
            order = samples.all_cosines().argsort(descending=True, stable=True)
            margins = torch.empty_like(margins).scatter_(0, order, margins.sort().values)
        return margins


class ElasticArcFace(ElasticHead):
    """Target logit s * cos(theta + M), where M is the drawn margin. Where theta + M exceeds pi, it is as in ArcFace."""

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
        super().__init__(in_features, out_features, s=s, m=m, std=std, plus=plus, **options)

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        return angular_delta(samples, self.draw_margins(samples, margin))


class ElasticArcFacePlus(ElasticArcFace):
    """ElasticArcFace with `plus` and the standard deviation that its authors use with it."""

    def __init__(
        self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.5, std: float = 0.0175, **options: Any
    ):
        super().__init__(in_features, out_features, s=s, m=m, std=std, plus=True, **options)


class ElasticCosFace(ElasticHead):
    """Target logit s * (cos(theta) - M), where M is the drawn margin."""

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
        super().__init__(in_features, out_features, s=s, m=m, std=std, plus=plus, **options)

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        return -self.draw_margins(samples, margin)


class ElasticCosFacePlus(ElasticCosFace):
    """ElasticCosFace with `plus` and the standard deviation that its authors use with it."""

    def __init__(
        self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.35, std: float = 0.02, **options: Any
    ):
        super().__init__(in_features, out_features, s=s, m=m, std=std, plus=True, **options)
