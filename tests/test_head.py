"""Margin heads against slow re-derivations in plain Python, and against the golden numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.head import HEADS, ArcFace, CosFace, MarginHead, build_head
from model.head.cosines import _BLOCK_SIZE, cosines
from model.loss import build_loss

DIM, CLASSES = 8, 5


def slow_logits(head: MarginHead, embeddings: Tensor, labels: Tensor, m: float | None = None) -> np.ndarray:
    """Compute one number at a time, in Python floats, through the angle itself."""
    rows = [[float(v) for v in row] for row in embeddings.detach()]
    centers = [[float(v) for v in row] for row in head.weight.detach()]
    logits = np.empty((len(rows), len(centers)))
    for i, row in enumerate(rows):
        for j, center in enumerate(centers):
            cosine = sum(a * b for a, b in zip(row, center, strict=True)) / (math.hypot(*row) * math.hypot(*center))
            if j == int(labels[i]):
                cosine = slow_target(head, cosine, head.m if m is None else m)
            logits[i, j] = head.s * cosine
    return logits


def slow_target(head: MarginHead, cosine: float, m: float) -> float:
    if isinstance(head, CosFace):
        return cosine - m
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    if head.easy_margin:
        return math.cos(theta + m) if theta < math.pi / 2 else cosine
    return math.cos(theta + m) if theta + m < math.pi else cosine - m * math.sin(math.pi - m)


def at_angles(head: MarginHead, angles: list[float]) -> tuple[Tensor, Tensor]:
    """Return embeddings at these angles (radians) from the centers of classes 0, 1, 2 ..., and their labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(len(angles)) % head.out_features
    centers = F.normalize(head.weight.detach().double())[labels]
    across = torch.randn(centers.shape, generator=generator, dtype=torch.float64)
    across = F.normalize(across - (across * centers).sum(1, keepdim=True) * centers)
    theta = torch.tensor(angles, dtype=torch.float64)[:, None]
    length = 1 + 20 * torch.rand(theta.shape, generator=generator, dtype=torch.float64)
    return length * (theta.cos() * centers + theta.sin() * across), labels


def make(name: str, dtype: torch.dtype = torch.float32, **settings: float | bool) -> MarginHead:
    torch.manual_seed(0)
    return build_head(name, DIM, CLASSES, **settings).to(dtype)


VARIANTS = [("ArcFace", {}), ("ArcFace", {"easy_margin": True}), ("ArcFace", {"s": 16.0, "m": 0.2}), ("CosFace", {})]
# On both sides of pi / 2 (easy margin), of pi - 0.2 and of pi - 0.5 (where theta + m passes pi).
ANGLES = [1e-3, 0.3, 1.0, 1.5, 1.6, 2.0, 2.6, 2.7, 2.9, 3.0, 3.14]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_head_logits_equal_slow_logits(name: str, settings: dict) -> None:
    head = make(name, **settings)
    embeddings, labels = at_angles(head, ANGLES)
    logits = head(embeddings.float(), labels)
    assert logits.shape == (len(ANGLES), CLASSES)
    np.testing.assert_allclose(logits.detach(), slow_logits(head, embeddings, labels), atol=head.s * 2e-6)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_head_gradients_equal_finite_differences(name: str, settings: dict) -> None:
    head = make(name, torch.float64, **settings)
    embeddings, labels = at_angles(head, ANGLES[1:-1])

    def logits(inputs: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (inputs, labels))

    assert torch.autograd.gradcheck(logits, (embeddings.requires_grad_(), head.weight.detach().requires_grad_()))


