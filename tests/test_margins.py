"""Every margin head against a slow re-derivation in plain Python, and against the numbers of the authors' code."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.head import HEADS, MagFace, MarginHead, build_head
from model.head.partial_fc import mix_seed
from model.loss import build_loss
from model.names import HEAD_PAPERS, HEAD_PARAMETERS

DIM, CLASSES, STEP = 6, 7, 5
FILTER = {"interclass_filtering_threshold": 0.3}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in HEADS),
    ("AdaFace", {"s": 16.0, "m": 0.5, "h": 2.0, "t_alpha": 0.9}),  # many z at 1 or -1, many angles at 0.001
    ("MagFace", {"easy_margin": True}),
    ("MagFace", {"l_a": 1.0, "u_a": 2.0, "l_m": 0.1, "u_m": 0.2}),
    ("CurricularFace", {"momentum": 0.1, "m": 0.3}),
    ("ElasticArcFace", {"plus": True, "std": 0.2, "seed": 3}),
    ("ElasticCosFace", {"plus": True, "std": 0.2, "seed": 3}),
    ("SphereFace", {"m": 4.0, "s": 64.0}),
    ("CombinedMargin", {"m1": 0.9, "m2": 0.4, "m3": 0.15}),
    ("CombinedMargin", {"m1": 1.0, "m2": 0.3, "m3": 0.2}),
    ("CombinedMargin", {"m1": 2.5, "m2": 0.3, "m3": 0.2}),
    ("SubCenterArcFace", {"k": 2, "m": 0.3}),
    *((name, FILTER) for name in ("CosFace", "CurricularFace", "SubCenterArcFace")),
]


def make(name: str, **settings: Any) -> MarginHead:
    torch.manual_seed(0)
    return build_head(name, DIM, CLASSES, **settings).double()


def batch(head: MarginHead, seed: int = 0, length: float = 60.0) -> tuple[Tensor, Tensor]:
    """Return embeddings at angles 0.02 ... 3.1 from a center of their class, up to about twice `length` long."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.linspace(0.02, 3.1, 29, dtype=torch.float64)[torch.randperm(29, generator=generator)][:, None]
    labels = torch.randint(CLASSES, (29,), generator=generator)
    centers = F.normalize(head.weight.detach().reshape(CLASSES, -1)[labels, :DIM])
    across = torch.randn(29, DIM, generator=generator, dtype=torch.float64)
    across = F.normalize(across - (across * centers).sum(1, keepdim=True) * centers)
    lengths = 2 * length * torch.rand(29, 1, generator=generator, dtype=torch.float64)
    return lengths * (theta.cos() * centers + theta.sin() * across), labels


