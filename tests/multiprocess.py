"""Work done in several gloo processes.

They are forked from a server process that has imported what they need, because an import of torch takes seconds.
"""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The last three are imported by the first step of an optimizer, the first plot and the first log.
_PRELOADED = ["util.training.trainer", "benchmarks.ddp_parity"]
_PRELOADED += ["torch._dynamo", "matplotlib.backends.backend_agg", "torch.utils.tensorboard"]
multiprocessing.set_forkserver_preload(_PRELOADED)


def in_processes(world_size: int, folder: Path, work: Callable[[int, int], object]) -> list:
    """Call work(rank, world_size) in `world_size` processes of one process group and return the results by rank."""
    (folder / "store").unlink(missing_ok=True)  # of an earlier call
    arguments = (world_size, str(folder), work)
    mp.start_processes(_run, arguments, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(rank: int, world_size: int, folder: str, work: Callable[[int, int], object]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(work(rank, world_size), Path(folder) / f"{rank}.pt")
    gc.collect()  # a DDP module in a reference cycle would outlive its process group
    dist.barrier()  # a rank that leaves earlier closes connections that another rank may still read from
    dist.destroy_process_group()


def main_as_ranks(world_size: int, main: Callable[[list[str]], None], arguments: Sequence[str], output: Path) -> str:
    """Call main(arguments) in `world_size` processes with the environment of torchrun, and return what they print."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    output.write_text("")
    given = (world_size, port, main, list(arguments), str(output))
    mp.start_processes(_run_main, given, nprocs=world_size, start_method="forkserver")
    return output.read_text()


def _run_main(rank: int, world_size: int, port: int, main: Callable, arguments: list[str], output: str) -> None:
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if world_size > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, rank, world_size, world_size, "127.0.0.1", port)
        os.environ.update(zip(names, map(str, values), strict=True))
    main(arguments)
