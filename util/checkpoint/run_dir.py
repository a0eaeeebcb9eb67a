"""The folders of a run: create, find, resume, and keep the best epoch.

checkpoints/RUN/      Backbone_{epoch}_{batch}.pth, Head_..., Optimizer_...: every epoch, `batch` counted over the run
checkpoints_best/RUN/ Backbone_Best.pth, Head_Best.pth, Optimizer_Best.pth

Runs of super resolution have an SR file in place of Backbone and Head.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch

from util.checkpoint.io import (
    CHECKPOINT_FILES,
    SR_CHECKPOINT_FILES,
    RecognitionState,
    SuperResolutionState,
    load,
)
from util.errors import DataError
from util.files import atomic_write, require_writable_dir

# Our own names, the older toolkit's Backbone_Epoch_1_Batch_17.pth, and face.evoLVe's
# Backbone_IR_50_Epoch_1_Batch_17_Time_2019-07-28-19-15_checkpoint.pth.
_EPOCH_FILE = re.compile(r"[A-Za-z]+(?:_.+)?_(?:Epoch_)?(?P<epoch>\d+)_(?:Batch_)?(?P<batch>\d+)(?:_Time_.*)?\.pth")
_SUPERSEDED = "superseded"
_RUN_DATE = re.compile(r"_(\d{4}-\d\d-\d\d-\d\d-\d\d)(?:_(\d+))?$")


@dataclass(frozen=True)
class Run:
    """The folders of a run. All three have the same name."""

    checkpoints: Path
    best: Path
    log: Path

    @property
    def name(self) -> str:
        return self.checkpoints.name


def new_run(checkpoint_dir: str, best_dir: str, log_dir: str, *, prefix: str, now: datetime) -> Run:
    """Make the folder of a run named PREFIX_{minute}. A second run in the same minute gets `_2`.

    Raises:
        UsageError: one of the three places cannot be written to.
    """
    stem = f"{prefix}_{now:%Y-%m-%d-%H-%M}"
    flags = {"--checkpoint_dir": checkpoint_dir, "--best_checkpoint_dir": best_dir, "--log_dir": log_dir}
    for flag, folder in flags.items():
        require_writable_dir(flag, folder)
    for name in _numbered(stem):
        run = Run(Path(checkpoint_dir) / name, Path(best_dir) / name, Path(log_dir) / name)
        if not (run.best.exists() or run.log.exists()):
            try:
                run.checkpoints.mkdir()
                return run
            except FileExistsError:
                continue
    raise AssertionError("the names never end")


def _numbered(stem: str) -> Iterator[str]:
    """Yield `stem`, `stem_2`, `stem_3` …"""
    yield stem
    yield from (f"{stem}_{number}" for number in count(2))


def resumed_run(resumed: Resumable, checkpoint_dir: str, best_dir: str, log_dir: str) -> Run:
    """Return the folders of a resumed run: its own ones, also if they were moved.

    Move checkpoints of later epochs to superseded/, and restore the best files to match the resumed state.
    """
    network, file = next(iter(resumed.files.items()))
    folder = file.absolute().parent
    if folder.name.startswith(_SUPERSEDED):
        folder = folder.parent
    is_best = file.name == f"{network}_Best.pth"
    checkpoints = Path(checkpoint_dir) / folder.name if is_best else folder
    run = Run(checkpoints, Path(best_dir) / folder.name, Path(log_dir) / folder.name)
    for place in (run.checkpoints, run.best, run.log):
        require_writable_dir("--resume_dir", place)
    _move_later_epochs(run.checkpoints, resumed.state.epoch)
    _restore_best(run, network, resumed.state.best_epoch)
    return run


def _move_later_epochs(checkpoints: Path, epoch: int) -> None:
    """Move the files of later epochs to superseded/, or to superseded_2/ and so on, so that nothing is overwritten."""
    later = []
    for path in sorted(checkpoints.glob("*.pth")):
        match = _EPOCH_FILE.fullmatch(path.name)
        if match and int(match["epoch"]) > epoch:
            later.append(path)
    if later:
        folder = next(checkpoints / name for name in _numbered(_SUPERSEDED) if not (checkpoints / name).exists())
        folder.mkdir()
        for path in later:
            path.replace(folder / path.name)


def _restore_best(run: Run, network: str, epoch: int) -> None:
    """Make `epoch` the best again: the best files may be from a later epoch, or from an earlier one after a kill."""
    optimizer_file = run.best / "Optimizer_Best.pth"
    if optimizer_file.is_file() and load(optimizer_file)["epoch"] == epoch:
        return
    for file in run.checkpoints.glob(f"{network}_{epoch}_*.pth"):
        save_best(run, file)


def save_best(run: Run, file: Path) -> None:
    """Make the files of an epoch the best ones: hard links, which need no space, or copies where links do not work.

    Args:
        run: the run.
        file: the Backbone or SR file of the epoch.
    """
    run.best.mkdir(parents=True, exist_ok=True)
    # The Optimizer file is removed first and comes back last: a set of files that has it is complete.
    (run.best / "Optimizer_Best.pth").unlink(missing_ok=True)
    for kind in SR_CHECKPOINT_FILES if file.name.startswith("SR_") else CHECKPOINT_FILES:
        source = sibling_file(file, kind)
        with atomic_write(run.best / f"{kind}_Best.pth") as partial:
            partial.unlink(missing_ok=True)
            try:
                os.link(source, partial)
            except OSError:
                shutil.copyfile(source, partial)


def newest_run(folder: str | Path) -> Path:
    """Return the run in `folder` with the latest date in its name, whatever its prefix."""
    runs = dated_runs(folder, "Backbone*.pth")
    if not runs:
        raise DataError(
            f"{folder}: no run with a Backbone file in it. Train one, or give a checkpoint with --resume_dir."
        )
    return runs[-1]


def dated_runs(folder: str | Path, pattern: str) -> list[Path]:
    """Return the runs in `folder` that have a file like `pattern`, ordered by the date in their names."""
    folder = Path(folder)
    dated = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _RUN_DATE.search(path.name)
        if match and any(path.glob(pattern)):
            dated.append((match[1], int(match[2] or 1), path))
    return [path for _, _, path in sorted(dated)]


def find_backbone(path: str | Path, flag: str = "--resume_dir") -> Path:
    """Return the Backbone file that `path` stands for, see find_network()."""
    return find_network(path, "Backbone", flag=flag)


def find_network(path: str | Path, network: str, complete: bool = False, flag: str = "--resume_dir") -> Path:
    """Return the file that `path` stands for: that file, the Best file of a folder, or its newest epoch.

    Args:
        path: a file or a folder.
        network: how the names of the files begin: Backbone or SR.
        complete: prefer the newest epoch that has its Optimizer file. A run that was killed while it saved may have a
            newer network.
        flag: the flag that gave `path`, for the message.

    Raises:
        DataError: there is no such file.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{flag}={path}: no such file or folder. Check the path.")
    if (path / f"{network}_Best.pth").is_file():
        return path / f"{network}_Best.pth"
    epochs = []
    for file in path.glob(f"{network}_*.pth"):
        if match := _EPOCH_FILE.fullmatch(file.name):
            is_complete = not complete or sibling_file(file, "Optimizer").is_file()
            epochs.append((is_complete, int(match["epoch"]), int(match["batch"]), file))
    if not epochs:
        raise DataError(
            f"{flag}={path}: no {network}_Best.pth or {network}_EPOCH_BATCH.pth in it. Give the folder of a run."
        )
    return max(epochs)[-1]