def slow_logits(head: MarginHead, embeddings: Tensor, labels: Tensor, margin: float | None = None) -> np.ndarray:
    """Compute one number at a time, through the angles, as the papers write it."""
    name = type(head).__name__
    m = head.m if margin is None else margin
    rows = embeddings.detach().tolist()
    centers = head.weight.detach().reshape(CLASSES, -1, DIM).tolist()
    lengths = [math.hypot(*row) for row in rows]
    angles = [[min(angle(row, center) for center in own) for own in centers] for row in rows]
    targets = [angles[i][label] for i, label in enumerate(labels.tolist())]

    # What depends on the batch.
    clipped = [min(max(length, 1e-3), 100.0) for length in lengths]
    if name == "AdaFace":
        mean = head.t_alpha * np.mean(clipped) + (1 - head.t_alpha) * 20.0
        std = head.t_alpha * np.std(clipped, ddof=1) + (1 - head.t_alpha) * 100.0
    if name == "CurricularFace":
        t = (1 - head.momentum) * np.mean([math.cos(theta) for theta in targets])
    if name.startswith("Elastic"):
        noise = torch.randn(len(rows), generator=torch.Generator().manual_seed(mix_seed(head.seed, STEP)))
        drawn = [m + m / head.m * head.std * z for z in noise.tolist()]
        if head.plus:
            nearest = sorted(range(len(rows)), key=lambda i: targets[i])
            smallest = sorted(drawn)
            for i, value in zip(nearest, smallest, strict=True):
                drawn[i] = value

    logits = np.empty((len(rows), CLASSES))
    for i, theta in enumerate(targets):
        for j in range(CLASSES):
            cosine = math.cos(angles[i][j])
            if j != labels[i]:
                if 0 < head.interclass_filtering_threshold < cosine:
                    cosine = 0.0
                if name == "CurricularFace" and cosine > math.cos(theta + m):
                    cosine *= t + cosine
            elif name == "CosFace":
                cosine -= m
            elif name == "AdaFace":
                z = min(max(head.h * (clipped[i] - mean) / (std + 1e-3), -1), 1)
                theta = min(max(theta, math.acos(0.999)), math.acos(-0.999))
                cosine = math.cos(min(max(theta - m * z, 1e-3), math.pi - 1e-3)) - m * (z + 1)
            elif name == "MagFace":
                length = min(max(lengths[i], head.l_a), head.u_a)
                slope = (head.u_m - head.l_m) / (head.u_a - head.l_a)
                own_margin = m * (head.l_m + slope * (length - head.l_a))
                cosine = arcface(theta, own_margin) if cosine > 0 or not head.easy_margin else cosine
            elif name.startswith("ElasticCos"):
                cosine -= drawn[i]
            elif name.startswith("ElasticArc"):
                cosine = arcface(theta, drawn[i])
            elif name == "SphereFace":
                cosine = psi(max(m, 1) * theta)
            elif name == "CombinedMargin":
                factor = 1 + m * (head.m1 - 1)
                moved = psi(factor * theta + m * head.m2) if head.m1 != 1 else arcface(theta, m * head.m2)
                cosine = moved - m * head.m3
            else:  # ArcFace, CurricularFace, SubCenterArcFace
                cosine = arcface(theta, m)
            logits[i, j] = head.s * cosine
    return logits


def angle(a: list[float], b: list[float]) -> float:
    a, b = (np.array(vector) / math.hypot(*vector) for vector in (a, b))
    return 2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b))


def arcface(theta: float, m: float) -> float:
    return math.cos(theta + m) if theta + m < math.pi else math.cos(theta) - m * math.sin(m)


def psi(x: float) -> float:
    k = int(x // math.pi)
    return (-1) ** k * math.cos(x) - 2 * k


def frozen(name: str, settings: dict) -> MarginHead:
    """Return a head whose statistics do not change between calls."""
    return make(name, **settings).train("Elastic" in name)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.0])
def test_margin_logits_equal_slow_logits(name: str, settings: dict, fraction: float) -> None:
    head = make(name, **settings)
    embeddings, labels = batch(head)
    expected = slow_logits(head, embeddings, labels, fraction * head.m)
    logits = head(embeddings, labels, margin=fraction * head.m, step=STEP)
    np.testing.assert_allclose(logits.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("AdaFace", "CurricularFace")])
