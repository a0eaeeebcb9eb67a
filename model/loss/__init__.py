"""Losses by name: logits and labels, or log probabilities, to a scalar."""

from collections.abc import Callable

from model.loss.focal import CrossEntropy, FocalLoss, Loss

LOSSES: dict[str, Callable[..., Loss]] = {"focal": FocalLoss, "cross_entropy": CrossEntropy}


def build_loss(name: str, **settings: float) -> Loss:
    """Return a loss, called with logits (N, C) and labels (N,).

    Args:
        name: a key of LOSSES.
        **settings: keyword arguments of the class (gamma for focal).

    Raises:
        ValueError: the name is unknown, or a setting is out of range.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}. Choose one of {', '.join(LOSSES)}")
    return LOSSES[name](**settings)
