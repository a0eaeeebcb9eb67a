"""Losses by name: from logits and labels to a scalar."""

from collections.abc import Callable

from torch import nn

from model.loss.focal import FocalLoss

LOSSES: dict[str, Callable[..., nn.Module]] = {"focal": FocalLoss, "cross_entropy": nn.CrossEntropyLoss}


def build_loss(name: str, **settings: float) -> nn.Module:
    """A loss, called with logits (N, C) and labels (N,); settings as its class takes them (gamma ...).

    An unknown name raises ValueError.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[name](**settings)
