"""Margin heads by name: embeddings and labels to the logits that a loss takes.

To add a margin head, write a subclass of MarginHead (cosface.py is the shortest example): `__init__` with its default
`s` and `m`, and `margin_delta`, which returns the change of the target cosine. Then add the class to HEADS below and
its name to model/names.py. Sampling and the split over processes (PartialFC) work with every subclass.
"""

from model.head.arcface import ArcFace
from model.head.cosface import CosFace
from model.head.margin import MarginHead
from model.head.partial_fc import PartialFC as PartialFC
from model.head.partial_fc import shard_range as shard_range

HEADS: dict[str, type[MarginHead]] = {"ArcFace": ArcFace, "CosFace": CosFace}


def build_head(name: str, in_features: int, out_features: int, **settings: float | bool | range) -> MarginHead:
    """Return a new head.

    Args:
        name: a key of HEADS.
        in_features: size of an embedding.
        out_features: number of classes.
        **settings: keyword arguments of the class (s, m, rows; easy_margin for ArcFace).

    Raises:
        ValueError: the name is unknown.
    """
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}. Choose one of {', '.join(HEADS)}")
    return HEADS[name](in_features, out_features, **settings)  # type: ignore[arg-type]
