"""Runs the benchmarks one after the other, each in a process of its own, and puts their tables into RESULTS.md.

python -m benchmarks.all
python -m benchmarks.all --only loader head
python -m benchmarks.all --quick --results results.md

A table stands between <!-- benchmark: SUBJECT --> and <!-- end -->, and everything else is left as it is. A subject
without marks is added at the end of the file, in a section of its own. What a GPU is needed for is skipped without
one, and its table stays. If a benchmark fails, the file keeps the tables of those before it.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import timing
from util.cli.parser import Settings, flag, option, parse
from util.cli.types import to_file
from util.errors import DataError, RunError, run_script
from util.files import atomic_write, require_writable_file

ROOT = Path(__file__).parents[1]
# Subject: the module and its flags.
COMMANDS = {
    "loader": ["benchmarks.loader"],
    "evaluation": ["benchmarks.evaluation"],
    "verification": ["benchmarks.verification"],
    "head": ["benchmarks.head"],
    "network-cpu": ["benchmarks.network"],
    "network-cpu-bf16": ["benchmarks.network", "--precision", "bf16"],
    "network-cuda": ["benchmarks.network", "--device", "cuda"],
}
SECTION = "## Ours beside the usual way"
END = "<!-- end -->"


def _to_subjects(value: object) -> tuple[str, ...]:
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not set(items) <= set(COMMANDS):
        raise ValueError(f"a list of {', '.join(COMMANDS)}")
    return tuple(items)


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of this benchmark."""

    only: tuple[str, ...] = option(
        default=(), type=_to_subjects, metavar="SUBJECT ...", help=", ".join(COMMANDS), default_help="all of them"
    )
    results: Path = option(
        default=ROOT / "benchmarks/RESULTS.md", type=to_file, metavar="FILE", help="file with the tables"
    )
    quick: bool = flag(help="use small sizes, to see that it runs; the figures mean nothing")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.all", arguments, description=__doc__)
    require_writable_file("--results", options.results)
    if options.quick and options.results.resolve() == (ROOT / "benchmarks/RESULTS.md").resolve():
        raise DataError(f"{options.results}: --quick measures nothing worth keeping; name another file with --results")
    read_results(options.results)  # what is wrong with it is said before the work
    for subject in options.only or COMMANDS:
        run(subject, options.results, options.quick)


def run(subject: str, results: Path, quick: bool) -> None:
    """Runs one benchmark and writes its table. RunError if it fails."""
    command = COMMANDS[subject]
    print(f"\n{subject}: python -m {' '.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        flags = ["--quick", "--repeats", "1"] if quick else []
        done = subprocess.run([sys.executable, "-m", *command, *flags, "--json", file], cwd=ROOT, check=False)
        if done.returncode:
            raise RunError(f"{subject}: ended with exit code {done.returncode}; see above")
        if not file.exists():  # skipped, and it has said why
            return
        found = timing.read(file)
    text = with_table(read_results(results), subject, body(found, command))
    with atomic_write(results) as partial:
        partial.write_text(text)


def read_results(file: Path) -> str:
    """The text of the file, "" if there is none yet. DataError for marks that do not pair up, or no UTF-8."""
    try:
        text = file.read_text() if file.exists() else ""
    except UnicodeDecodeError:
        raise DataError(f"{file}: is no UTF-8 text; name another file with --results") from None
    for subject in COMMANDS:
        begin = _begin(subject)
        if text.count(begin) > 1 or (begin in text and END not in _own_part(text, begin)):
            raise DataError(f"{file}: {begin} must stand there once, with {END} after it; put that right by hand")
    return text


def _begin(subject: str) -> str:
    return f"<!-- benchmark: {subject} -->"


def _own_part(text: str, begin: str) -> str:
    """What comes after a mark, up to the next one."""
    return text.split(begin, 1)[1].split("<!-- benchmark:", 1)[0]


def with_table(text: str, subject: str, content: str) -> str:
    """The text with the content between the subject's marks, which are added at the end if they are missing."""
    begin = _begin(subject)
    if begin not in text:
        section = "" if SECTION in text else f"{SECTION}\n\n"
        text = f"{text.rstrip()}\n\n{section}{begin}\n{END}\n".lstrip("\n")
    before, after = text.split(begin, 1)
    return f"{before}{begin}\n{content}\n{END}{after.split(END, 1)[1]}"


def body(found: timing.Benchmark, command: list[str]) -> str:
    """A benchmark in Markdown: the command, the table, how it was taken and where."""
    notes = ["", *found.notes] if found.notes else []
    lines = [f"    python -m {' '.join(command)}", "", *timing.table(found.rows), "", f"{found.setting}."]
    return "\n".join(["", *lines, f"Machine: {timing.machine()}.", *notes, ""])


if __name__ == "__main__":
    run_script(main)
