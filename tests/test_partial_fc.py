"""The head spread over processes against the whole one, and its sampling of classes."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch

from model.head import HEADS, PartialFC, build_head, shard_range
from model.loss import build_loss
from model.loss.log_probability import _AT_ONCE, log_probability
from tests.multiprocess import in_processes

CLASSES, SIZE, EACH = 11, 5, 6  # 11 classes divide by neither 2 nor 3; 6 samples a process
CASES = list(product(HEADS, ("focal", "cross_entropy")))


def samples(ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    embeddings = torch.randn(EACH * ranks, SIZE, generator=generator)
    return embeddings, torch.randint(CLASSES, (len(embeddings),), generator=generator)


def whole_head(name: str) -> torch.nn.Module:
    torch.manual_seed(8)
    return build_head(name, SIZE, CLASSES, s=16.0, m=0.3)


def every_case(rank: int, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name, loss in CASES:
        torch.manual_seed(8)
        head = build_head(name, SIZE, CLASSES, s=16.0, m=0.3, rows=shard_range(CLASSES, rank, ranks))
        embeddings, labels = (values.chunk(ranks)[rank].clone() for values in samples(ranks))
        drawn = head.weight.detach().clone()
        value, places = PartialFC(head, build_loss(loss))(embeddings.requires_grad_(), labels)
        value.backward()
        found[f"{name} {loss}"] = {
            "drawn": drawn,
            "loss": value.detach(),
            "ranks": places,
            "weight": head.weight.grad,
            "embeddings": embeddings.grad / ranks,  # as DistributedDataParallel's mean will
        }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_head_over_processes_equals_the_whole_one(ranks: int, tmp_path: Path) -> None:
    found = in_processes(ranks, tmp_path, every_case)
    for name, loss in CASES:
        head = whole_head(name)
        embeddings, labels = samples(ranks)
        logits = head(embeddings.requires_grad_(), labels)
        value = build_loss(loss)(logits, labels)
        value.backward()
        parts = [part[f"{name} {loss}"] for part in found]
        together = {key: torch.cat([part[key] for part in parts]) for key in ("drawn", "weight", "embeddings")}
        assert torch.equal(together["drawn"], head.weight)
        torch.testing.assert_close(together["weight"], head.weight.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together["embeddings"], embeddings.grad, rtol=1e-5, atol=1e-6)
        above = (logits > logits.gather(1, labels[:, None])).sum(1)
        for part in parts:
            torch.testing.assert_close(part["loss"], value.detach(), rtol=1e-5, atol=0)
            assert part["ranks"].tolist() == above.tolist()


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_one_process_is_a_whole_head(name: str, loss: str) -> None:
    embeddings, labels = samples(2)
    head = whole_head(name)
    value, _ = PartialFC(head, build_loss(loss))(embeddings, labels)
    torch.testing.assert_close(value, build_loss(loss)(head(embeddings, labels), labels))


@pytest.mark.parametrize(("classes", "ranks"), [(11, 2), (11, 3), (3, 3), (8, 4), (2, 1)])
def test_shards_hold_each_class_once_and_differ_by_one_at_most(classes: int, ranks: int) -> None:
    shards = [shard_range(classes, rank, ranks) for rank in range(ranks)]
    assert [row for shard in shards for row in shard] == list(range(classes))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_shards_begin_as_the_whole_head_also_across_the_rows_drawn_together(monkeypatch) -> None:
    for at_once in (65536, 4, 3):
        monkeypatch.setattr("model.head.margin._ROWS_AT_ONCE", at_once)
        weights = []
        for rank in range(3):
            torch.manual_seed(8)
            weights.append(build_head("ArcFace", SIZE, CLASSES, rows=shard_range(CLASSES, rank, 3)).weight)
        assert torch.equal(torch.cat(weights), whole_head("ArcFace").weight)
    torch.manual_seed(8)
    glorot = torch.nn.init.xavier_uniform_(torch.empty(CLASSES, SIZE))
    assert torch.equal(glorot, whole_head("ArcFace").weight)


def sampling_head(rate: float, classes: int = 400, seed: int = 1) -> PartialFC:
    torch.manual_seed(0)
    head = build_head("CosFace", SIZE, classes, s=16.0, m=0.2)
    return PartialFC(head, build_loss("cross_entropy"), rate, seed)


def test_sampling_keeps_the_classes_of_the_batch_and_fills_up_with_others_that_change() -> None:
    columns = torch.tensor([7, 399, -1, 0, 7])
    chosen = {}
    for seed, step in product((1, 2), (0, 1, 2)):
        sharded = sampling_head(0.1, seed=seed)
        sharded.head.step = step
        found = sharded.sampled(columns).tolist()
        assert {0, 7, 399} <= set(found) and len(set(found)) == len(found) == 40 and found == sorted(found)
        assert sharded.sampled(columns).tolist() == found
        chosen[seed, step] = tuple(found)
    assert len(set(chosen.values())) == 6
    times = torch.zeros(400)
    sharded = sampling_head(0.1)
    for step in range(400):
        sharded.head.step = step
        times[sharded.sampled(torch.tensor([-1]))] += 1
    assert times.min() > 15 and times.max() < 75  # 40 each, plus or minus 6


def test_few_classes_leave_room_for_each_sample() -> None:
    assert len(sampling_head(0.001).sampled(torch.arange(30))) == 30
    assert len(sampling_head(0.001, classes=9).sampled(torch.arange(9).repeat(3))) == 9


def test_a_sampled_loss_is_that_of_the_sampled_classes() -> None:
    sharded = sampling_head(0.1)
    embeddings, labels = samples(2)
    value, places = sharded(embeddings, labels)
    chosen = sharded.sampled(labels)
    logits = sharded.head(embeddings, labels)[:, chosen]
    columns = torch.searchsorted(chosen, labels)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, columns))
    assert places.tolist() == (logits > logits.gather(1, columns[:, None])).sum(1).tolist()
    value.backward()
    touched = sharded.head.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert set(touched.tolist()) <= set(chosen.tolist())


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_sample_rate_that_is_none_is_named(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate is"):
        sampling_head(rate)


@pytest.mark.parametrize("at_once", [1, 7, 2**22])
def test_log_probabilities_and_gradients_are_those_of_log_softmax(monkeypatch, at_once: int) -> None:
    monkeypatch.setitem(_AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(4, (6,), generator=generator)
    expected = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_probability(logits, labels), expected)
    assert torch.autograd.gradcheck(lambda values: log_probability(values, labels), logits)
