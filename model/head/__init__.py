"""Margin heads by name: from embeddings and labels to the logits that a loss takes."""

from model.head.arcface import ArcFace
from model.head.cosface import CosFace
from model.head.margin import MarginHead
from model.head.sharded import PartialFC as PartialFC
from model.head.sharded import shard_range as shard_range

HEADS: dict[str, type[MarginHead]] = {"ArcFace": ArcFace, "CosFace": CosFace}


def build_head(name: str, in_features: int, out_features: int, **settings: float | bool | range) -> MarginHead:
    """A new head for embeddings of in_features and out_features classes; settings as the class takes them (s, m ...).

    An unknown name raises ValueError.
    """
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}; choose one of {', '.join(HEADS)}")
    return HEADS[name](in_features, out_features, **settings)
