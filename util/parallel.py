"""Parallel map over processes, threads that read ahead, and `resumable` for programs that can continue."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

from util.errors import STOP_SIGNALS, Interrupted, RunError, ignore_stop_signals

Item = TypeVar("Item")
Result = TypeVar("Result")

SILENCE = 300.0  # seconds after which a process that neither answers nor calls working_on() counts as hung
_GRACE = 5.0  # seconds to remove files that are written in part, before a process is killed
_ITEMS_AHEAD = 4  # given to processes and not yet returned, for each process
_NAME_BYTES = 1024

_number = 0  # of this worker process
_name: Any = None  # in a worker process: shared bytes with the name of what it works on


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], readers: int) -> Generator[Result]:
    """Yield read(item) for each item, in their order. `readers` threads read the next ones meanwhile.

    Close the iterator if it is not used to its end: no more items are then read.
    """
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(readers) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(read, item))
                if len(ahead) > readers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def parallel_map(
    function: Callable[[Any, Item], Result], shared: Any, items: Iterable[Item], processes: int, fork: bool = True
) -> Iterator[Iterator[Result]]:
    """Yield an iterator over function(shared, item) for each item, in the order of the items.

    The worker processes end with the block, whatever ends it, and with this process, even if it is killed.

    Args:
        function: called in the worker processes; it must be picklable, like its items and results.
        shared: an object that every call needs. On Linux a fork shares its memory; elsewhere it is pickled once for
            each process.
        items: read at most four items for each process ahead of the results.
        processes: below 2, the calls run in this process.
        fork: False if this process has used torch, because a fork would inherit its threads in an undefined state.

    Raises:
        RunError: a worker process died, or has been silent for SILENCE seconds. An exception of `function` is raised
            as it is. All three end the work.
    """
    if processes < 2:
        yield (function(shared, item) for item in items)
        return
    context = multiprocessing.get_context("fork" if fork and sys.platform == "linux" else "spawn")
    resource_tracker.ensure_running()  # now, because its start would unblock the signals that are held below
    workers: list[_Worker] = []
    handlers = [(number, signal.signal(number, _interrupt)) for number in STOP_SIGNALS]
    try:
        with _signals_held():
            for number in range(processes):
                workers.append(_Worker(context, number, function, shared))
        yield _results(workers, iter(items))
    except KeyboardInterrupt:
        handlers = []  # signals stay ignored
        raise
    finally:
        _restore(handlers)
        with _signals_held():
            _end([worker.process for worker in workers])


def worker_number() -> int:
    """Return the number of this worker process, from 0, and 0 in the main process."""
    return _number


def working_on(name: str | Path) -> None:
    """Note, in a worker process, what the messages name if the process dies or hangs. Calls show that it works."""
    if _name is not None:
        _name.value = os.fsencode(name)[: _NAME_BYTES - 1]


def end_with_parent() -> None:
    """Let this process, which multiprocessing has started, end within seconds after its parent, even if that is killed.

    The parent's process id is from before the start, so a parent that is gone already counts too.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def resumable(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Decorate the main function of a program that keeps what is done, to say so after a signal."""

    @functools.wraps(main)
    def run(arguments: list[str]) -> None:
        try:
            main(arguments)
        except KeyboardInterrupt as stop:
            number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
            raise Interrupted(number, "Interrupted. The same command continues from here.") from None

    return run


