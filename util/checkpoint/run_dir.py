"""The folders of a run: create, lock, find, resume, keep the best epoch, and delete what is not needed any more.

checkpoints/RUN/      Backbone_{epoch}_{batch}.pth, Head_..., Optimizer_...: every epoch, `batch` counted over the run
                      Backbone_Last.pth, Head_Last.pth, Optimizer_Last.pth: the rolling checkpoint within an epoch
checkpoints_best/RUN/ Backbone_Best.pth, Head_Best.pth, Optimizer_Best.pth

Runs of super resolution have an SR file in place of Backbone and Head. Runs with --ema have an EMA file too.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch

from util.checkpoint.io import (
    AVERAGE_FILE,
    CHECKPOINT_FILES,
    SIBLINGS,
    SR_CHECKPOINT_FILES,
    RecognitionState,
    SuperResolutionState,
    check_siblings,
    load,
)
from util.checkpoint.lock import LOCK_FILE, lock_folder
from util.console import logger
from util.errors import DataError
from util.files import atomic_write_all, finish_writes, require_writable_dir

# Our own names, the older toolkit's Backbone_Epoch_1_Batch_17.pth, and face.evoLVe's
# Backbone_IR_50_Epoch_1_Batch_17_Time_2019-07-28-19-15_checkpoint.pth.
_EPOCH_FILE = re.compile(r"[A-Za-z]+(?:_.+)?_(?:Epoch_)?(?P<epoch>\d+)_(?:Batch_)?(?P<batch>\d+)(?:_Time_.*)?\.pth")
_SUPERSEDED = "superseded"
_KINDS = tuple(dict.fromkeys((*CHECKPOINT_FILES, *SR_CHECKPOINT_FILES, AVERAGE_FILE)))
# What a run writes besides checkpoints.
_LOG_FILES = re.compile(
    rf"Evaluation\.txt|metrics\.jsonl|run\.json|(samples|curves|roc)\.png|events\.out\.tfevents\..*|{LOCK_FILE}|"
    r"\..*\.partial.*"
)
# Settings that may differ between two starts of the same run: where it runs, where its files are, and which it keeps.
MACHINE_SETTINGS = frozenset(("gpu_num", "num_workers", "val_batch_size", "checkpoint_dir", "best_checkpoint_dir"))
MACHINE_SETTINGS |= {"log_dir", "resume_dir", "save_every", "keep_last", "max_bad"}
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


def lock_run(run: Run) -> AbstractContextManager[None]:
    """Hold the lock of a run in a `with` block. Raise RunError if another process writes the run."""
    return lock_folder(run.checkpoints)


def discard_empty_run(run: Run) -> None:
    """Remove the folders of a run that ends before its first checkpoint. Files of others stay, with their folders."""
    folders = [folder for folder in (run.checkpoints, run.best, run.log) if folder.is_dir()]
    if any(path for folder in folders for path in folder.rglob("[!.]*.pth")):
        return
    for folder in folders:
        for file in folder.iterdir():
            if _LOG_FILES.fullmatch(file.name):
                file.unlink()
        with suppress(OSError):  # not empty
            folder.rmdir()


def resumed_run(resumed: Resumable, checkpoint_dir: str, best_dir: str, log_dir: str) -> Run:
    """Return the folders of a resumed run: its own ones, also if they were moved.

    Move later checkpoints to superseded/, remove temporary files, and restore the best files of the resumed state.

    Raises:
        UsageError: a folder cannot be written to.
        RunError: another process writes the run.
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
    with lock_run(run):
        finish_writes(run.best)
        for place in (run.checkpoints, run.best, run.log):
            for partial in place.glob(".*.partial*"):  # nobody else writes here
                partial.unlink()
        _move_later_checkpoints(run.checkpoints, (resumed.state.epoch, resumed.state.epoch_step))
        kinds = CHECKPOINT_FILES if network == "Backbone" else SR_CHECKPOINT_FILES
        _restore_best(run, kinds, resumed.state.best_epoch)
    return run


