"""Worker processes of a DataLoader that leave signals to the main process, and end a run when they die or hang."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader

from util.errors import STOP_SIGNALS, RunError
from util.files import format_names
from util.parallel import end_with_parent

_POLL = 2.0  # seconds between looks at the workers
_GRACE = 3.0  # seconds for the workers to end by themselves
_LEAST_WORK = 0.05  # seconds of CPU time, well above what workers need to wait


class WatchedLoader:
    """Iterates over a DataLoader with persistent workers, and raises RunError when a worker dies or all hang.

    The workers hang if a batch is missing and none of them begins another image for `timeout` seconds. Before the first
    batch they have six times as long if they use the CPU, because they start slowly on a busy machine. The time of a
    batch does not matter, so a slow disk ends no run. `reading` has the image that each worker reads now, -1 for none,
    in shared memory; where(image) returns its place, for messages.
    """

    def __init__(self, loader: DataLoader, reading: Sequence[int], where: Callable[[int], str], timeout: float):
        self._loader = loader
        self._reading = reading
        self._where = where
        self._timeout = timeout
        self._received = 0  # batches
        self._batches: Any = None  # torch's iterator
        self._workers: list[BaseProcess] = []
        self._is_blocked = False
        self._error: RunError | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch."""
        is_new = not self._workers
        if is_new:
            self._start()
        done = threading.Event()
        threading.Thread(target=self._watch, args=[done], daemon=True).start()
        try:
            if not is_new:
                self._wait_for(lambda: iter(self._loader))
            while (batch := self._wait_for(lambda: next(self._batches, None))) is not None:
                self._received += 1
                yield batch
        finally:
            done.set()

    def close(self) -> None:
        """End the workers, and kill those that do not end within seconds."""
        if self._workers:
            killer = threading.Timer(_GRACE, _kill, [self._workers])
            killer.start()
            self._batches._shutdown_workers()
            killer.cancel()

    def _start(self) -> None:
        # Signals wait until the workers, which inherit the mask, ignore them in init_worker.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        on_child_exit = signal.getsignal(signal.SIGCHLD)
        try:
            self._batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # When a worker dies, torch's handler would raise an error wherever the main thread is.
        if signal.getsignal(signal.SIGCHLD) != on_child_exit:
            signal.signal(signal.SIGCHLD, on_child_exit)
        self._workers = self._batches._workers
        # At exit multiprocessing sends SIGTERM, which the workers ignore, and waits for them. This comes before.
        Finalize(self, _kill_and_close, [self._batches], exitpriority=0)

    def _wait_for(self, step: Callable[[], Any]) -> Any:
        """Return what torch's iterator returns. Raise RunError if a worker died, or was killed because it hung."""
        self._is_blocked = True
        try:
            return step()
        except (RuntimeError, OSError, EOFError):
            # A connection that a dying worker lost is noticed before the end of the worker.
            lost = wait([worker.sentinel for worker in self._workers], timeout=1)
            if not lost:
                raise
            for worker in self._workers:
                if worker.sentinel in lost:
                    worker.join(timeout=1)
        finally:
            self._is_blocked = False
        raise self._error or self._end_workers()

    def _watch(self, done: threading.Event) -> None:
        """End the workers if they hang. torch's own timeout does not cover the transfer of a batch from a worker."""
        before: tuple[Sequence[int], int] = ([], 0)
        worked = 0.0  # CPU time of the workers when they were last seen working
        quiet = idle = 0.0  # seconds; not by the clock, because a scheduler may suspend the whole job
        while not done.wait(_POLL):
            seen = (self._reading[:], self._received)
            quiet = quiet + _POLL if seen == before and self._is_blocked else 0.0
            before = seen
            work = sum(_cpu_seconds(worker) for worker in self._workers)
            idle = idle + _POLL if quiet and work - worked < _LEAST_WORK else 0.0
            worked = worked if idle else work
            limit = self._timeout if self._received else 6 * self._timeout
            if quiet >= limit or idle >= self._timeout:
                self._end_workers(limit if quiet >= limit else self._timeout)
                return

    def _end_workers(self, seconds: float = 0.0) -> RunError:
        """Kill the workers, and return the error about the one that died, or about all if they hang.

        The first worker that it names is the one whose batch is missing.
        """
        names = []
        dead = ""
        workers = list(zip(self._workers, self._reading[:], strict=True))
        awaited = self._batches._task_info.get(self._batches._rcvd_idx, (0,))[0]
        for worker, index in workers[awaited:] + workers[:awaited]:
            names.append(f"process {worker.pid}" + (f" at {self._where(index)}" if index >= 0 else ""))
            if worker.exitcode is not None:
                code = worker.exitcode
                dead = f"{names[-1]}) " + (f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})")
        text = f"loader workers hang ({format_names(names, 3)}): no image was read for {seconds:g} s. "
        text += "Check the disk or the network file system."
        if dead:
            text = f"loader worker ({dead}. Often the machine ran out of memory: lower --num_workers."
        self._error = RunError(text)
        _kill(self._workers)
        return self._error


def _cpu_seconds(worker: BaseProcess) -> float:
    """Return the CPU time that a process has used. Where the system does not tell it, it counts as working."""
    try:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _kill_and_close(batches: Any) -> None:
    """End the workers of torch's iterator at once.

    The argument keeps the iterator until then. Collected as garbage, it would close the descriptors of a queue that it
    has not used twice, and the second time they can be those of other files.
    """
    _kill(batches._workers)
    batches._shutdown_workers()


class _Event:
    """An event without a lock. A worker that is killed at the wrong moment would hold the lock for ever."""

    def __init__(self) -> None:
        self._flag = RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._flag.value)

    def set(self) -> None:
        self._flag.value = 1


def worker_context() -> BaseContext:
    """Return what a DataLoader starts its workers with: the default context, whose events have no lock.

    With the usual event, the main process waits for ever for some of the workers that were killed.
    """

    class Context(type(multiprocessing.get_context())):  # type: ignore[misc]
        def Event(self) -> _Event:
            return _Event()

    return Context()


def init_worker(worker: int) -> None:
    """Set up a worker process: one thread, and no reaction to the signals of the main process.

    Ctrl-C and a cluster's signals reach the workers too. The main process needs their batches to finish its step.
    The workers are the parallelism: threads of OpenCV and BLAS in each would compete for the cores.
    """
    end_with_parent()  # torch's own watchdog does not notice a parent that is gone before the watchdog begins
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error of a bad image names the file
    threadpool_limits(limits=1)
    sys.excepthook = report_unless_disconnected


def report_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an uncaught error, unless the main process has closed the connection, because it ends."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