def test_margin_zero_gives_plain_cosines(name: str) -> None:
    head = make(name)
    embeddings, labels = batch(head)
    centers = F.normalize(head.weight.reshape(CLASSES, -1, DIM), dim=2)
    cosines = torch.einsum("nd,ckd->nck", F.normalize(embeddings), centers).amax(2)
    torch.testing.assert_close(head(embeddings, labels, margin=0.0), head.s * cosines)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_margin_gradients_equal_finite_differences(name: str, settings: dict) -> None:
    head = frozen(name, settings)
    embeddings, labels = (values[:12] for values in batch(head))
    lengths = embeddings.norm(dim=1, keepdim=True)

    def loss(embeddings: Tensor, weight: Tensor) -> Tensor:
        # AdaFace's margin depends on the length, but has no gradient.
        inputs = F.normalize(embeddings) * lengths if name == "AdaFace" else embeddings
        logits = torch.func.functional_call(head, {"weight": weight}, (inputs, labels), {"step": STEP})
        return (logits / head.s).sin()  # not linear: the gradients of the logits differ

    assert torch.autograd.gradcheck(loss, (embeddings.requires_grad_(), head.weight.detach().requires_grad_()))


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_margin_gradients_are_finite_at_cosine_one(name: str, settings: dict, sign: float) -> None:
    head = make(name, **settings).float()
    centers = torch.eye(CLASSES, DIM) * 3
    centers[DIM:] = 1.0
    head.weight.data = centers.view(CLASSES, *[1] * (head.weight.dim() - 2), DIM).expand_as(head.weight).clone()
    embeddings = (sign * 2 * torch.eye(DIM)).requires_grad_()
    labels = torch.arange(DIM)
    logits = head(embeddings, labels)
    F.cross_entropy(logits, labels).backward()
    assert logits.isfinite().all() and embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_head_parameters_equal_the_defaults_of_the_classes() -> None:
    assert set(HEAD_PARAMETERS) == set(HEAD_PAPERS) == set(HEADS)
    for name, head in HEADS.items():
        parameters = list(inspect.signature(head.__init__).parameters.values())[3:]  # self, in_features, out_features
        found = {each.name: each.default for each in parameters if each.kind is not each.VAR_KEYWORD}
        assert found == HEAD_PARAMETERS[name], name


def test_build_head_takes_the_default_for_none() -> None:
    assert build_head("CosFace", DIM, CLASSES, s=None, m=None, rows=None).m == 0.35
    assert build_head("SphereFace", DIM, CLASSES, m=None).s == 30.0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("MagFace", {"m": 0.5}, "MagFace has no parameter m. Its parameters are s, l_a, u_a"),
        ("CombinedMargin", {"m": 0.5}, "CombinedMargin has no parameter m. Its parameters are s, m1, m2, m3"),
        ("ElasticArcFacePlus", {"plus": False}, "ElasticArcFacePlus has no parameter plus"),
        ("AdaFace", {"h": -1}, "AdaFace: h is -1"),
        ("AdaFace", {"t_alpha": 1.1}, "AdaFace: t_alpha is 1.1"),
        ("MagFace", {"l_a": 0}, "MagFace: l_a is 0 and u_a is 110"),
        ("MagFace", {"l_m": 0.9}, "MagFace: l_m is 0.9 and u_m is 0.8"),
        ("MagFace", {"lambda_g": math.nan}, "MagFace: lambda_g is nan"),
        ("CurricularFace", {"momentum": 2}, "CurricularFace: momentum is 2"),
        ("ElasticArcFace", {"std": -0.1}, r"ElasticArcFace: std is -0\.1"),
        ("ElasticCosFace", {"std": -0.1}, r"ElasticCosFace: std is -0\.1"),
        ("SphereFace", {"m": 0.5}, "SphereFace: the margin m is 0.5. It multiplies"),
        ("CombinedMargin", {"m1": 0}, "CombinedMargin: m1 is 0"),
        ("CombinedMargin", {"m3": -1}, "CombinedMargin: m2 is 0.5 and m3 is -1"),
        ("SubCenterArcFace", {"k": 0}, "SubCenterArcFace: k is 0"),
        ("ArcFace", {"interclass_filtering_threshold": 1.5}, "ArcFace: interclass_filtering_threshold is 1.5"),
    ],
)
def test_build_head_rejects_bad_parameters(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_head(name, DIM, CLASSES, **settings)


@pytest.mark.parametrize(
    ("m1", "m2", "m3", "name", "m"),
    [(1.0, 0.4, 0.0, "ArcFace", 0.4), (1.0, 0.0, 0.3, "CosFace", 0.3), (1.7, 0.0, 0.0, "SphereFace", 1.7)],
)
def test_combined_margin_contains_the_other_heads(m1: float, m2: float, m3: float, name: str, m: float) -> None:
    combined, head = make("CombinedMargin", s=20.0, m1=m1, m2=m2, m3=m3), make(name, s=20.0, m=m)
    embeddings, labels = batch(head)
    torch.testing.assert_close(combined(embeddings, labels), head(embeddings, labels))


GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "adaface": ("AdaFace", {}),
    "curricular": ("CurricularFace", {}),
    "magface": ("MagFace", {"lambda_g": 20.0}),
    "magface_easy": ("MagFace", {"lambda_g": 20.0, "easy_margin": True}),
}


