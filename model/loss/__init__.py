"""Losses by name: logits and labels, or log probabilities, to a scalar."""

from collections.abc import Callable

from model.loss.focal import CrossEntropy, FocalLoss, Loss

LOSSES: dict[str, Callable[..., Loss]] = {"focal": FocalLoss, "cross_entropy": CrossEntropy}


def build_loss(name: str, **settings: float) -> Loss:
    """Return the loss with this name in LOSSES, called with logits (N, C) and labels (N,).

    `settings` are keyword arguments of the class (gamma for focal). Raises ValueError for an unknown name.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}. Choose one of {', '.join(LOSSES)}")
    return LOSSES[name](**settings)