@pytest.mark.parametrize("easy_margin", [False, True])
@pytest.mark.parametrize("one_minus_cos", [2e-6, 1e-5, 1e-3])
def test_arcface_gradients_are_exact_at_small_angles(one_minus_cos: float, easy_margin: bool) -> None:
    head = make("ArcFace", easy_margin=easy_margin)
    embeddings, labels = at_angles(head, [math.acos(1 - one_minus_cos)] * CLASSES)
    # Only float32 numbers go in: both sides of the comparison use the angle between the rounded vectors.
    inputs = embeddings.float().requires_grad_()
    target = head(inputs, labels)[torch.arange(CLASSES), labels]
    target.sum().backward()
    for i in range(CLASSES):
        e, c = inputs[i].detach().double().numpy(), head.weight[i].detach().double().numpy()
        a, b = e / np.linalg.norm(e), c / np.linalg.norm(c)
        sine = np.linalg.norm(b - (a @ b) * a)
        slope = head.s * math.sin(math.asin(sine) + head.m)  # -d logit / d theta
        along_e = slope * (b - (a @ b) * a) / sine / np.linalg.norm(e)
        along_c = slope * (a - (a @ b) * b) / sine / np.linalg.norm(c)
        assert np.abs(inputs.grad[i].numpy() - along_e).max() < 1e-3 * np.abs(along_e).max()
        assert np.abs(head.weight.grad[i].numpy() - along_c).max() < 1e-3 * np.abs(along_c).max()


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_head_is_finite_at_cosine_one_and_minus_one(name: str, settings: dict, sign: float) -> None:
    head = make(name, **settings)
    with torch.no_grad():
        head.weight.copy_(torch.eye(CLASSES, DIM) * 3)  # exactly representable: the cosine is exactly +-1
    embeddings = (sign * 2 * torch.eye(CLASSES, DIM)).requires_grad_()
    labels = torch.arange(CLASSES)
    logits = head(embeddings, labels)
    F.cross_entropy(logits, labels).backward()
    np.testing.assert_allclose(logits.detach(), slow_logits(head, embeddings, labels), atol=1e-4)
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()
    # No slope is steeper than s * (1 + sin(m)) per radian, wherever it points.
    assert embeddings.grad.norm(dim=1).max() <= 2 * head.s * 2 / CLASSES


@pytest.mark.parametrize("name", ["ArcFace", "CosFace"])
def test_head_margin_argument_replaces_m(name: str) -> None:
    head = make(name)
    embeddings, labels = at_angles(head, ANGLES)
    for m in (0.0, 0.1, 0.5):
        logits = head(embeddings.float(), labels, margin=m)
        np.testing.assert_allclose(logits.detach(), slow_logits(head, embeddings, labels, m), atol=2e-4)
    plain = head.s * F.normalize(embeddings.float()) @ F.normalize(head.weight).T
    torch.testing.assert_close(head(embeddings.float(), labels, margin=0.0), plain)
    torch.testing.assert_close(head(embeddings.float(), labels), head(embeddings.float(), labels, margin=head.m))


