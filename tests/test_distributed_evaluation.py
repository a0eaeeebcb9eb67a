"""Evaluation split over several processes."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.multiprocess import in_processes
from util.evaluate import evaluate
from util.pairs import load_pairs


def accuracies(data: str, batch_size: int) -> list[float]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 7, stride=7), nn.Flatten(), nn.Linear(4 * 256, 16))
    pairs = load_pairs(data)
    pairs.name = "noise"
    result = evaluate(backbone, [pairs], batch_size=batch_size, views=("HR", "LR"))
    values = []
    for sets in result.values():
        found = sets["noise"]
        values += [found.accuracy, found.threshold, found.auc, *found.norms.tolist()]
    return values


def all_batch_sizes(data: str, *_: int) -> list[list[float]]:
    return [accuracies(data, size) for size in (8, 64)]  # 64 makes fewer batches than processes


@pytest.mark.slow
def test_evaluate_in_three_processes_equals_one(made_pairs, tmp_path) -> None:
    data = str(made_pairs[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = all_batch_sizes(data)
    torch.set_num_threads(threads)
    assert in_processes(3, tmp_path, partial(all_batch_sizes, data)) == [expected] * 3
