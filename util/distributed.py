"""Distributed setup under torchrun: environment, process group, clean shutdown.

torch is imported in functions, so that a command line is checked without it.
"""

import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from util.console import logger
from util.errors import Interrupted, RunError, UsageError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

LOST = "another process of this run ended or no longer answers; its own message says why"
# How long a rank waits for the others: rank 0 writes checkpoints and plots while they wait.
_TIMEOUT = timedelta(minutes=20)
# A rank that has not answered for this long is reported, and the run ends. A batch may take longer than that.
_SILENCE = 30  # seconds
_TIME_TO_SAVE = 45  # seconds that a rank has after the end of torchrun
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class DistEnv:
    """The place of this process among the processes of torchrun. The defaults describe a single process."""

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
            return cls(**{name.lower(): int(environment[name]) for name in _VARIABLES})
        except (KeyError, ValueError):
            raise UsageError(
                f"LOCAL_RANK is set, but {', '.join(_VARIABLES)} are not all numbers. Start with torchrun, or unset it."
            ) from None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1


def local_gpu_ids(gpu_num: Sequence[int], env: DistEnv) -> tuple[int, ...]:
    """Return the entries of --gpu_num that this process uses: under torchrun one GPU, or none for the CPU.

    The default of --gpu_num, GPU 0, then means the GPU whose number is the local rank.

    Raises:
        UsageError: the list has another length than torchrun starts processes on this machine.
    """
    if not env.is_distributed or not gpu_num:
        return tuple(gpu_num)
    if tuple(gpu_num) == (0,):
        return (env.local_rank,)
    if len(gpu_num) != env.local_world_size:
        raise UsageError(
            f"--gpu_num={list(gpu_num)}: torchrun starts {env.local_world_size} processes on this machine, and each "
            f"has one GPU. Name {env.local_world_size} GPUs, or leave it out to use the first ones."
        )
    return (gpu_num[env.local_rank],)


class Watchdog(threading.Thread):
    """Ends this rank when torchrun or another rank is gone, which a collective would wait for.

    The thread counts up in the store of torchrun, once a second, and reads the count of the next rank. A stopped or
    hung process does not count. Without torchrun, whose process is the parent, nobody would end the ranks.
    """

    def __init__(self, env: DistEnv, silence: int = _SILENCE):
        super().__init__(name="watchdog", daemon=True)
        self._env = env
        self._silence = silence
        self._parent = os.getppid()
        self._stopped = threading.Event()

    def run(self) -> None:
        import torch.distributed as dist

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        rank, next_rank = self._env.rank, (self._env.rank + 1) % self._env.world_size
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self._silence))
            store.set(f"watchdog/name/{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
        except RuntimeError:  # torchrun has ended
            store = None
        count, silent = 0, 0
        while not self._stopped.wait(1):
            if os.getppid() != self._parent:
                self._end_with_parent()
                return
            if store is None:
                continue
            try:
                store.add(f"watchdog/{rank}", 1)
                latest = store.add(f"watchdog/{next_rank}", 0)
            except RuntimeError:
                store = None
                continue
            # Seconds that this process was stopped itself are not counted.
            silent = silent + 1 if latest == count else 0
            count = latest
            if count and silent >= self._silence:
                name = store.get(f"watchdog/name/{next_rank}").decode()
                logger.error(f"error: {name} has not answered for {silent} s. Start the same command again.")
                os._exit(1)

    def _end_with_parent(self) -> None:
        """Stop this process as SIGTERM does, which saves a checkpoint, and end it if that does not work."""
        logger.error(f"error: torchrun (process {self._parent}) has ended. This rank saves a checkpoint and stops.")
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._stopped.wait(_TIME_TO_SAVE):
            os._exit(1)

    def stop(self) -> None:
        """End the thread: a thread that is alive when the interpreter ends can abort the process."""
        self._stopped.set()
        if self.is_alive():
            self.join(timeout=2)


@contextmanager
def distributed_session(gpu_num: Sequence[int], env: DistEnv) -> Iterator[list["torch.device"]]:
    """Initialize the process group, if there are several processes, and yield the devices of this process.

    Tensors travel by NCCL between GPUs and by gloo between CPUs.

    Raises:
        UsageError: a GPU does not exist, or torchrun starts more processes than this machine has GPUs.
        RunError: another rank ended or does not answer (LOST).
    """
    from util.device import select_devices

    if not env.is_distributed:
        yield select_devices(gpu_num)
        return
    import torch
    import torch.distributed as dist

    count = torch.cuda.device_count()
    if tuple(gpu_num) == (0,) and torch.cuda.is_available() and count < env.local_world_size:
        raise UsageError(
            f"torchrun starts {env.local_world_size} processes on this machine, which has {count} GPUs. Give "
            f"--nproc_per_node={count}."
        )
    devices = select_devices(local_gpu_ids(gpu_num, env))
    watchdog = Watchdog(env)
    try:
        dist.init_process_group("gloo" if devices[0].type == "cpu" else "cpu:gloo,cuda:nccl", timeout=_TIMEOUT)
        watchdog.start()
        yield devices
        gc.collect()  # a DDP module in a cycle would end the group later, and can wait for its threads for ever
        dist.barrier()  # a rank that leaves earlier closes connections that another rank may still read from
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which only their text identifies.
        is_gloo_error = any(words in str(error) for words in ("gloo", "Connection closed by"))
        if not isinstance(error, RunError) and (isinstance(error, dist.DistError) or is_gloo_error):
            raise RunError(LOST) from error
        raise
    except Interrupted as stop:
        if stop.number == signal.SIGTERM and not stop.is_handled:
            # A killed rank prints nothing, and torchrun ends the others by SIGTERM.
            raise Interrupted(stop.number, f"error: torchrun was stopped, or {LOST}") from None
        raise
    finally:
        watchdog.stop()
    dist.destroy_process_group()


def broadcast_from_main(make: Callable[[], Result], env: DistEnv) -> Result:
    """Call `make()` on rank 0 and return its result on all ranks. The result must be picklable."""
    if not env.is_distributed:
        return make()
    import torch.distributed as dist

    results = [make() if env.is_main_process else None]
    dist.broadcast_object_list(results)
    return cast(Result, results[0])


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed torch's generators for one epoch on one rank."""
    import numpy as np
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> 1))
