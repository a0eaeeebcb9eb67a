"""Parallel map over processes, with the results in the order of the items."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2

from util.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")
_ITEMS_AHEAD = 4  # submitted and not yet returned, for each process

_shared: Any = None  # in a worker process: the `shared` of its parent


def parallel_map(
    function: Callable[[Any, Item], Result], shared: Any, items: Iterable[Item], processes: int, fork: bool = True
) -> Iterator[Result]:
    """Yield function(shared, item) for each item, in the order of the items.

    The worker processes end with this process, even if it is killed.

    Args:
        function: called in the worker processes; it must be picklable, like its items and results.
        shared: an object that every call needs. On Linux a fork shares its memory; elsewhere it is pickled once for
            each process.
        items: read at most four items for each process ahead of the results.
        processes: below 2, the calls run in this process.
        fork: False if this process has used torch, because a fork would inherit its threads in an undefined state.

    Raises:
        RunError: a worker process died. An exception of `function` is raised as it is. Both end the work.
    """
    if processes < 2:
        yield from (function(shared, item) for item in items)
        return
    context = multiprocessing.get_context("fork" if fork and sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(processes, context, _start, (shared,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_call, function, item))
            if len(pending) >= _ITEMS_AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RunError(
            "a process died, perhaps for lack of memory. Run the same command again, with fewer --processes."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A main process that is killed cannot stop its workers, so each worker waits for its end.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    cv2.setNumThreads(0)  # with 1, a fork would wait forever for threads that only its parent has


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_shared, item)
