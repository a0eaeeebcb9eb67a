"""CosFace: a constant subtracted from the cosine between an embedding and the center of its class."""

from typing import Any

from torch import Tensor

from model.head.margin import MarginHead, Samples


class CosFace(MarginHead):
    """Target logit s * (cos(theta) - m).

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition" (2018), equation 4.
    """

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.35, **options: Any):
        super().__init__(in_features, out_features, s=s, m=m, **options)

    def margin_delta(self, samples: Samples, margin: float) -> Tensor:
        return samples.embeddings.new_full((len(samples.embeddings),), -margin)
