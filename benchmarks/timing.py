"""Time our code and a baseline alternately, and report tables and files."""

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
    """A figure of our code and of the baseline. A `ratio` above 1 means that our code is better."""

    name: str
    unit: str
    ours: float
    baseline: float
    ratio: float


@dataclass(frozen=True)
class Benchmark:
    """The result of a benchmark: rows for the table, and notes with figures that have no baseline."""

    subject: str
    setting: str  # sizes, threads, repeats
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def time_alternately(
    ours: Callable[[], object], baseline: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None
) -> tuple[list[float], list[float]]:
    """Call both functions alternately and measure each call, after a first call of both that does not count.

    Args:
        ours: our code.
        baseline: the code that it is compared with.
        repeats: number of measured calls of each function.
        wait: called after each call; returns when the GPU has finished, because the call itself returns sooner.

    Returns:
        The seconds of each call of ours, and of the baseline.
    """
    ours()
    baseline()
    wait()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, seconds in zip((ours, baseline), times, strict=True):
            started = time.perf_counter()
            function()
            wait()
            seconds.append(time.perf_counter() - started)
    return times


def rate_row(name: str, images: int, times: tuple[list[float], list[float]]) -> Row:
    """Return a row of median images per second, from the seconds of calls with `images` images each."""
    ours, baseline = (images / statistics.median(seconds) for seconds in times)
    return Row(name, "images/s", ours=ours, baseline=baseline, ratio=_ratio(times))


def time_row(name: str, times: tuple[list[float], list[float]]) -> Row:
    """Return a row of median milliseconds."""
    ours, baseline = (1e3 * statistics.median(seconds) for seconds in times)
    return Row(name, "ms", ours=ours, baseline=baseline, ratio=_ratio(times))


def _ratio(times: tuple[list[float], list[float]]) -> float:
    """Return the median ratio of a turn. A slow phase of the machine affects both calls of a turn."""
    return statistics.median(baseline / ours for ours, baseline in zip(*times, strict=True))


def use_threads(threads: int) -> None:
    """Set the number of threads for each operation of torch, numpy and OpenCV."""
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


def report(benchmark: Benchmark, json_file: Path | None) -> None:
    """Print the table, and write the figures if there is a file for them."""
    lines = [benchmark.setting, "", *markdown_table(benchmark.rows)]
    if benchmark.notes:
        lines += ["", *benchmark.notes]
    print("\n".join(lines))
    if json_file:
        with atomic_write(json_file) as partial:
            partial.write_text(json.dumps({"machine": machine(), **asdict(benchmark)}, indent=2) + "\n")


def read_report(json_file: Path) -> Benchmark:
    """Return the benchmark that report() has written."""
    content: Mapping[str, object] = json.loads(json_file.read_text())
    rows = tuple(Row(**row) for row in content["rows"])
    return Benchmark(content["subject"], content["setting"], rows, tuple(content["notes"]))


def markdown_table(rows: tuple[Row, ...]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| | ours | baseline | unit | ratio |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(f"| {row.name} | {row.ours:,.4g} | {row.baseline:,.4g} | {row.unit} | {row.ratio:.2f} |")
    return lines


def machine() -> str:
    """Return the processor, the number of cores of this process, the GPU, and the versions."""
    parts = [_processor(), f"{num_cpus()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
