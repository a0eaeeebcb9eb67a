"""Time our code and a baseline alternately, and report tables and files. The benchmarks are made of these parts."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from threadpoolctl import threadpool_limits

from util.cli.parser import Settings, flag, option, parse
from util.cli.types import Convert, ValueType, integer, to_file
from util.device import num_cpus
from util.files import atomic_write, require_writable_file

# Of a benchmark that replaces the default: option(default=9, **REPEATS).
THREADS: dict[str, Any] = {"type": integer(1, num_cpus()), "help": "threads of each operation"}
REPEATS: dict[str, Any] = {"type": integer(1), "help": "measured turns, after one of warming up"}
Times = tuple[list[float], list[float]]  # seconds of each call of ours, and of the baseline


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
) -> Times:
    """Measure `repeats` alternating calls of both functions, after a first call of both that does not count.

    wait() is called after each call. It returns when the GPU has finished, because the call itself returns sooner.
    """
    ours()
    baseline()
    wait()
    times: Times = ([], [])
    for _ in range(repeats):
        for function, seconds in zip((ours, baseline), times, strict=True):
            started = time.perf_counter()
            function()
            wait()
            seconds.append(time.perf_counter() - started)
    return times


def rate_row(name: str, images: int, times: Times) -> Row:
    """Return a row of median images per second, from the seconds of calls with `images` images each."""
    ours, baseline = (images / statistics.median(seconds) for seconds in times)
    return Row(name, "images/s", ours=ours, baseline=baseline, ratio=_ratio(times))


def time_row(name: str, times: Times) -> Row:
    """Return a row of median milliseconds."""
    ours, baseline = (1e3 * statistics.median(seconds) for seconds in times)
    return Row(name, "ms", ours=ours, baseline=baseline, ratio=_ratio(times))


def _ratio(times: Times) -> float:
    """Return the median ratio of a turn. A slow phase of the machine affects both calls of a turn."""
    return statistics.median(baseline / ours for ours, baseline in zip(*times, strict=True))


def use_threads(threads: int) -> None:
    """Set the number of threads for each operation of torch, numpy and OpenCV."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    threadpool_limits(limits=threads)


@dataclass(frozen=True, kw_only=True)
class JsonFlag(Settings):
    """The flag of a file for the figures."""

    json: Path | None = option(type=to_file, metavar="FILE", help="also write the figures there")

    def check(self) -> None:
        """Raise UsageError if the figures cannot be written."""
        if self.json:
            require_writable_file("--json", self.json)


def write_json(file: Path, figures: dict[str, Any]) -> None:
    """Write the figures of --json."""
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(figures, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class TimingFlags(JsonFlag):
    """The flags that all benchmarks have. A benchmark adds its own, and may replace the defaults."""

    threads: int = option(default=1, **THREADS)
    repeats: int = option(default=5, **REPEATS)
    quick: bool = flag(help="use small sizes, to see that it runs; the figures mean nothing")

    def describe(self) -> str:
        """Return threads and repeats in words."""
        return f"threads: {self.threads}, median of {self.repeats} turns"


def to_names(known: Iterable[str]) -> Convert:
    """Return a type of tuples of the known names."""
    known = tuple(known)

    def convert(value: object) -> tuple[str, ...]:
        items = value.split() if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not set(items) <= set(known):
            raise ValueError(f"a list of {', '.join(known)}")
        return tuple(items)

    return ValueType("NAME ...", convert)


def benchmark_main(
    name: str, flags: type[TimingFlags], measure: Callable[[Any], Benchmark | None], description: str | None
) -> Callable[[list[str]], None]:
    """Return main(arguments) of `python -m benchmarks.NAME`, which measures, prints a table and writes the figures."""

    def main(arguments: list[str]) -> None:
        options = parse(flags, f"-m benchmarks.{name}", arguments, description=description, check=TimingFlags.check)
        use_threads(options.threads)
        benchmark = measure(options)
        if benchmark is None:  # skipped; it has printed why
            return
        print("\n".join([benchmark.setting, "", *markdown_table(benchmark.rows), "", *benchmark.notes]).rstrip())
        if options.json:
            write_json(options.json, {"machine": machine(), **asdict(benchmark)})

    return main


def read_report(json_file: Path) -> Benchmark:
    """Return the benchmark that --json has written."""
    content = json.loads(json_file.read_text())
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
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    parts = [names[0] if names else platform.processor() or platform.machine(), f"{num_cpus()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])