@pytest.mark.parametrize("key", list(GOLDEN))
def test_margin_golden_numbers_of_three_batches(golden, key: str) -> None:
    numbers = np.load(golden / "margins.npz")
    name, settings = GOLDEN[key]
    head = build_head(name, 32, 37, **settings).double()
    head.weight.data = torch.from_numpy(numbers["weight"])
    for b in range(3):
        head.zero_grad()
        embeddings = torch.from_numpy(numbers["embeddings"][b]).requires_grad_()
        labels = torch.from_numpy(numbers["labels"][b])
        logits = head(embeddings, labels)
        value = build_loss("cross_entropy")(logits, labels) + head.regularizer(embeddings)
        value.backward()
        found = {"logits": logits.detach(), "ce": value.detach(), "grad_embeddings": embeddings.grad}
        found |= {"grad_weight": head.weight.grad} | dict(head.named_buffers())
        for part, tensor in found.items():
            np.testing.assert_allclose(tensor, numbers[f"{key}.{part}.{b}"], rtol=1e-12, atol=1e-12, err_msg=part)
        if isinstance(head, MagFace):
            expected = 20 * numbers[f"{key}.regulariser.{b}"]
            np.testing.assert_allclose(head.regularizer(embeddings).item(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["AdaFace", "CurricularFace"])
def test_head_buffers_change_in_training_and_travel(name: str) -> None:
    head, resumed = make(name), make(name)
    initial = {key: value.clone() for key, value in head.state_dict().items()}
    for seed in range(3):
        head(*batch(head, seed))
    saved = {key: value.clone() for key, value in head.state_dict().items()}
    assert all(saved[key] != initial[key] for key, _ in head.named_buffers())
    head.eval()
    head(*batch(head, 3))
    assert all(torch.equal(value, saved[key]) for key, value in head.state_dict().items())

    head.train()
    resumed.load_state_dict(saved)
    assert torch.equal(head(*batch(head, 4)), resumed(*batch(head, 4)))
    assert all(torch.equal(value, head.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_adaface_statistics_ignore_a_batch_of_one_sample() -> None:
    head = make("AdaFace")
    embeddings, labels = batch(head)
    assert head(embeddings[:1], labels[:1]).isfinite().all()
    assert head.batch_mean == 20.0 and head.batch_std == 100.0


def test_magface_regularizer_pulls_lengths_to_the_upper_bound() -> None:
    head = make("MagFace")
    lengths = torch.tensor([1.0, 10.5, 30.0, 109.0, 200.0], dtype=torch.float64)
    embeddings = (lengths[:, None] * F.normalize(torch.randn(5, DIM, dtype=torch.float64))).requires_grad_()
    value = head.regularizer(embeddings)
    clipped = [10.0, 10.5, 30.0, 109.0, 110.0]
    assert value.item() == pytest.approx(35 * sum(a / 110**2 + 1 / a for a in clipped) / 5, rel=1e-12)
    value.backward()
    along = (embeddings.grad * embeddings).sum(1) / lengths
    expected = [0.0, *(35 * (1 / 110**2 - 1 / a**2) / 5 for a in clipped[1:4]), 0.0]
    np.testing.assert_allclose(along.detach(), expected, atol=1e-12)
    assert all(make(name).regularizer(embeddings) == 0 for name in HEADS if name != "MagFace")


@pytest.mark.parametrize("name", ["ElasticArcFace", "ElasticArcFacePlus", "ElasticCosFace", "ElasticCosFacePlus"])
def test_elastic_margins_depend_on_seed_and_step(name: str) -> None:
    embeddings, labels = batch(make(name))
    logits = {(seed, step): make(name, seed=seed)(embeddings, labels, step=step) for seed in (1, 2) for step in (0, 1)}
    values = list(logits.values())
    assert not any(torch.equal(values[i], values[j]) for i in range(4) for j in range(i))
    assert torch.equal(make(name, seed=2)(embeddings, labels, step=1), logits[2, 1])
    fixed = make(name.removeprefix("Elastic").removesuffix("Plus"))
    torch.testing.assert_close(make(name).eval()(embeddings, labels), fixed(embeddings, labels))


@pytest.mark.parametrize("plus", [False, True])
def test_elastic_margins_are_normal_and_sorted_with_plus(plus: bool) -> None:
    head = build_head("ElasticCosFace", DIM, CLASSES, s=1.0, std=0.1, plus=plus).double()
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(20000, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (20000,), generator=generator)
    position = (torch.arange(20000), labels)
    cosine = head(embeddings, labels, margin=0.0)[position]
    margins = cosine - head(embeddings, labels)[position]
    assert margins.mean().item() == pytest.approx(0.35, abs=0.003)
    assert margins.std().item() == pytest.approx(0.1, abs=0.002)
    by_distance = margins[cosine.argsort(descending=True)]
    assert (by_distance.diff() >= -1e-12).all().item() == plus


def test_filtering_stops_gradients_of_similar_other_classes() -> None:
    head, plain = make("CosFace", **FILTER), make("CosFace")
    embeddings, labels = batch(head)
    logits, expected = head(embeddings, labels), plain(embeddings, labels)
    is_other = F.one_hot(labels, CLASSES) == 0
    is_filtered = is_other & (plain(embeddings, labels, margin=0.0) > 0.3 * head.s)
    assert 5 < is_filtered.sum() < is_other.sum()
    assert (logits[is_filtered] == 0).all()
    torch.testing.assert_close(logits[~is_filtered], expected[~is_filtered])
    (gradient,) = torch.autograd.grad(logits[is_filtered].sum(), head.weight)
    assert (gradient == 0).all()


@pytest.mark.parametrize(("name", "settings"), [("ArcFace", FILTER), ("SubCenterArcFace", {}), ("AdaFace", {})])
def test_logits_of_shards_equal_those_of_all_classes(name: str, settings: dict) -> None:
    head = make(name, **settings).eval()
    embeddings, labels = batch(head)
    parts = []
    for rows in (range(3), range(3, CLASSES)):
        target = torch.where((labels >= rows.start) & (labels < rows.stop), labels - rows.start, -1)
        parts.append(head.logits(embeddings, head.weight[rows.start : rows.stop], target))
    torch.testing.assert_close(torch.cat(parts, 1), head(embeddings, labels))


def test_subcenter_trains_the_nearest_center_alone() -> None:
    head = make("SubCenterArcFace")
    embeddings, labels = batch(head)
    assert head.weight.shape == (CLASSES, 3, DIM)
    logits = head(embeddings, labels)
    cosines = torch.einsum("nd,ckd->nck", F.normalize(embeddings), F.normalize(head.weight, dim=2))
    for sample in (0, 1):
        for label in range(CLASSES):
            (gradient,) = torch.autograd.grad(logits[sample, label], head.weight, retain_graph=True)
            assert gradient.norm(dim=2).nonzero().tolist() == [[label, int(cosines[sample, label].argmax())]]


def test_subcenter_with_one_center_equals_arcface() -> None:
    head, arcface_head = make("SubCenterArcFace", k=1), make("ArcFace")
    assert torch.equal(head.weight[:, 0], arcface_head.weight)
    embeddings, labels = batch(head)
    torch.testing.assert_close(head(embeddings, labels), arcface_head(embeddings, labels))
