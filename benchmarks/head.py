"""Measure time and memory of ArcFace with focal loss over many classes. The baseline uses one-hot matrices.

python -m benchmarks.head
python -m benchmarks.head --classes 360232 --batch_size 128 --json head.json

A step is forward and backward; embeddings and weights get gradients. The times are measured alternately in one process.
The memory is the peak resident memory of a separate process over a few steps, in total and above its start.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks import baseline
from benchmarks.timing import Benchmark, Row, TimingFlags, report, time_alternately, time_row, use_threads
from model.head import ArcFace
from model.loss import FocalLoss
from util.cli.parser import choice, option, parse
from util.cli.types import integer
from util.device import num_cpus
from util.errors import RunError, run_script

DIMENSIONS = 512
OURS, BASELINE = "ours", "baseline"
_STEPS = 3  # of a measurement of memory


@dataclass(frozen=True, kw_only=True)
class Flags(TimingFlags):
    """The settings of this benchmark."""

    threads: int = option(
        default=min(2, num_cpus()), type=integer(1, num_cpus()), metavar="N", help="threads of each operation"
    )
    classes: int = option(default=85742, type=integer(2), metavar="N", help="classes; MS1MV2 has 85742")
    batch_size: int = option(default=64, type=integer(1), metavar="N", help="images per batch")
    memory_of: str | None = choice((OURS, BASELINE), default=None, help="print the memory of one of the two, as JSON")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.head", arguments, description=__doc__, check=TimingFlags.check)
    classes, batch_size = (1000, 8) if options.quick else (options.classes, options.batch_size)
    use_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory(options.memory_of, classes, batch_size)))
    else:
        report(measure(classes, batch_size, options.threads, options.repeats), options.json)


def measure(classes: int, batch_size: int, threads: int, repeats: int) -> Benchmark:
    """Measure the time of a step and the memory of both."""
    ours = _memory_in_process(OURS, classes, batch_size, threads)
    theirs = _memory_in_process(BASELINE, classes, batch_size, threads)
    times = time_alternately(_step(OURS, classes, batch_size), _step(BASELINE, classes, batch_size), repeats)
    rows = (
        time_row("forward and backward", times),
        _memory_row("peak memory of the process", ours["peak"], theirs["peak"]),
        _memory_row("peak memory above the start", ours["own"], theirs["own"]),
    )
    logits = batch_size * classes * 4 / 1e6
    weights = DIMENSIONS * classes * 4 / 1e6
    notes = (f"A matrix of logits is {logits:.0f} MB, one of weights {weights:.0f} MB.",)
    setting = f"{classes} classes, batches of {batch_size}, threads: {threads}, median of {repeats} turns"
    return Benchmark("head", setting, rows, notes)


def _memory_row(name: str, ours: float, baseline: float) -> Row:
    return Row(name, "MB", ours=ours, baseline=baseline, ratio=baseline / ours)


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


def _memory_in_process(which: str, classes: int, batch_size: int, threads: int) -> dict[str, float]:
    """Run memory() in a new process, because a process reuses memory that was freed before."""
    flags = {"memory_of": which, "classes": classes, "batch_size": batch_size, "threads": threads}
    command = [sys.executable, "-m", "benchmarks.head", *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        raise RunError(f"the process that measures the memory of {which} failed: {done.stderr.strip() or 'killed'}")
    return json.loads(done.stdout)


def memory(which: str, classes: int, batch_size: int) -> dict[str, float]:
    """Return the peak resident memory of this process after a few steps, in MB: in total, and above the start."""
    _step(which, 10, 2)()  # torch loads libraries in its first step
    before = _peak()
    step = _step(which, classes, batch_size)
    for _ in range(_STEPS):
        step()
    return {"peak": _peak(), "own": max(_peak() - before, 1e-3)}


def _peak() -> float:
    import resource  # does not exist on Windows, where the other functions work

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    run_script(main)