class _Worker:
    """A worker process, the index of the item that it has, and the time since it was last seen working."""

    def __init__(self, context: BaseContext, number: int, function: Callable, shared: Any):
        self.pipe, its_end = context.Pipe()
        self._name = context.RawArray("c", _NAME_BYTES)
        arguments = (its_end, self._name, number, function, shared)
        self.process = context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        its_end.close()  # the pipe then breaks if the process dies
        self.busy = False
        self.index = 0
        self._seen = b""
        self._silent = 0.0

    def send(self, index: int, item: Any) -> None:
        self.busy = True
        self.index = index
        self._name.value = b""
        self._silent = 0.0
        try:
            self.pipe.send(item)
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        """Return the result, or raise the error, that the process has sent."""
        try:
            succeeded, value = self.pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        self.busy = False
        if not succeeded:
            raise value
        return value

    def check_silence(self, seconds: float) -> None:
        """Count the seconds without a sign of work. Raise RunError if they are too many."""
        seen = self._name.value
        self._silent = self._silent + seconds if seen == self._seen else 0.0
        self._seen = seen
        if self._silent > SILENCE:
            raise RunError(
                f"{self._place()}: a process has not got ahead here for {SILENCE:.0f} s. Check that the disk answers, "
                "or move the file away, and run the same command again."
            )

    def _death(self) -> RunError:
        return RunError(
            f"{self._place()}: a process died here, perhaps for lack of memory. Run the same command again, with fewer "
            "--processes."
        )

    def _place(self) -> str:
        return self._name.value.decode("utf-8", "backslashreplace") or "--processes"


def _results(workers: list[_Worker], items: Iterator[Any]) -> Iterator[Any]:
    """Give the items to workers without one, and yield the results in the order of the items."""
    results: dict[int, Any] = {}
    given = 0
    wanted = 0
    while True:
        idle = [worker for worker in workers if not worker.busy]
        room = _ITEMS_AHEAD * len(workers) - (given - wanted)
        # One item each: a second one could fill the pipe of a process that waits for its result to be read.
        for worker, item in zip(idle, islice(items, min(len(idle), room)), strict=False):
            worker.send(given, item)
            given += 1
        if wanted == given:
            return
        if wanted in results:
            yield results.pop(wanted)
            wanted += 1
            continue
        busy = [worker for worker in workers if worker.busy]
        before = time.monotonic()
        ready = wait([worker.pipe for worker in busy], timeout=1)
        seconds = min(time.monotonic() - before, 1)  # longer if all processes were stopped for a while, by Ctrl-Z
        for worker in busy:
            if worker.pipe in ready:
                results[worker.index] = worker.receive()
            else:
                worker.check_silence(seconds)


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        process.kill()  # no effect on a process that has ended
        process.join(_GRACE)  # a disk that does not answer can outlast it


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back until the end of the block. Processes started in it only see SIGTERM."""
    came: list[int] = []
    process = os.getpid()

    def hold(number: int, frame: object) -> None:
        if os.getpid() != process:
            sys.exit(1)  # a fork that is ended before it has begun
        came.append(number)

    handlers = [(number, signal.signal(number, hold)) for number in STOP_SIGNALS]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOP_SIGNALS) - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _restore(handlers)
        for held in came:
            signal.raise_signal(held)


def _restore(handlers: list[tuple[signal.Signals, Any]]) -> None:
    for number, handler in handlers:
        signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    """End the program. Ignore further signals: the end takes seconds, and they would only cut its last words."""
    ignore_stop_signals()
    raise Interrupted(number)


def _work(pipe: Connection, name: Any, number: int, function: Callable, shared: Any) -> None:
    """Call the function for each item that the main process sends, until that process is gone."""
    global _number, _name
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until nothing is imported any more
    import cv2  # slow, and needed only here

    cv2.setNumThreads(0)  # with 1, a fork would wait forever for threads that only its parent has
    end_with_parent()
    _number = number
    _name = name
    with suppress(SystemExit, EOFError, ConnectionError):  # of _exit, or the main process is gone
        signal.signal(signal.SIGTERM, _exit)
        while True:
            item = pipe.recv()
            try:
                answer = (True, function(shared, item))
            except Exception as error:
                error.add_note(traceback.format_exc())  # for --debug
                answer = (False, error)
            pipe.send(answer)
    os._exit(0)  # without the end of the interpreter, which a signal could interrupt


def _exit(number: int, frame: object) -> None:
    """End this process by an exception, which removes a file that is written in part. Ignore further signals."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(1)


def _end_with(parent: int | None) -> None:
    """End this process soon after its parent is gone, even in the middle of an item."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)
