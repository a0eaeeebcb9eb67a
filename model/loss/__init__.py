"""Losses by name: from logits and labels, or from log probabilities, to a scalar."""

from collections.abc import Callable

from model.loss.focal import CrossEntropy, FocalLoss, Loss

LOSSES: dict[str, Callable[..., Loss]] = {"focal": FocalLoss, "cross_entropy": CrossEntropy}


def build_loss(name: str, **settings: float) -> Loss:
    """A loss, called with logits (N, C) and labels (N,); settings as its class takes them (gamma ...).

    An unknown name raises ValueError.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[name](**settings)
