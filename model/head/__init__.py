"""Margin heads by name: embeddings and labels to the logits that a loss takes.

To add a margin head, write a subclass of MarginHead (cosface.py is the shortest example): `__init__` with its default
`s` and `m`, and `margin_delta`, which returns the change of the target cosine. Then add the class to HEADS below, and
its parameters and paper to model/names.py. Sampling and the split over processes (PartialFC) work with every subclass.
"""

from typing import Any

from model.head.adaface import AdaFace
from model.head.arcface import ArcFace
from model.head.combined import CombinedMargin, SphereFace
from model.head.cosface import CosFace
from model.head.curricularface import CurricularFace
from model.head.elasticface import ElasticArcFace, ElasticArcFacePlus, ElasticCosFace, ElasticCosFacePlus
from model.head.magface import MagFace
from model.head.margin import MarginHead
from model.head.partial_fc import PartialFC as PartialFC
from model.head.partial_fc import shard_range as shard_range
from model.head.subcenter import SubCenterArcFace
from model.names import HEAD_PARAMETERS

HEADS: dict[str, type[MarginHead]] = {
    "ArcFace": ArcFace,
    "CosFace": CosFace,
    "AdaFace": AdaFace,
    "MagFace": MagFace,
    "CurricularFace": CurricularFace,
    "ElasticArcFace": ElasticArcFace,
    "ElasticArcFacePlus": ElasticArcFacePlus,
    "ElasticCosFace": ElasticCosFace,
    "ElasticCosFacePlus": ElasticCosFacePlus,
    "SphereFace": SphereFace,
    "CombinedMargin": CombinedMargin,
    "SubCenterArcFace": SubCenterArcFace,
}
OPTIONS = ("rows", "interclass_filtering_threshold", "seed")  # of every head, see MarginHead


def build_head(name: str, in_features: int, out_features: int, **settings: Any) -> MarginHead:
    """Return a new head.

    Args:
        name: a key of HEADS.
        in_features: size of an embedding.
        out_features: number of classes.
        **settings: parameters of the head as in model.names.HEAD_PARAMETERS, and OPTIONS. None: the default, which is
            the paper's.

    Raises:
        ValueError: the name is unknown, or a setting is unknown to this head or out of range.
    """
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}. Choose one of {', '.join(HEADS)}")
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in HEAD_PARAMETERS[name] and key not in OPTIONS:
            raise ValueError(f"{name} has no parameter {key}. Its parameters are {', '.join(HEAD_PARAMETERS[name])}")
    return HEADS[name](in_features, out_features, **given)
