"""Losses against slow re-derivations in plain Python."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.loss import LOSSES, FocalLoss, build_loss


def slow_focal(logits: list[list[float]], labels: list[int], gamma: float) -> float:
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        largest = max(row)
        p = math.exp(row[label] - largest) / sum(math.exp(value - largest) for value in row)
        total += (1 - p) ** gamma * -math.log(p)
    return total / len(labels)


def random_batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return 3 * torch.randn(6, 4, generator=generator, dtype=dtype), torch.randint(4, (6,), generator=generator)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_equals_the_slow_definition(gamma: float) -> None:
    logits, labels = random_batch()
    expected = slow_focal(logits.tolist(), labels.tolist(), gamma)
    assert FocalLoss(gamma)(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_focal_weight_applies_to_each_sample() -> None:
    logits = torch.tensor([[10.0, 0.0], [-3.0, 3.0]])  # one easy sample, one that is wrong
    labels = torch.tensor([0, 0])
    mean = F.cross_entropy(logits, labels)
    weighted_mean = (1 - torch.exp(-mean)) ** 2 * mean
    value = FocalLoss()(logits, labels)
    assert value.item() == pytest.approx(slow_focal(logits.tolist(), [0, 0], 2.0), rel=1e-6)
    assert abs(value - weighted_mean) > 0.1


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradients_equal_finite_differences(gamma: float) -> None:
    logits, labels = random_batch()
    assert torch.autograd.gradcheck(lambda x: FocalLoss(gamma)(x, labels), logits.requires_grad_())


def test_focal_with_gamma_zero_is_cross_entropy() -> None:
    logits, labels = random_batch(torch.float32)
    torch.testing.assert_close(build_loss("focal", gamma=0.0)(logits, labels), F.cross_entropy(logits, labels))
    torch.testing.assert_close(build_loss("cross_entropy")(logits, labels), F.cross_entropy(logits, labels))


def test_focal_gradient_is_exact_near_probability_one() -> None:
    gap = 8.0  # p is 1 - 3.4e-4
    logits = torch.tensor([[gap, 0.0]], requires_grad=True)
    FocalLoss()(logits, torch.tensor([0])).backward()
    q = 1 / (1 + math.exp(gap))  # 1 - p
    expected = -(q**2) * (q - 2 * (1 - q) * math.log1p(-q))  # d loss / d logit of the target class
    np.testing.assert_allclose(logits.grad.numpy(), [[expected, -expected]], rtol=1e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("label", [0, 1])
def test_focal_is_finite_for_huge_logits(gamma: float, label: int) -> None:
    logits = torch.tensor([[5000.0, -5000.0], [64.0, -64.0]], requires_grad=True)
    value = FocalLoss(gamma)(logits, torch.tensor([label, label]))
    value.backward()
    assert value.item() == pytest.approx(5064.0 if label else 0.0)
    np.testing.assert_allclose(logits.grad, [[0.5, -0.5]] * 2 if label else [[0.0, 0.0]] * 2, atol=1e-20)


def test_focal_reduces_half_precision_in_float32() -> None:
    logits, labels = random_batch(torch.float32)
    value = FocalLoss()(logits.half(), labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, FocalLoss()(logits.half().float(), labels), rtol=0, atol=0)


def test_loss_rejects_bad_settings() -> None:
    with pytest.raises(ValueError, match="'Focal'.*" + ", ".join(LOSSES)):
        build_loss("Focal")
    with pytest.raises(ValueError, match="gamma is -1"):
        build_loss("focal", gamma=-1.0)