def _peek(file: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's Optimizer file without reading its tensors, {} for a damaged one."""
    with suppress(DataError):
        content = load(sibling_file(file, "Optimizer"), mmap=True, check=False)
        if "settings" in content:
            return content
    return {}


def _position(file: Path) -> tuple[float, int]:
    """Return how far a checkpoint is: finished epochs, and steps of the next one. A damaged rolling one is the last."""
    if match := _EPOCH_FILE.fullmatch(file.name):
        return int(match["epoch"]), 0
    content = _peek(file)
    return content.get("epoch", math.inf), content.get("epoch_step", 0)


def _move_later_checkpoints(checkpoints: Path, position: tuple[int, int]) -> None:
    """Move later checkpoints to superseded/, or to superseded_2/ and so on, so that nothing is overwritten."""
    files = [*_epoch_files(checkpoints), *(checkpoints.glob("*_Last.pth"))]
    later = [path for path in files if _position(path) > position]
    if later:
        folder = next(checkpoints / name for name in _numbered(_SUPERSEDED) if not (checkpoints / name).exists())
        folder.mkdir()
        for path in later:
            path.replace(folder / path.name)


def _epoch_files(folder: Path, kinds: tuple[str, ...] = _KINDS) -> list[Path]:
    """Return the files of all epochs in a folder, from the first to the last."""
    found = []
    for path in folder.glob("*.pth"):
        match = _EPOCH_FILE.fullmatch(path.name)
        if match and path.name.partition("_")[0] in kinds:
            found.append((int(match["epoch"]), int(match["batch"]), path))
    return [path for _, _, path in sorted(found)]


def _restore_best(run: Run, kinds: tuple[str, ...], epoch: int) -> None:
    """Make `epoch` the best again: the best files may be damaged, or from another epoch."""
    problem = None
    best = run.best / f"{kinds[0]}_Best.pth"
    try:
        if best.is_file() and _load_checkpoint(best, kinds, mmap=True).state.epoch == epoch:
            return
    except DataError as error:
        problem = error
    for file in run.checkpoints.glob(f"{kinds[0]}_{epoch}_*.pth"):
        try:
            _load_checkpoint(file, kinds, mmap=True)
        except DataError as error:
            problem = error
            continue
        save_best(run, file)
        return
    if problem:
        logger.warning(f"{problem} The next best epoch replaces the files in {run.best}.")


def save_best(run: Run, file: Path) -> None:
    """Make the files of an epoch the best ones: hard links, which need no space, or copies where links do not work.

    Args:
        run: the run.
        file: the Backbone or SR file of the epoch.
    """
    run.best.mkdir(parents=True, exist_ok=True)
    kinds = SR_CHECKPOINT_FILES if file.name.startswith("SR_") else CHECKPOINT_FILES
    if sibling_file(file, AVERAGE_FILE).is_file():
        kinds = (*kinds, AVERAGE_FILE)
    else:
        (run.best / f"{AVERAGE_FILE}_Best.pth").unlink(missing_ok=True)
    with atomic_write_all([run.best / f"{kind}_Best.pth" for kind in kinds]) as partials:
        for kind, partial in zip(kinds, partials, strict=True):
            source = sibling_file(file, kind)
            partial.unlink(missing_ok=True)
            try:
                os.link(source, partial)
            except OSError:
                shutil.copyfile(source, partial)


def remove_rolling(folder: Path) -> None:
    """Delete the rolling checkpoint of a run, after the checkpoint of a complete epoch was saved."""
    for kind in ("Backbone", "SR", "Head", AVERAGE_FILE, "Optimizer"):  # without its network, it is not found any more
        (folder / f"{kind}_Last.pth").unlink(missing_ok=True)


def remove_old_epochs(run: Run, keep_last: int | None, best_epoch: int) -> None:
    """Delete the files of old epochs, after the files of the newest epoch were saved.

    Args:
        run: the run.
        keep_last: how many complete epochs stay. None: all.
        best_epoch: the epoch that stays in any case.
    """
    files = _epoch_files(run.checkpoints)
    complete = [_position(file)[0] for file in files if file.name.startswith("Optimizer")]
    if keep_last is None or len(complete) <= keep_last:
        return
    for file in files:
        if complete[-keep_last] > _position(file)[0] != best_epoch:
            file.unlink()


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


def find_network(path: str | Path, network: str, flag: str = "--resume_dir") -> Path:
    """Return the file that `path` stands for: that file, the Best file of a folder, or its newest epoch.

    Args:
        path: a file or a folder. A folder without a complete epoch stands for its rolling checkpoint.
        network: how the names of the files begin: Backbone or SR.
        flag: the flag that gave `path`, for the message.

    Raises:
        DataError: there is no such file.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{flag}={path}: no such file or folder. Check the path.")
    for file in (path / f"{network}_Best.pth", *reversed(_epoch_files(path, (network,))), path / f"{network}_Last.pth"):
        if file.is_file():
            return file
    raise DataError(
        f"{flag}={path}: no {network}_Best.pth or {network}_EPOCH_BATCH.pth in it. Give the folder of a run."
    )


@dataclass(frozen=True)
class Resumable:
    """The files of a checkpoint and their content."""

    files: dict[str, Path]  # by kind, a network first
    networks: dict[str, dict[str, torch.Tensor]]  # a state dict for every kind but the Optimizer
    state: Any  # a RecognitionState or SuperResolutionState


def load_state(path: str | Path, kinds: tuple[str, ...] = CHECKPOINT_FILES) -> RecognitionState | SuperResolutionState:
    """Load the Optimizer file of the checkpoint that load_resumable() takes. Its tensors are read when they are used.

    Args:
        path: a network's file or a run's folder.
        kinds: CHECKPOINT_FILES or SR_CHECKPOINT_FILES.

    Raises:
        DataError: no checkpoint is complete and undamaged, or it is from another program.
    """
    return _load_newest(path, kinds, mmap=True)[0].state


def load_resumable(path: str | Path, kinds: tuple[str, ...] = CHECKPOINT_FILES, mmap: bool = False) -> Resumable:
    """Load the newest checkpoint of a run that is complete and undamaged, or the one whose network's file is given.

    See load_state() for arguments and errors, and load() for `mmap`.
    """
    resumed, passed_over = _load_newest(path, kinds, mmap)
    if passed_over:
        logger.warning(f"{' '.join(map(str, passed_over))} Taken instead: {resumed.files[kinds[0]]}")
    return resumed


def _load_newest(path: str | Path, kinds: tuple[str, ...], mmap: bool) -> tuple[Resumable, list[DataError]]:
    """Return the newest good checkpoint, and why newer ones were passed over."""
    path = Path(path)
    if not (path / f"{kinds[0]}_Best.pth").is_file() and any(path.glob(".*.ready*")):
        with lock_folder(path, wait=10):  # for another rank, which does the same
            finish_writes(path)
    errors: list[DataError] = []
    for file in _newest_first(path, kinds):
        try:
            return _load_checkpoint(file, kinds, mmap), errors
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _newest_first(path: Path, kinds: tuple[str, ...]) -> list[Path]:
    """Return the networks' files of the checkpoints in a run's folder. A file, or the best one, is the only choice."""
    network = kinds[0]
    found = find_network(path, network)
    if found == path or found.name == f"{network}_Best.pth":
        return [found]
    files = [*_epoch_files(path, (network,)), *path.glob(f"{network}_Last.pth")]
    return sorted(reversed(files), key=_position, reverse=True)


def _load_checkpoint(file: Path, kinds: tuple[str, ...], mmap: bool) -> Resumable:
    """Load all files of a checkpoint. Raise DataError if one is missing, damaged or from another save."""
    if not file.name.startswith(kinds[0]):
        raise DataError(
            f"{file}: resuming needs a {kinds[0]} file of a run of this toolkit, with {' and '.join(kinds[1:])} next "
            f"to it. To start from the weights of a network is not to resume: leave --resume_dir out."
        )
    files = {kind: sibling_file(file, kind) for kind in kinds}
    for path in files.values():
        if not path.is_file():
            raise DataError(
                f"{path}: missing. Resuming needs the files {', '.join(kinds)} of an epoch. Take another epoch, or "
                f"start a new run without --resume_dir."
            )
    networks = {kind: load(files[kind], mmap) for kind in kinds[:-1]}
    content = load(files["Optimizer"], mmap)
    if AVERAGE_FILE in content.get(SIBLINGS, {}):
        files[AVERAGE_FILE] = sibling_file(file, AVERAGE_FILE)
        networks[AVERAGE_FILE] = load(files[AVERAGE_FILE], mmap)
    check_siblings(files, content)
    state_type = RecognitionState if kinds == CHECKPOINT_FILES else SuperResolutionState
    return Resumable(files, networks, state_type.from_dict(content, files["Optimizer"]))


def find_run_to_continue(
    checkpoint_dir: str | Path, settings: Mapping[str, Any], network: str = "Backbone"
) -> Path | None:
    """Return the newest run with these settings that has a checkpoint and epochs left, or None.

    Args:
        checkpoint_dir: the folder with the runs.
        settings: Settings.as_dict(). MACHINE_SETTINGS are not compared.
        network: Backbone, or SR for runs of super resolution.

    Raises:
        RunError: another process writes that run.
    """
    kinds = SR_CHECKPOINT_FILES if network == "SR" else CHECKPOINT_FILES
    wanted = {name: value for name, value in settings.items() if name not in MACHINE_SETTINGS}
    for run in reversed(dated_runs(checkpoint_dir, f"{network}_*.pth")):
        try:
            peeked = [content for file in _newest_first(run, kinds) if (content := _peek(file))]
            # Runs of earlier versions lack newer settings, and have LR_scale as a number.
            saved = peeked[0]["settings"] if peeked else {}
            if any(value not in (saved.get(name, value), [saved.get(name)]) for name, value in wanted.items()):
                continue
            state = load_state(run, kinds)
        except DataError as error:
            logger.warning(f"{error} This run is passed over.")
            continue
        if state.epoch < settings["epochs"]:
            with lock_folder(run):
                return run
    return None


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
