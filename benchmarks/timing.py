"""Ours and a baseline against the clock, in turns, and the tables and files that come of it."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import torch
from threadpoolctl import threadpool_limits

from util.cli.parser import Settings, flag, option
from util.cli.types import integer, to_file
from util.device import num_cpus
from util.files import atomic_write, require_writable_file


@dataclass(frozen=True)
class Row:
    """A figure of ours beside the baseline's; `ratio` above 1 means that ours is better."""

    name: str
    unit: str
    ours: float
    baseline: float
    ratio: float


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark found: rows for the table, and remarks with figures that have no baseline."""

    subject: str
    setting: str  # sizes, threads, repeats
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def in_turns(
    ours: Callable[[], object], baseline: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None
) -> tuple[list[float], list[float]]:
    """Seconds of each call of both, `repeats` each in alternation, after one of each that does not count.

    `wait` returns once the work that a call has started is done: on a GPU a call itself returns sooner.
    """
    ours(), baseline(), wait()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, seconds in zip((ours, baseline), times, strict=True):
            started = time.perf_counter()
            function()
            wait()
            seconds.append(time.perf_counter() - started)
    return times


def rate_row(name: str, images: int, times: tuple[list[float], list[float]]) -> Row:
    """Images per second of both, from the seconds that `images` of them took: medians."""
    ours, baseline = (images / statistics.median(seconds) for seconds in times)
    return Row(name, "images/s", ours, baseline, _ratio(times))


def time_row(name: str, times: tuple[list[float], list[float]]) -> Row:
    """Milliseconds of both: medians."""
    ours, baseline = (1e3 * statistics.median(seconds) for seconds in times)
    return Row(name, "ms", ours, baseline, _ratio(times))


def _ratio(times: tuple[list[float], list[float]]) -> float:
    """The median over the turns: what slows the machine for a while slows both calls of a turn."""
    return statistics.median(baseline / ours for ours, baseline in zip(*times, strict=True))


def use_threads(threads: int) -> None:
    """So many threads for each operation of torch, numpy and OpenCV, from now on."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    threadpool_limits(limits=threads)


@dataclass(frozen=True, kw_only=True)
class TimingFlags(Settings):
    """The flags that all benchmarks have. A benchmark adds its own, and may replace the defaults."""

    threads: int = option(default=1, type=integer(1, num_cpus()), metavar="N", help="threads of each operation")
    repeats: int = option(default=5, type=integer(1), metavar="N", help="measured turns, after one of warming up")
    quick: bool = flag(help="use small sizes, to see that it runs; the figures mean nothing")
    json: Path | None = option(type=to_file, metavar="FILE", help="also write the figures there")

    def check(self) -> None:
        """Raise UsageError if the figures cannot be written."""
        if self.json:
            require_writable_file("--json", self.json)


def finish(benchmark: Benchmark, json_file: Path | None) -> None:
    """Prints the table; writes the figures, if a file is wanted."""
    print(f"{benchmark.setting}\n")
    print("\n".join([*table(benchmark.rows), *(["", *benchmark.notes] if benchmark.notes else [])]))
    if json_file:
        with atomic_write(json_file) as partial:
            partial.write_text(json.dumps({"machine": machine(), **asdict(benchmark)}, indent=2) + "\n")


def read(json_file: Path) -> Benchmark:
    """What `finish` has written."""
    content: Mapping[str, object] = json.loads(json_file.read_text())
    rows = tuple(Row(**row) for row in content["rows"])
    return Benchmark(content["subject"], content["setting"], rows, tuple(content["notes"]))


def table(rows: tuple[Row, ...]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| | ours | baseline | unit | ratio |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(f"| {row.name} | {row.ours:,.4g} | {row.baseline:,.4g} | {row.unit} | {row.ratio:.2f} |")
    return lines


def machine() -> str:
    """The processor, the cores that this process has, the GPU, and the versions."""
    parts = [_processor(), f"{num_cpus()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
