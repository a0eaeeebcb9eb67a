"""Work done in several gloo processes."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(world_size: int, folder: Path, work: Callable[[int, int], object]) -> list:
    """Call work(rank, world_size) in `world_size` processes of one process group and return the results by rank."""
    mp.spawn(_run, (world_size, str(folder), work), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(rank: int, world_size: int, folder: str, work: Callable[[int, int], object]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(work(rank, world_size), Path(folder) / f"{rank}.pt")
    gc.collect()  # a DDP module in a reference cycle would outlive its process group
    dist.barrier()  # a rank that leaves earlier closes connections that another rank may still read from
    dist.destroy_process_group()
