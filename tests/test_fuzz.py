"""Damaged and crafted files and command lines are refused soon, and by UsageError or DataError alone.

Each test changes valid content at random: bits, bytes, numbers, cut and repeated parts. `make test` tries a few inputs,
the same ones each time. `make fuzz` tries 10,000 inputs of each kind, other ones each time.
"""

import json
import os
import pickle
import re
import resource
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st
from torch import nn

from applications.align.detector import Face
from applications.align.manifest import ALIGNED, NO_FACE, Manifest, Row
from config import TrainConfig, ValidationConfig, parse_train, parse_validation
from util.checkpoint import io
from util.checkpoint.run_dir import Run, load_resumable, load_state
from util.data.record_dataset import RecordImages
from util.data.recordio import write_identities
from util.errors import DataError, UsageError
from util.pairs import load_pairs
from util.pairs.bcolz import write_carray
from util.public_networks import read_public_network
from util.training.log import RunLog

INPUTS = int(os.environ.get("FUZZ_INPUTS", 0))
SECONDS = 20  # for one input, on a machine that is busy
GROWTH_KB = 1_000_000
MESSAGE = 20_000  # characters; a word of the command line that is repeated may have thousands

# Replacements for numbers in text, and for bytes.
NUMBERS = b"0 -1 1 2 1.5 1e9 1e400 -1e400 NaN nan Infinity inf null true 0x10 1_0 2147483648 4294967296".split()
NUMBERS += [b"9223372036854775808", b"9" * 20, b"9" * 400, b"9" * 5000, b"[]", b"{}", b'""', b"\xd9\xa3", b""]
BYTES = [struct.pack(f"<{kind}", value) for kind in "HIQ" for value in (0, 1, 2 ** (8 * struct.calcsize(kind) - 1))]
BYTES += [b"\xff" * length for length in (1, 2, 4, 8)]
BYTES += [bytes([character]) for character in b"\0\n\r\t ,:-[]"]


def fuzz(inputs: int, *strategies: st.SearchStrategy, **named: st.SearchStrategy) -> Callable:
    """Run a test with `inputs` inputs, or with the number in FUZZ_INPUTS."""

    def decorate(test: Callable) -> Callable:
        configure = settings(
            max_examples=INPUTS or inputs,
            derandomize=not INPUTS,
            database=None,
            deadline=None,  # the test itself has a time limit
            phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if INPUTS else [])],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        return configure(given(*strategies, **named)(test))

    return decorate


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Return `content` after one to four changes."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        # Headers are at the start.
        place = draw(st.integers(0, min(len(data), 64)) | st.integers(0, len(data)))
        end = min(len(data), place + draw(st.integers(0, 16) | st.integers(0, len(data))))
        change = draw(st.sampled_from(("bit", "byte", "number", "number", "insert", "cut", "remove", "repeat", "nest")))
        if change == "bit" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "byte":
            replacement = draw(st.sampled_from(BYTES))
            data[place : place + len(replacement)] = replacement
        elif change == "number" and (found := list(re.finditer(rb"-?\d[\d.]*", data))):
            match = found[draw(st.integers(0, len(found) - 1))]
            data[match.start() : match.end()] = draw(st.sampled_from(NUMBERS))
        elif change == "insert":
            data[place:place] = draw(st.binary(max_size=16) | st.sampled_from(NUMBERS))
        elif change == "cut":
            del data[place:]
        elif change == "remove":
            del data[place:end]
        elif change == "repeat":
            data[place:place] = data[place:end] * draw(st.integers(1, 3))
        elif change == "nest":
            depth = draw(st.sampled_from((1, 100, 2000)))
            data[place:place] = draw(st.sampled_from((b"[", b"(", b"{", b"- ", b"&a [*a,"))) * depth
    return bytes(data)


@st.composite
def mutated_files(draw: st.DrawFn, make: Callable[[Path], object]) -> dict[str, bytes]:
    """Return the files that make(folder) writes, by name, with one or two of them mutated."""
    contents = files_of(make)
    chosen = draw(st.lists(st.sampled_from(sorted(contents)), min_size=1, max_size=2, unique=True))
    return contents | {name: draw(mutated(contents[name])) for name in chosen}


