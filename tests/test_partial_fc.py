"""PartialFC against a head with all classes, and its sampling of classes."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from model.head import HEADS, MarginHead, PartialFC, build_head, shard_range
from model.loss import build_loss
from model.loss.log_probability import _BLOCK_SIZE, log_probability
from tests.multiprocess import in_processes

CLASSES, SIZE, EACH = 11, 5, 6  # 11 is divisible by neither 2 nor 3; 6 samples per rank
SETTINGS: dict[str, dict[str, Any]] = {name: {"s": 16.0} for name in HEADS} | {
    "ArcFace": {"s": 16.0, "m": 0.3},
    "AdaFace": {"s": 16.0, "t_alpha": 0.5},
    "CurricularFace": {"s": 16.0, "momentum": 0.5, "interclass_filtering_threshold": 0.5},
    "SubCenterArcFace": {"s": 16.0, "interclass_filtering_threshold": 0.5},
}
CASES = list(product(HEADS, ("focal", "cross_entropy")))


def samples(world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    embeddings = 10 * torch.randn(EACH * world_size, SIZE, generator=generator)
    return embeddings, torch.randint(CLASSES, (len(embeddings),), generator=generator)


def build(name: str, rows: range | None = None) -> MarginHead:
    torch.manual_seed(8)
    return build_head(name, SIZE, CLASSES, rows=rows, **SETTINGS[name])


def buffers(head: MarginHead) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in head.named_buffers()}


def every_case(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, loss in CASES:
        head = build(name, shard_range(CLASSES, rank, world_size))
        embeddings, labels = (values.chunk(world_size)[rank].clone() for values in samples(world_size))
        initial = head.weight.detach().clone()
        partial_fc = PartialFC(head, build_loss(loss))
        partial_fc(embeddings, labels)  # changes the statistics that the second step uses
        value, target_rank = partial_fc(embeddings.requires_grad_(), labels, step=1)
        value.backward()
        found[f"{name} {loss}"] = {
            "initial": initial,
            "loss": value.detach(),
            "target_rank": target_rank,
            "weight": head.weight.grad,
            "embeddings": embeddings.grad / world_size,  # as DistributedDataParallel's mean will
            "buffers": buffers(head),
        }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_partial_fc_over_ranks_equals_a_full_head(world_size: int, tmp_path: Path) -> None:
    found = in_processes(world_size, tmp_path, every_case)
    for name, loss in CASES:
        head = build(name)
        embeddings, labels = samples(world_size)
        head(embeddings, labels)
        logits = head(embeddings.requires_grad_(), labels, step=1)
        value = build_loss(loss)(logits, labels) + head.regularizer(embeddings)
        value.backward()
        shards = [results[f"{name} {loss}"] for results in found]
        full = {key: torch.cat([shard[key] for shard in shards]) for key in ("initial", "weight", "embeddings")}
        assert torch.equal(full["initial"], head.weight)
        torch.testing.assert_close(full["weight"], head.weight.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(full["embeddings"], embeddings.grad, rtol=1e-5, atol=1e-6)
        above = (logits > logits.gather(1, labels[:, None])).sum(1)
        for shard in shards:
            torch.testing.assert_close(shard["loss"], value.detach(), rtol=1e-5, atol=0)
            assert shard["target_rank"].tolist() == above.tolist()
            assert shard["buffers"] == shards[0]["buffers"]
            torch.testing.assert_close(shard["buffers"], buffers(head))


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_partial_fc_of_one_rank_equals_a_full_head(name: str, loss: str) -> None:
    embeddings, labels = samples(2)
    value, _ = PartialFC(build(name), build_loss(loss))(embeddings, labels, step=3)
    head = build(name)
    logits = head(embeddings, labels, step=3)
    torch.testing.assert_close(value, build_loss(loss)(logits, labels) + head.regularizer(embeddings))


@pytest.mark.parametrize("name", list(HEADS))
def test_partial_fc_samples_classes_of_every_head(name: str) -> None:
    embeddings, labels = samples(1)
    partial_fc = PartialFC(build(name), build_loss("cross_entropy"), sample_rate=0.7)
    value, _ = partial_fc(embeddings, labels, step=2)
    sampled = partial_fc.sample_classes(labels, 2)
    assert len(sampled) == 8
    head = build(name)
    logits = head(embeddings, labels, step=2)[:, sampled]
    expected = torch.nn.functional.cross_entropy(logits, torch.searchsorted(sampled, labels))
    torch.testing.assert_close(value, expected + head.regularizer(embeddings))


@pytest.mark.parametrize(("classes", "world_size"), [(11, 2), (11, 3), (3, 3), (8, 4), (2, 1)])
def test_shard_range_holds_each_class_once(classes: int, world_size: int) -> None:
    shards = [shard_range(classes, rank, world_size) for rank in range(world_size)]
    assert [row for shard in shards for row in shard] == list(range(classes))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("name", ["ArcFace", "SubCenterArcFace"])
def test_shards_start_with_the_weights_of_a_full_head(name: str, monkeypatch) -> None:
    for block_size in (65536, 4, 3):
        monkeypatch.setattr("model.head.margin._INIT_ROWS", block_size)
        weights = []
        for rank in range(3):
            weights.append(build(name, shard_range(CLASSES, rank, 3)).weight)
        assert torch.equal(torch.cat(weights), build(name).weight)
    torch.manual_seed(8)
    glorot = torch.nn.init.xavier_uniform_(torch.empty(CLASSES, SIZE))
    assert torch.equal(glorot, build("ArcFace").weight)


def sampling_head(rate: float, classes: int = 400, seed: int = 1) -> PartialFC:
    torch.manual_seed(0)
    head = build_head("CosFace", SIZE, classes, s=16.0, m=0.2)
    return PartialFC(head, build_loss("cross_entropy"), rate, seed)


def test_sample_classes_keeps_targets_and_varies_by_step() -> None:
    target = torch.tensor([7, 399, -1, 0, 7])
    chosen = {}
    for seed, step in product((1, 2), (0, 1, 2)):
        partial_fc = sampling_head(0.1, seed=seed)
        found = partial_fc.sample_classes(target, step).tolist()
        assert {0, 7, 399} <= set(found) and len(set(found)) == len(found) == 40 and found == sorted(found)
        assert partial_fc.sample_classes(target, step).tolist() == found
        chosen[seed, step] = tuple(found)
    assert len(set(chosen.values())) == 6
    times = torch.zeros(400)
    partial_fc = sampling_head(0.1)
    for step in range(400):
        times[partial_fc.sample_classes(torch.tensor([-1]), step)] += 1
    assert times.min() > 15 and times.max() < 75  # 40 each, plus or minus 6


def test_sample_classes_has_room_for_each_sample() -> None:
    assert len(sampling_head(0.001).sample_classes(torch.arange(30), 0)) == 30
    assert len(sampling_head(0.001, classes=9).sample_classes(torch.arange(9).repeat(3), 0)) == 9


def test_partial_fc_loss_uses_the_sampled_classes() -> None:
    partial_fc = sampling_head(0.1)
    embeddings, labels = samples(2)
    value, target_rank = partial_fc(embeddings, labels)
    sampled = partial_fc.sample_classes(labels, 0)
    logits = partial_fc.head(embeddings, labels)[:, sampled]
    target = torch.searchsorted(sampled, labels)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, target))
    assert target_rank.tolist() == (logits > logits.gather(1, target[:, None])).sum(1).tolist()
    value.backward()
    touched = partial_fc.head.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert set(touched.tolist()) <= set(sampled.tolist())


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_partial_fc_rejects_bad_sample_rates(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate is"):
        sampling_head(rate)


@pytest.mark.parametrize("block_size", [1, 7, 2**22])
def test_log_probability_equals_log_softmax(monkeypatch, block_size: int) -> None:
    monkeypatch.setitem(_BLOCK_SIZE, "cpu", block_size)
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(4, (6,), generator=generator)
    expected = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_probability(logits, labels), expected)
    assert torch.autograd.gradcheck(lambda values: log_probability(values, labels), logits)
