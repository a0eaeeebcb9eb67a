"""Training in many processes, which torchrun starts: who this one is, how they meet, and how they end together.

torch is imported in functions: config.py reads from here, too.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from util.errors import RunError, UsageError, ignore_sigterm, run_script

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

LOST = "another process of this run ended or no longer answers; its own message says why"
# How long processes wait for each other. The first one writes checkpoints and plots while the others wait.
_PATIENCE = timedelta(minutes=20)
_TERMINATED = 143
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class DistEnv:
    """Which of how many processes this is: in the run, and on its machine. Alone, unless torchrun says otherwise."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environ(cls, environment: Mapping[str, str] = os.environ) -> "DistEnv":
        """Read torchrun's variables. Raise UsageError if LOCAL_RANK is set without the others."""
        if "LOCAL_RANK" not in environment:
            return cls()
        try:
            return cls(*(int(environment[name]) for name in _VARIABLES))
        except (KeyError, ValueError):
            raise UsageError(
                f"LOCAL_RANK is set, but {', '.join(_VARIABLES)} are not all numbers; start with torchrun, or unset it"
            ) from None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.count > 1


def local_gpu_ids(gpu_num: Sequence[int], env: DistEnv) -> tuple[int, ...]:
    """Those of --gpu_num that are this process's: under torchrun one each, or none for the CPU.

    The default, GPU 0, then means the GPU of the number of the process on its machine. UsageError for another list that
    has not an entry for each process.
    """
    if not env.is_distributed or not gpu_num:
        return tuple(gpu_num)
    if tuple(gpu_num) == (0,):
        return (env.local_rank,)
    if len(gpu_num) != env.local_world_size:
        raise UsageError(
            f"--gpu_num={list(gpu_num)}: torchrun starts {env.local_world_size} processes on this machine, and each "
            f"has one GPU; name so many GPUs, or leave it out for the first ones"
        )
    return (gpu_num[env.local_rank],)


@contextmanager
def distributed_session(gpu_num: Sequence[int], env: DistEnv) -> Iterator[list["torch.device"]]:
    """The devices of this process, met with the others; of their output to stdout only the first one's is shown.

    Numbers travel by NCCL between GPUs and by gloo between CPUs. If another process is lost, RunError(LOST).
    """
    from util.device import select_devices

    if not env.is_distributed:
        yield select_devices(gpu_num)
        return
    import torch.distributed as dist

    with open(os.devnull, "w") as nowhere, nullcontext() if env.is_main_process else redirect_stdout(nowhere):
        _check_gpus(gpu_num, env)
        devices = select_devices(local_gpu_ids(gpu_num, env))
        try:
            dist.init_process_group("gloo" if devices[0].type == "cpu" else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)
            yield devices
            dist.barrier()  # who leaves earlier closes connections that another may still read from
        except RuntimeError as error:
            if _is_loss(error):
                raise RunError(LOST) from error
            raise
        dist.destroy_process_group()


def _check_gpus(gpu_num: Sequence[int], env: DistEnv) -> None:
    import torch

    count = torch.cuda.device_count()
    if tuple(gpu_num) == (0,) and torch.cuda.is_available() and count < env.local_world_size:
        raise UsageError(
            f"torchrun starts {env.local_world_size} processes on this machine, which has {count} GPUs; give "
            f"--nproc_per_node={count}"
        )


def _is_loss(error: RuntimeError) -> bool:
    """gloo raises RuntimeErrors that are told by their text alone."""
    import torch.distributed as dist

    if isinstance(error, RunError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Connection closed by"))


def broadcast_from_main(make: Callable[[], Result], env: DistEnv) -> Result:
    """What make() gives in the first process, in all of them; for what can be pickled."""
    if not env.is_distributed:
        return make()
    import torch.distributed as dist

    made = [make() if env.is_main_process else None]
    dist.broadcast_object_list(made)
    return made[0]


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Sets torch's generators to what belongs to an epoch and a process."""
    import numpy as np
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> 1))


def first_to_say(message: str) -> bool:
    """Whether no other process of the run has asked this for the same message: one line is enough for all of them.

    The store in which they met is torchrun's own, and outlives any of them.
    """
    if not _several():
        return True
    from torch.distributed import TCPStore

    name = f"said {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {hashlib.sha1(message.encode()).hexdigest()}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10)).add(name, 1) == 1
    except (RuntimeError, KeyError, ValueError):  # better twice than not at all
        return True


def _several() -> bool:
    try:
        return DistEnv.from_environ().is_distributed
    except UsageError:  # the process ends with this very error, which it has to say
        return False


def run_rank_script(main: Callable[[list[str]], None]) -> None:
    """run_script() for each process of many: a line is said once, and by whom torchrun ends because of another, too."""
    try:
        run_script(main, first_to_say)
    except SystemExit as end:
        if end.code == _TERMINATED and _several():
            ignore_sigterm()
            if first_to_say(LOST):
                print(f"error: {LOST}", file=sys.stderr)
        raise