@pytest.mark.parametrize("name", list(HEADS))
def test_head_computes_in_float32_under_autocast(name: str) -> None:
    labels = torch.arange(11) % CLASSES
    half = torch.randn(11, DIM, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = make(name)(half, labels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, make(name)(half.float(), labels), rtol=0, atol=0)


class _Storages(TorchDispatchMode):
    """Collect every result of one shape, kept alive so that no address occurs twice."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.kept = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and tuple(result.shape) == self.shape:
            self.kept.append(result)
        return result

    @property
    def count(self) -> int:
        return len({tensor.untyped_storage().data_ptr() for tensor in self.kept})


# CurricularFace keeps a slope for each logit, sub-centers the index of each maximum.
@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("CurricularFace", "SubCenterArcFace")])
def test_head_makes_one_logit_buffer(name: str, monkeypatch) -> None:
    monkeypatch.setitem(_BLOCK_SIZE, "cpu", 100 * DIM)  # 100 rows in a block
    head, embeddings, labels = build_head(name, DIM, 1000), torch.randn(4, DIM, requires_grad=True), torch.arange(4)
    with _Storages((4, 1000)) as forward:
        logits = head(embeddings, labels)
    gradient = torch.ones_like(logits)
    with _Storages((4, 1000)) as backward:
        logits.backward(gradient)
    assert forward.count == 1
    assert {t.untyped_storage().data_ptr() for t in backward.kept} <= {gradient.untyped_storage().data_ptr()}


@pytest.mark.parametrize("name", ["ArcFace", "CosFace"])
def test_head_makes_no_copy_of_the_centers(name: str, monkeypatch) -> None:
    monkeypatch.setitem(_BLOCK_SIZE, "cpu", 100 * DIM)
    head, embeddings, labels = build_head(name, DIM, 1000), torch.randn(4, DIM, requires_grad=True), torch.arange(4)
    with _Storages((1000, DIM)) as forward:
        logits = head(embeddings, labels)
    with _Storages((1000, DIM)) as backward:
        (grad_weight,) = torch.autograd.grad(logits, head.weight, torch.ones_like(logits))
    weight, gradient = (tensor.untyped_storage().data_ptr() for tensor in (head.weight, grad_weight))
    assert {t.untyped_storage().data_ptr() for t in forward.kept} <= {weight}
    assert {t.untyped_storage().data_ptr() for t in backward.kept} <= {weight, gradient}


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_cosines_gradients_equal_finite_differences(rows: int, monkeypatch) -> None:
    monkeypatch.setitem(_BLOCK_SIZE, "cpu", 5 * rows)
    embeddings, weight = torch.randn(4, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    inputs = (embeddings.requires_grad_(), weight.requires_grad_(), torch.tensor([0, 6, 6, 2]))
    products, selected = cosines(*inputs)
    torch.testing.assert_close(products, embeddings @ torch.nn.functional.normalize(weight).T)
    assert torch.equal(selected, weight[[0, 6, 6, 2]])
    assert torch.autograd.gradcheck(cosines, inputs)


def test_head_weight_is_glorot_uniform_and_learns() -> None:
    head = build_head("ArcFace", 512, 300)
    bound = (6 / (512 + 300)) ** 0.5
    assert head.weight.shape == (300, 512) and 0.99 * bound < head.weight.abs().max() <= bound
    assert [name for name, parameter in head.named_parameters() if parameter.requires_grad] == ["weight"]
    head(torch.randn(4, 512), torch.arange(4)).logsumexp(1).sum().backward()
    assert (head.weight.grad.abs().sum(1) > 0).all()


def test_head_rejects_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"'Arcface'.*ArcFace, CosFace"):
        build_head("Arcface", DIM, CLASSES)
    with pytest.raises(ValueError, match="s is 0"):
        ArcFace(DIM, CLASSES, s=0)
    with pytest.raises(ValueError, match=r"m is -0\.1"):
        CosFace(DIM, CLASSES, m=-0.1)
    with pytest.raises(ValueError, match="s is nan"):
        CosFace(DIM, CLASSES, s=float("nan"))


GOLDEN = {
    "arcface": lambda: ArcFace(512, 37),
    "arcface_easy": lambda: ArcFace(512, 37, easy_margin=True),
    "cosface": lambda: CosFace(512, 37),
}


@pytest.mark.parametrize(("loss", "prefix"), [("focal", "grad"), ("cross_entropy", "ce_grad")])
@pytest.mark.parametrize("name", list(GOLDEN))
def test_head_golden_logits_losses_and_gradients(golden, name: str, loss: str, prefix: str) -> None:
    numbers = np.load(golden / "heads.npz")
    head = GOLDEN[name]()
    head.weight.data = torch.from_numpy(numbers["weight"])
    embeddings = torch.from_numpy(numbers["embeddings"]).requires_grad_()
    labels = torch.from_numpy(numbers["labels"])
    logits = head(embeddings, labels)
    value = build_loss(loss)(logits, labels)
    value.backward()
    np.testing.assert_allclose(logits.detach(), numbers[f"{name}.logits"], atol=1e-4)
    np.testing.assert_allclose(value.item(), numbers[f"{name}.{loss}"], rtol=1e-6)
    for gradient, key in ((embeddings.grad, "embeddings"), (head.weight.grad, "weight")):
        expected = numbers[f"{name}.{prefix}_{key}"]
        # Rows below 1e-15 belong to samples with 1 - p < 1e-15, which float64 cannot resolve either.
        largest = np.maximum(np.abs(expected).max(1), 1e-15)
        assert (np.abs(gradient.numpy() - expected).max(1) < 1e-3 * largest).all()
