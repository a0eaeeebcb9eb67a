"""Work done in several gloo processes."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(ranks: int, folder: Path, work: Callable[[int, int], object]) -> list:
    """What work(rank, ranks) gives in each of so many processes that have met."""
    mp.spawn(_run, (ranks, str(folder), work), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _run(rank: int, ranks: int, folder: str, work: Callable[[int, int], object]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.save(work(rank, ranks), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
