"""Measure time and memory of ArcFace with focal loss over many classes. The baseline uses one-hot matrices.

python -m benchmarks.head
python -m benchmarks.head --classes 360232 --batch_size 128 --json head.json

A step is forward and backward; embeddings and weights get gradients. The times are measured alternately in one process.
The memory is the peak resident memory of a separate process over a few steps, in total and above its start.
"""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks import baseline, timing
from model.head import ArcFace
from model.loss import FocalLoss
from util.cli.parser import option
from util.cli.types import integer
from util.device import num_cpus
from util.errors import RunError, run_script

DIMENSIONS = 512
OURS, BASELINE = "ours", "baseline"
_STEPS = 3  # of a measurement of memory


@dataclass(frozen=True, kw_only=True)
class Flags(timing.TimingFlags):
    """The settings of this benchmark."""

    threads: int = option(default=min(2, num_cpus()), **timing.THREADS)
    classes: int = option(default=85742, type=integer(2), help="classes; MS1MV2 has 85742")
    batch_size: int = option(default=64, type=integer(1), help="images per batch")


def measure(options: Flags) -> timing.Benchmark:
    """Measure the time of a step and the memory of both."""
    if options.quick:
        options = replace(options, classes=1000, batch_size=8)
    sizes = options.classes, options.batch_size
    # Each in a process of its own, because a process reuses memory that was freed before.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, timing.use_threads, (options.threads,), max_tasks_per_child=1) as pool:
        memories = [pool.submit(memory, which, *sizes) for which in (OURS, BASELINE)]
        try:
            ours, theirs = (future.result() for future in memories)
        except BrokenProcessPool:
            raise RunError("--classes: a process that measures memory was killed. Use fewer classes.") from None
    times = timing.time_alternately(_step(OURS, *sizes), _step(BASELINE, *sizes), options.repeats)
    rows = [timing.time_row("forward and backward", times)]
    for name in ours:
        ratio = theirs[name] / ours[name]
        rows.append(timing.Row(name, "MB", ours=ours[name], baseline=theirs[name], ratio=ratio))
    logits = options.batch_size * options.classes * 4 / 1e6
    weights = DIMENSIONS * options.classes * 4 / 1e6
    note = f"A matrix of logits is {logits:.0f} MB, one of weights {weights:.0f} MB."
    setting = f"{options.classes} classes, batches of {options.batch_size}, {options.describe()}"
    return timing.Benchmark("head", setting, tuple(rows), (note,))


def _step(which: str, classes: int, batch_size: int) -> Callable[[], None]:
    """Return a function that runs forward and backward of one of the two on random embeddings."""
    torch.manual_seed(0)
    embeddings = torch.randn(batch_size, DIMENSIONS, requires_grad=True)
    labels = torch.randint(classes, (batch_size,))
    if which == OURS:
        head: nn.Module = ArcFace(DIMENSIONS, classes)
        criterion: nn.Module = FocalLoss()
    else:
        head = baseline.OneHotArcFace(DIMENSIONS, classes)
        criterion = baseline.BatchFocalLoss()

    def step() -> None:
        head.zero_grad(set_to_none=True)
        embeddings.grad = None
        criterion(head(embeddings, labels), labels).backward()

    return step


def memory(which: str, classes: int, batch_size: int) -> dict[str, float]:
    """Return the peak resident memory of this process after a few steps, in MB: in total, and above the start."""
    _step(which, 10, 2)()  # torch loads libraries in its first step
    before = _peak()
    step = _step(which, classes, batch_size)
    for _ in range(_STEPS):
        step()
    return {"peak memory of the process": _peak(), "peak memory above the start": max(_peak() - before, 1e-3)}


def _peak() -> float:
    import resource  # does not exist on Windows, where the other functions work

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


main = timing.benchmark_main("head", Flags, measure, __doc__)

if __name__ == "__main__":
    run_script(main)