@dataclass(frozen=True)
class Resumable:
    """The files of an epoch and their content."""

    files: dict[str, Path]  # by kind, a network first
    networks: dict[str, dict[str, torch.Tensor]]  # a state dict for every kind but the Optimizer
    state: Any  # a RecognitionState or SuperResolutionState


def load_state(
    path: str | Path, kinds: tuple[str, ...] = CHECKPOINT_FILES, mmap: bool = False
) -> RecognitionState | SuperResolutionState:
    """Load the Optimizer file of the epoch that `path` stands for, see find_network().

    Args:
        path: a network's file or a run's folder.
        kinds: CHECKPOINT_FILES or SR_CHECKPOINT_FILES.
        mmap: see load().

    Raises:
        DataError: a file is missing, or is from another program.
    """
    file = epoch_files(find_network(path, kinds[0], complete=True), kinds)["Optimizer"]
    state_type = RecognitionState if kinds == CHECKPOINT_FILES else SuperResolutionState
    return state_type.from_dict(load(file, mmap), file)


def load_resumable(path: str | Path, kinds: tuple[str, ...] = CHECKPOINT_FILES, mmap: bool = False) -> Resumable:
    """Load all files of an epoch. See load_state() for arguments and errors."""
    file = find_network(path, kinds[0], complete=True)
    files = epoch_files(file, kinds)
    networks = {kind: load(files[kind], mmap) for kind in kinds[:-1]}
    return Resumable(files, networks, load_state(file, kinds, mmap))


def epoch_files(file: Path, kinds: tuple[str, ...]) -> dict[str, Path]:
    """Return the files of an epoch by kind, from the file of its first kind. Raise DataError if one is missing."""
    if not file.name.startswith(kinds[0]):
        raise DataError(f"{file}: resuming needs a {kinds[0]} file, with {' and '.join(kinds[1:])} next to it.")
    files = {kind: sibling_file(file, kind) for kind in kinds}
    for path in files.values():
        if not path.is_file():
            raise DataError(
                f"{path}: missing. Resuming needs the files {', '.join(kinds)} of an epoch. Take another epoch, or "
                f"start a new run without --resume_dir."
            )
    return files


def sibling_file(file: Path, kind: str) -> Path:
    """Return the path of another kind of file of the same epoch."""
    return file.with_name(file.name.replace(file.name.partition("_")[0], kind, 1))


def check_classes(resumed: Resumable, found: list[str], root: Path) -> None:
    """Raise DataError unless a run and its data have the same identities: the head has a row for each.

    Args:
        resumed: the run.
        found: the identities of the training data, in order.
        root: the training data, for the message.
    """
    saved, file = resumed.state.classes, resumed.files["Optimizer"]
    fix = "Resume with the same data, or start a new run without --resume_dir"
    if len(saved) != len(found):
        raise DataError(f"{file}: trained on {len(saved)} identities, but {root} has {len(found)}. {fix}.")
    for before, now in zip(saved, found, strict=True):
        if before != now:
            raise DataError(f"{file}: trained on {before!r}, but {root} has {now!r} in its place. {fix}.")
