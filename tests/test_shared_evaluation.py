"""Evaluation shared out among processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from util.evaluate import evaluate
from util.pairs import load_pairs


def accuracies(data: str, batch_size: int) -> list[float]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 7, stride=7), nn.Flatten(), nn.Linear(4 * 256, 16))
    pairs = load_pairs(data)
    pairs.name = "noise"
    result = evaluate(backbone, [pairs], batch_size=batch_size, views=("HR", "LR"))
    values = [[found["noise"].accuracy, found["noise"].threshold, found["noise"].auc] for found in result.values()]
    return np.ravel(values).tolist()


def _share(rank: int, ranks: int, folder: str, data: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.save([accuracies(data, size) for size in (8, 64)], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_find_what_one_finds_even_with_fewer_batches_than_processes(made_pairs, tmp_path) -> None:
    data = str(made_pairs[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [accuracies(data, size) for size in (8, 64)]
    torch.set_num_threads(threads)
    mp.spawn(_share, (3, str(tmp_path), data), nprocs=3)
    for rank in range(3):
        assert torch.load(tmp_path / f"{rank}.pt") == expected
