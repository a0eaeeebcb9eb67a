"""Run the benchmarks one after the other, each in its own process, and write their tables into TABLES.md.

python -m benchmarks.all
python -m benchmarks.all --only loader head
python -m benchmarks.all --quick --results tables.md

A table replaces the text between <!-- benchmark: SUBJECT --> and <!-- end -->; the rest of the file stays. A subject
without these marks is added at the end of the file, in its own section. Without a GPU, the benchmarks of the GPU are
skipped and their tables stay. If a benchmark fails, the file keeps the tables of the earlier ones.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import machine, markdown_table, read_report, to_names
from util.cli.parser import Settings, flag, option, parse
from util.cli.types import to_file
from util.errors import DataError, RunError, run_script
from util.files import atomic_write, require_writable_file

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks/TABLES.md"
# Subject: the module and its flags.
COMMANDS = {
    "loader": ["benchmarks.loader"],
    "evaluation": ["benchmarks.evaluation"],
    "verification": ["benchmarks.verification"],
    "head": ["benchmarks.head"],
    "network-cpu": ["benchmarks.network"],
    "network-cpu-bf16": ["benchmarks.network", "--precision", "bf16"],
    "network-cuda": ["benchmarks.network", "--device", "cuda"],
    "export": ["benchmarks.export"],
}
SECTION = "## Ours compared with the baseline"
END = "<!-- end -->"


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of this benchmark."""

    only: tuple[str, ...] = option(
        default=(), type=to_names(COMMANDS), help=", ".join(COMMANDS), default_help="all of them"
    )
    results: Path = option(default=TABLES, type=to_file, metavar="FILE", help="file with the tables")
    quick: bool = flag(help="use small sizes, to see that it runs; the figures mean nothing")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.all", arguments, description=__doc__)
    require_writable_file("--results", options.results)
    if options.quick and options.results.resolve() == TABLES.resolve():
        raise DataError(f"{options.results}: the figures of --quick mean nothing. Name another file with --results.")
    read_tables(options.results)  # reports errors of the file before the long work
    for subject in options.only or COMMANDS:
        run_benchmark(subject, options.results, options.quick)


def run_benchmark(subject: str, results: Path, quick: bool) -> None:
    """Run one benchmark and write its table. Raise RunError if it fails."""
    command = " ".join(["python -m", *COMMANDS[subject]])
    print(f"\n{subject}: {command}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        flags = ["--quick", "--repeats", "1"] if quick else []
        done = subprocess.run([sys.executable, "-m", *COMMANDS[subject], *flags, "--json", file], cwd=ROOT, check=False)
        if done.returncode:
            raise RunError(f"{subject}: ended with exit code {done.returncode}. Its error is above.")
        if not file.exists():  # skipped; it has printed why
            return
        benchmark = read_report(file)
    lines = ["", f"    {command}", "", *markdown_table(benchmark.rows), ""]
    lines += [f"{benchmark.setting}.", f"Machine: {machine()}.", ""]
    for note in benchmark.notes:
        lines += [note, ""]
    text = insert_table(read_tables(results), subject, "\n".join(lines))
    with atomic_write(results) as partial:
        partial.write_text(text)


def read_tables(file: Path) -> str:
    """Return the text of the file, "" if it does not exist. Raise DataError for unpaired marks and for other files."""
    try:
        text = file.read_text() if file.exists() else ""
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8 text. Name another file with --results.") from None
    for subject in COMMANDS:
        if text.count(_begin(subject)) != len(_table(subject).findall(text)) or text.count(_begin(subject)) > 1:
            raise DataError(
                f"{file}: {_begin(subject)} must occur once, with {END} after it. Correct the file by hand."
            )
    return text


def _begin(subject: str) -> str:
    return f"<!-- benchmark: {subject} -->"


def _table(subject: str) -> re.Pattern[str]:
    """Return a pattern of the marks of a subject and the text between them, in which no other table begins."""
    return re.compile(f"{_begin(subject)}(?:(?!<!-- benchmark:).)*?{END}", re.DOTALL)


def insert_table(text: str, subject: str, content: str) -> str:
    """Return the text with new content between the marks of the subject. Missing marks are added at the end."""
    table = f"{_begin(subject)}\n{content}\n{END}"
    if _begin(subject) in text:
        return _table(subject).sub(lambda match: table, text)
    section = "" if SECTION in text else f"{SECTION}\n\n"
    return f"{text.rstrip()}\n\n{section}{table}\n".lstrip("\n")


if __name__ == "__main__":
    run_script(main)
