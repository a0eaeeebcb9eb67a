"""Documents: links resolve, the READMEs are twins, and every command and flag exists."""

import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# data/ may hold a user's files, so only its README is listed.
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), ROOT / "data/README.md"]
)
document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())

COMMAND = re.compile(r"(?:\bpython |-- )(?:-m )?(?P<program>[\w./]+)(?P<arguments>[^\n`]*)")
FLAG = re.compile(r"(?<![\w-])--?([a-zA-Z]\w*)")
# Flags of other programs that the documents mention: torchrun, Docker, SLURM.
FOREIGN_FLAGS = {"max-restarts", "standalone", "signals-to-handle", "shutdown-timeout", "shm-size", "signal"}


def indented_lines(text: str) -> list[str]:
    return re.findall(r"^    (\S.*)$", text, re.M)


def without_comment(line: str) -> str:
    """Return a command or a file name of an indented block without its description."""
    return line.split(" #")[0].split("  ")[0].strip()


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return (program, flags) of every command of this project in indented lines and in inline code."""
    inline = re.findall(r"`([^`]+)`", text)
    lines = [line.split("  #")[0] for line in [*indented_lines(text), *(code.replace("\n", " ") for code in inline)]]
    found = [match for line in lines for match in COMMAND.finditer(line)]
    return [(match["program"], FLAG.findall(match["arguments"])) for match in found if match["program"] != "venv"]


def source_of(program: str) -> Path:
    """Return the file that `python PROGRAM` or `python -m PROGRAM` runs."""
    if program.endswith(".py"):
        return ROOT / program
    module = ROOT / program.replace(".", "/")
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


@cache
def flags_of(program: str) -> set[str]:
    """Return the flags that a program knows: from its help, or from its source if the help would import torch."""
    if program.startswith("benchmarks."):
        text = source_of(program).read_text() + (ROOT / "benchmarks/timing.py").read_text()
        return set(re.findall(r"\b[a-z]\w*", text))
    start = [program] if program.endswith(".py") else ["-m", program]
    done = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(FLAG.findall(done.stdout))


def test_readmes_are_twins():
    english, korean = ((ROOT / name).read_text() for name in ("README.md", "README.ko.md"))
    assert [*map(without_comment, indented_lines(english))] == [*map(without_comment, indented_lines(korean))]
    for pattern in (r"^#+ ", r"^\|", r"^- ", r"\]\(((?!README)[^)]+)\)"):
        assert re.findall(pattern, english, re.M) == re.findall(pattern, korean, re.M), pattern
    for pattern in (r"`([^`]+)`", r"\d+\.\d+", r"\d+(?:,\d+)+"):
        assert Counter(re.findall(pattern, english)) == Counter(re.findall(pattern, korean)), pattern


def test_commands_finds_programs_and_flags():
    text = "    A=1 python -m a.b --x 1 -y_z  # --no\n    torchrun --k=2 -- train.py --m=0.2\nUse `python c/d.py\n--w`."
    assert commands(text) == [("a.b", ["x", "y_z"]), ("train.py", ["m"]), ("c/d.py", ["w"])]


@document
def test_document_has_no_gap_left_to_fill(path):
    assert not re.findall(r"\b[A-Z]+_(?:OUTPUT|TEXT|TABLE|SENTENCE)\b", path.read_text())


@document
def test_document_links_resolve(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).is_file(), target


@document
def test_document_commands_exist(path):
    for program, flags in commands(path.read_text()):
        assert source_of(program).is_file(), program
        assert not set(flags) - flags_of(program), program


@document
def test_document_flags_exist(path):
    """Flags in the text, outside commands, belong to one of the programs of any document."""
    programs = {program for document in DOCUMENTS for program, _ in commands(document.read_text())}
    known = FOREIGN_FLAGS.union(*map(flags_of, programs))
    for code in re.findall(r"`(--?[a-zA-Z][^`]*)`", path.read_text()):
        assert set(re.findall(r"(?<![\w-])--?([a-zA-Z][\w-]*)", code)) <= known, code


def test_every_promise_names_a_test_that_exists():
    lines = (ROOT / "docs/reliability.md").read_text().splitlines()
    promises = [line for line in lines if re.match(r"\| (?!promise|---|code|\d)", line)]
    assert len(promises) > 40
    for line in promises:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named and len(named) == line.count("::"), line
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.M), (file, test)


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())}
    pages = {path for path in DOCUMENTS if path.parent.name == "docs"}
    assert pages and pages <= linked
