"""Work done in several gloo processes.

They are forked from a server process that has imported what they need, because an import of torch takes seconds.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

from tests.conftest import draw_no_plots
from util.errors import run_script

# The last four are imported by the first step of an optimizer, the first plot, the first log and its first image.
_PRELOADED = ["util.training.trainer", "benchmarks.ddp_parity"]
_PRELOADED += ["torch._dynamo", "matplotlib.backends.backend_agg", "torch.utils.tensorboard", "PIL.JpegImagePlugin"]
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


@dataclass(frozen=True)
class Launched:
    """How a program ended: its exit code, negative for a signal, and what all of its processes printed."""

    code: int
    output: str


def signal_at(owner: object, name: str, call: int, number: int, to: str = "program", rank: int = 0) -> None:
    """Let a launched program receive a signal before the given call of a function on a rank.

    Args:
        owner: has the function.
        name: of the function.
        call: number of the call, from 1.
        number: of the signal.
        to: "program" for what was started, which is torchrun if there are several ranks; "rank" for this rank alone;
            "terminal" for all processes, as Ctrl-C.
        rank: of which the call counts.
    """
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(None)
        if len(calls) == call and os.environ.get("RANK", str(rank)) == str(rank):
            if to == "terminal":
                os.killpg(0, number)
            elif to == "program" and "RANK" in os.environ:
                os.kill(os.getppid(), number)
                time.sleep(0.5)  # until torchrun has passed it on
            else:
                os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, function)


def launch(
    main: Callable[[list[str]], None],
    arguments: list[str],
    output: Path,
    prepare: Callable[[], None] | None = None,
    ranks: int = 1,
) -> Launched:
    """Run main(arguments) as a script, under torchrun if there are several ranks, until all its processes have ended.

    Everything is forked from a server process, so that nothing is imported.

    Args:
        main: of the script.
        arguments: its command line.
        output: the file for what it prints.
        prepare: is called before main(), to inject a fault.
        ranks: processes that torchrun starts.
    """
    output.write_text("")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_launch, args=(ranks, main, arguments, str(output), prepare))
    process.start()
    process.join(300)
    deadline = time.monotonic() + 30
    with suppress(ProcessLookupError):  # all processes of its session have ended
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"processes are left: {output.read_text()}")
    return Launched(process.exitcode, output.read_text())


def _launch(ranks: int, main: Callable, arguments: list[str], output: str, prepare: Callable | None) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader processes, as outside of this process
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    draw_no_plots(pytest.MonkeyPatch())
    if prepare:
        prepare()
    if ranks == 1:
        _run_as_script(main, arguments)
        return
    flags = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", f"--nproc_per_node={ranks}"]  # as --standalone
    flags += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1", "--start_method=fork", "--monitor_interval=0.1"]
    config, _, _ = torchrun.config_from_args(torchrun.parse_args([*flags, "train.py"]))
    elastic_launch(config, _run_as_script)(main, arguments)


def _run_as_script(main: Callable, arguments: list[str]) -> None:
    sys.argv = ["train.py", *arguments]
    run_script(main)


def _run_main(rank: int, world_size: int, port: int, main: Callable, arguments: list[str], output: str) -> None:
    torch.set_num_threads(1)
    draw_no_plots(pytest.MonkeyPatch())
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if world_size > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, rank, world_size, world_size, "127.0.0.1", port)
        os.environ.update(zip(names, map(str, values), strict=True))
    main(arguments)