@cache
def files_of(make: Callable[[Path], object]) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        make(Path(folder))
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def refuses(time_limit) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Return a function that runs an action: it must be fast, and may fail by the two errors. Check the memory last."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(action: Callable[[], object]) -> None:
        try:
            with time_limit(SECONDS):
                action()
        except (UsageError, DataError) as error:
            event("refused")
            assert 0 < len(str(error)) < MESSAGE
        except SystemExit as end:
            event("printed")
            assert end.code == 0
        else:
            event("accepted")

    yield run
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KB


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        file = folder / name
        if not file.is_file() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


# Training images.


def flat_image(level: int, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, np.full((112, 112, 3), level, np.uint8))[1].tobytes()


def make_records(folder: Path) -> None:
    write_identities(folder / "train.rec", [[flat_image(1), flat_image(2, ".jpg")], [flat_image(3)]])
    (folder / "property").unlink()


@fuzz(60, mutated_files(make_records))
def test_fuzz_recordio(folder, refuses, contents):
    write_files(folder / "rec", contents)

    def read() -> None:
        images = RecordImages(folder / "rec" / "train.rec")
        for index in range(len(images)):
            images.image(index)

    refuses(read)


# Verification sets.


def read_pairs(path: Path, root: Path | None = None) -> None:
    pairs = load_pairs(path, root)
    pairs.images(0, 2 * len(pairs))


@st.composite
def bins(draw: st.DrawFn) -> bytes:
    images = [flat_image(1), flat_image(2, ".jpg"), np.frombuffer(flat_image(3), np.uint8), b"2", bytearray(b"3")]
    kinds = draw(st.lists(st.sampled_from(range(5)), min_size=2, max_size=2))
    truth = draw(st.sampled_from(([True], (1,), np.array([True]), [np.bool_(True)])))
    return draw(mutated(pickle.dumps(([images[kind] for kind in kinds], truth), draw(st.integers(0, 5)))))


@fuzz(100, bins())
def test_fuzz_bin(folder, refuses, content):
    write_files(folder, {"set.bin": content})
    refuses(partial(read_pairs, folder / "set.bin"))


PAIR_LISTS = [
    b"1\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\n",
    b"1\nAnn 1 2\nBob 1 Ann 2\n",
    b"Ann/Ann_0001.png Ann/Ann_0002 1\r\nAnn/../Ann/Ann_0001\tBob/Bob_0001.png\t0\r\n",
    "\ufeffAnn/Ann_0001, Bob/Bob_0001.png, 0\n/etc/passwd,../../etc/passwd,1".encode(),
]


@fuzz(150, st.sampled_from(PAIR_LISTS).flatmap(mutated))
def test_fuzz_pair_list(folder, refuses, content):
    images = {
        f"{name}/{name}_000{number}.png": flat_image(number) for name, number in (("Ann", 1), ("Ann", 2), ("Bob", 1))
    }
    if not (folder / "faces").exists():
        write_files(folder / "faces", images)
    write_files(folder, {"pairs.txt": content})
    refuses(partial(read_pairs, folder / "pairs.txt", folder / "faces"))


def make_carray(folder: Path) -> None:
    levels = np.arange(112, dtype=np.uint8)[:, None, None].repeat(112, 1).repeat(3, 2)
    write_carray(folder / "set", [levels, levels + 100], [True])


@fuzz(200, mutated_files(make_carray))
def test_fuzz_carray(folder, refuses, contents):
    write_files(folder / "carray", contents)
    refuses(partial(read_pairs, folder / "carray" / "set"))


# Settings.

YAML = [
    TrainConfig(val_data=("own=a.bin",), train_data="a", num_workers=2).as_yaml().encode(),
    b"lr: 1e-3\nstages: [1, 2]\nLR_train: yes\ngpu_num: cpu\nval_data: {lfw: a.txt:b}\nresume_dir: ~\n",
    b"a: &a [1, 2]\nb: &b [*a, *a, *a, *a, *a, *a]\nlr: [*b, *b]\nstages: *a\nmomentum: 2024-01-01\n",
]


@example(b"[" * 2000, parse_train)
@example(b"lr: 1" + b":0" * 3000, parse_train)
@example(b'lr: !!timestamp "x"', parse_train)
@example(b'epochs: !!int ""', parse_train)
@example(b'scale_lr: !!bool "x"', parse_train)
@fuzz(100, st.sampled_from(YAML).flatmap(mutated), st.sampled_from((parse_train, parse_validation)))
def test_fuzz_yaml(folder, refuses, content, parse):
    write_files(folder, {"run.yaml": content})
    refuses(partial(parse, [f"--config={folder / 'run.yaml'}"]))


