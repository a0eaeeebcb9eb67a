"""The same function for many items, on all cores, with the results in the order of the items."""

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

Item, Result = TypeVar("Item"), TypeVar("Result")
_AHEAD = 4  # items in hand for each process

_shared: Any = None  # of a worker process


def parallel_map(
    function: Callable[[Any, Item], Result], shared: Any, items: Iterable[Item], processes: int, fork: bool = True
) -> Iterator[Result]:
    """function(shared, item) for each of the items, in their order, on so many processes (1: in this one).

    On Linux the processes are forked, so that `shared`, which may be large, is not copied; elsewhere it is pickled once
    for each. Where this process has used torch, take fork=False: a fork would inherit its threads in mid-air.
    What a function raises is raised here, and ends the work; RunError if a process died. Processes end with this one,
    however that ends.
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
            if len(pending) >= _AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RunError(
            "a process died, perhaps for lack of memory; run the same command again, with fewer --processes"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A main process that is killed cannot say so.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    cv2.setNumThreads(0)  # with 1, a fork would wait for ever for threads that only its parent has


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_shared, item)