FLAGS = [f"--{name}" for config in (TrainConfig, ValidationConfig) for name in config.__dataclass_fields__]
FLAGS += ["--config", "--print_config", "--debug", "--help", "-h", "--margin", "--head_scale", "--load_dir"]
WORDS = [
    *("[0,1]", "[0,", "1]", "0", "cpu", "=", "True", "false", "1", "0.5", "-1", "1e400", "nan", "none", "IR_50"),
    *("9" * 5000, "a=b:c", "a=", "lfw=x.bin", "", " ", "--", "-", "1,2,3", "15 23", "~", "~nobody/x", "\0", "\udcff"),
]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    flags = (
        st.sampled_from(FLAGS)
        | st.sampled_from(FLAGS).map(lambda flag: flag[1:])
        | st.sampled_from(FLAGS).map(str.upper)
    )
    words = st.sampled_from(WORDS) | st.text(max_size=5)
    argument = st.one_of(flags, words, st.tuples(flags, words).map("=".join))
    return draw(st.lists(argument, max_size=6))


@fuzz(300, command_lines(), st.sampled_from((parse_train, parse_validation)))
def test_fuzz_command_line(refuses, arguments, parse):
    refuses(partial(parse, arguments))


# Files of a run.


def make_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    config = TrainConfig()
    networks = {"Backbone": nn.Linear(3, 2), "Head": nn.Linear(2, 2, bias=False)}
    state = io.RecognitionState(
        optimizer=torch.optim.SGD(networks["Head"].parameters(), lr=0.1, momentum=0.9).state_dict(),
        epoch=1,
        step=2,
        best=0.5,
        best_epoch=1,
        rng_state={"cpu": torch.zeros(8, dtype=torch.uint8), "cuda": []},
        classes=["Ann", "Bob"],
        settings={field: getattr(config, field) for field in config.__dataclass_fields__},
    )
    io.save_checkpoint(folder, networks, state)


@fuzz(40, mutated_files(make_checkpoint))
def test_fuzz_checkpoint(folder, refuses, contents):
    write_files(folder / "run", contents)
    refuses(partial(load_resumable, folder / "run"))
    refuses(partial(read_public_network, folder / "run" / "Backbone_1_2.pth"))
    inherit = lambda run: load_state(run).settings  # noqa: E731
    refuses(partial(parse_train, [f"--resume_dir={folder / 'run'}"], inherit))


METRICS = {
    "log/run/metrics.jsonl": "".join(
        json.dumps({"epoch": epoch, "step": 2 * epoch, "loss": 1.5, "accuracy": {"LFW": 0.5}}) + "\n"
        for epoch in (1, 2)
    ).encode(),
    "checkpoints/run/Evaluation.txt": b"Epoch 1/2, LFW : 0.5000\nEpoch 2/2, LFW : 0.6000\n",
}


@fuzz(
    60,
    st.sampled_from(sorted(METRICS)).flatmap(lambda name: mutated(METRICS[name]).map(lambda content: {name: content})),
)
def test_fuzz_run_log(folder, refuses, contents):
    write_files(folder, METRICS | contents)
    run = Run(folder / "checkpoints/run", folder / "best/run", folder / "log/run")
    refuses(lambda: RunLog(run, epoch=1, step=2).close())
    for events in run.log.glob("events*"):
        events.unlink()


ALIGN_SETTINGS = {"size": 112, "source": "photos"}


def make_manifest(folder: Path) -> None:
    face = Face(box=np.array([1, 2, 3, 4.0]), score=0.9, landmarks=np.arange(10.0).reshape(5, 2))
    with Manifest(folder, ALIGN_SETTINGS) as manifest:
        manifest.add([Row("Ann/1.jpg", ALIGNED, "Ann/1.png", faces=1, face=face)])
        manifest.add([Row("Ann/2.jpg", NO_FACE, reason='too dark, "really"\nand small')])


MANIFEST = files_of(make_manifest)
LONG_NAME = {"manifest.csv": MANIFEST["manifest.csv"].replace(b"Ann/1.png", b"9" * 400)}


@example(MANIFEST | {"align.json": b"[" * 2000}, False)
@example(MANIFEST | LONG_NAME, True)
@fuzz(150, mutated_files(make_manifest), st.booleans())
def test_fuzz_manifest(folder, refuses, contents, force):
    write_files(folder / "aligned", contents)
    refuses(lambda: Manifest(folder / "aligned", ALIGN_SETTINGS, force).__exit__())
