"""A run's folders and files: named, found, written whole or not at all, and loaded without running code.

checkpoints/RUN/      Backbone_{epoch}_{batch}.pth, Head_..., Optimizer_...: every epoch, `batch` counted over the run
checkpoints_best/RUN/ Backbone_Best.pth, Head_Best.pth, Optimizer_Best.pth

Backbone and Head files are plain state dicts. What exact resume needs beyond the optimizer is in the Optimizer file.
Runs of super resolution have SR files in place of the other two.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.backbone import backbone_from_state_dict
from util.errors import DataError, RunError
from util.files import atomic_write, require_writable_dir

CHECKPOINT_FILES = ("Backbone", "Head", "Optimizer")  # the files of an epoch; the first one stands for them
SR_CHECKPOINT_FILES = ("SR", "Optimizer")
# What a run needs to go on: the keys of its Optimizer files.
_STATE = {"optimizer", "epoch", "step", "best_epoch", "settings"}
_STATES = {"Backbone": _STATE | {"best_accuracy", "random_states", "classes"}, "SR": _STATE | {"best_psnr", "data"}}
# Ours, the older toolkit's Backbone_Epoch_1_Batch_17.pth, and face.evoLVe's
# Backbone_IR_50_Epoch_1_Batch_17_Time_2019-07-28-19-15_checkpoint.pth.
_EPOCH_FILE = re.compile(r"[A-Za-z]+(?:_.+)?_(?:Epoch_)?(?P<epoch>\d+)_(?:Batch_)?(?P<batch>\d+)(?:_Time_.*)?\.pth")
_SUPERSEDED = "superseded"
_RUN_DATE = re.compile(r"_(\d{4}-\d\d-\d\d-\d\d-\d\d)(?:_(\d+))?$")


@dataclass(frozen=True)
class Run:
    """The folders of a run; the same name in each."""

    checkpoints: Path
    best: Path
    log: Path

    @property
    def name(self) -> str:
        return self.checkpoints.name


def new_run(checkpoint_dir: str, best_dir: str, log_dir: str, prefix: str, now: datetime) -> Run:
    """Makes the folder of a run named PREFIX_{minute}; a second one in the same minute gets `_2`.

    Raises UsageError if one of the three places cannot be written to.
    """
    stem = f"{prefix}_{now:%Y-%m-%d-%H-%M}"
    for flag, folder in (
        ("--checkpoint_dir", checkpoint_dir),
        ("--best_checkpoint_dir", best_dir),
        ("--log_dir", log_dir),
    ):
        require_writable_dir(flag, folder)
    for name in _numbered(stem):
        run = Run(Path(checkpoint_dir) / name, Path(best_dir) / name, Path(log_dir) / name)
        if not (run.best.exists() or run.log.exists()):
            try:
                run.checkpoints.mkdir()
                return run
            except FileExistsError:
                continue


def _numbered(stem: str) -> Iterator[str]:
    """`stem`, `stem_2`, `stem_3` …"""
    yield stem
    yield from (f"{stem}_{number}" for number in count(2))


def resumed_run(resumed: Resumable, checkpoint_dir: str, best_dir: str, log_dir: str) -> Run:
    """The folders in which a resumed run goes on: its own, wherever it has been moved to.

    Files of epochs that it will do again are set aside, and the best files are made those that it knows as the best.
    """
    lead, file = next(iter(resumed.files.items()))
    folder = file.absolute().parent
    if folder.name.startswith(_SUPERSEDED):
        folder = folder.parent
    is_best = file.name == f"{lead}_Best.pth"
    checkpoints = Path(checkpoint_dir) / folder.name if is_best else folder
    run = Run(checkpoints, Path(best_dir) / folder.name, Path(log_dir) / folder.name)
    for place in (run.checkpoints, run.best, run.log):
        require_writable_dir("--resume_dir", place)
    _set_aside(run.checkpoints, resumed.state["epoch"])
    _restore_best(run, lead, resumed.state["best_epoch"])
    return run


def _set_aside(checkpoints: Path, epoch: int) -> None:
    """Moves the files of later epochs into superseded/, or superseded_2/ and so on: nothing is overwritten."""
    later = [
        path
        for path in sorted(checkpoints.glob("*.pth"))
        if (match := _EPOCH_FILE.fullmatch(path.name)) and int(match["epoch"]) > epoch
    ]
    if later:
        aside = next(checkpoints / name for name in _numbered(_SUPERSEDED) if not (checkpoints / name).exists())
        aside.mkdir()
        for path in later:
            path.replace(aside / path.name)


def _restore_best(run: Run, lead: str, epoch: int) -> None:
    """The best files may be those of a later, superseded epoch, or of an earlier one if a kill came before the copy."""
    optimizer_file = run.best / "Optimizer_Best.pth"
    if optimizer_file.is_file() and load(optimizer_file)["epoch"] == epoch:
        return
    for file in run.checkpoints.glob(f"{lead}_{epoch}_*.pth"):
        save_best(run, file)


def newest_run(folder: str | Path) -> Path:
    """The run in `folder` with the latest date in its name, whatever the name begins with."""
    runs = dated_runs(folder, "Backbone*.pth")
    if not runs:
        raise DataError(
            f"{folder}: no run with a Backbone file in it; train one, or name a checkpoint with --resume_dir"
        )
    return runs[-1]


def dated_runs(folder: str | Path, pattern: str) -> list[Path]:
    """The runs in `folder` that have a file like `pattern`, in the order of the dates in their names."""
    folder = Path(folder)
    dated = [
        ((match[1], int(match[2] or 1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _RUN_DATE.search(path.name)) and any(path.glob(pattern))
    ]
    return [path for _, path in sorted(dated)]


def find_backbone(path: str | Path, flag: str = "--resume_dir") -> Path:
    """The Backbone file meant by `path`, as find_network says."""
    return find_network(path, "Backbone", flag=flag)


def find_network(path: str | Path, lead: str, whole: bool = False, flag: str = "--resume_dir") -> Path:
    """The file of a network, such as Backbone, meant by `path`: that file, a folder's Best one, or its newest epoch.

    With `whole`, the newest epoch that has its Optimizer file: a run killed while saving may have a newer network.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{flag}={path}: no such file or folder")
    if (path / f"{lead}_Best.pth").is_file():
        return path / f"{lead}_Best.pth"
    epochs = [
        (int(match["epoch"]), int(match["batch"]), file)
        for file in path.glob(f"{lead}_*.pth")
        if (match := _EPOCH_FILE.fullmatch(file.name))
    ]
    epochs = [epoch for epoch in epochs if not whole or _part(epoch[2], "Optimizer").is_file()] or epochs
    if not epochs:
        raise DataError(f"{flag}={path}: no {lead}_Best.pth or {lead}_EPOCH_BATCH.pth in it; name a run's folder")
    return max(epochs)[2]


@dataclass(frozen=True)
class Resumable:
    """What a run is continued from: an epoch's files, and what is in them."""

    files: dict[str, Path]  # by part, the leading one first
    networks: dict[str, dict[str, torch.Tensor]]  # a state dict for every part but the Optimizer
    state: dict[str, Any]  # what save_epoch was given

    @property
    def backbone(self) -> dict[str, torch.Tensor]:
        return self.networks["Backbone"]

    @property
    def head(self) -> dict[str, torch.Tensor]:
        return self.networks["Head"]


def load_state(path: str | Path, parts: tuple[str, ...] = CHECKPOINT_FILES, mmap: bool = False) -> dict[str, Any]:
    """What save_epoch was given as `state`, of the epoch meant by `path`. DataError if it is missing or is not ours."""
    file = _siblings(find_network(path, parts[0], whole=True), parts)["Optimizer"]
    state = load(file, mmap)
    wanted = _STATES[parts[0]]
    if not wanted <= state.keys():
        raise DataError(
            f"{file}: lacks {', '.join(sorted(wanted - state.keys()))}; only runs of this toolkit can be resumed, so "
            f"start a new run without --resume_dir"
        )
    return state


def load_resumable(path: str | Path, parts: tuple[str, ...] = CHECKPOINT_FILES, mmap: bool = False) -> Resumable:
    """The epoch meant by `path`, as find_network reads it. Raises DataError for a missing file, or one not ours."""
    lead = find_network(path, parts[0], whole=True)
    files = _siblings(lead, parts)
    return Resumable(files, {part: load(files[part], mmap) for part in parts[:-1]}, load_state(lead, parts, mmap))


def load_state_dict_strict(module: nn.Module, state: dict[str, torch.Tensor], file: Path, remedy: str) -> None:
    """Loads a state dict strictly; one that does not fit raises DataError, naming a key that differs."""
    own = module.state_dict()
    for key in [*own, *state]:
        if key not in own or key not in state or own[key].shape != state[key].shape:
            shapes = [tuple(d[key].shape) if key in d else "absent" for d in (state, own)]
            raise DataError(f"{file}: {key} is {shapes[0]} in the file and {shapes[1]} in the network; {remedy}")
    module.load_state_dict(state, strict=True)


def _siblings(lead: Path, parts: tuple[str, ...]) -> dict[str, Path]:
    """The files of an epoch by part, from the first of them. DataError if one is missing."""
    needed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    if not lead.name.startswith(parts[0]):
        others = f"{' and '.join(parts[1:])} {'files' if len(parts) > 2 else 'file'}"
        raise DataError(f"{lead}: resuming needs a {parts[0]} file, with its {others} beside it")
    files = {part: _part(lead, part) for part in parts}
    for path in files.values():
        if not path.is_file():
            raise DataError(
                f"{path}: missing; a run is resumed from its {needed} files together, so take another epoch, or start "
                f"a new run without --resume_dir"
            )
    return files


def _part(file: Path, part: str) -> Path:
    """The file of another part of the same epoch."""
    return file.with_name(file.name.replace(file.name.partition("_")[0], part, 1))


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A file's dictionary, on the CPU, read without running any code that it may hold.

    Of a file that is `mapped`, what is used is read when it is used: for those who need a slice of a large matrix.
    """
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # what torch wrote before 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: not a checkpoint that can be loaded safely ({reason[:160]}); take another") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, and a checkpoint holds a dictionary")
    return content


def load_backbone(file: Path, source: str | None = None) -> tuple[str, nn.Module]:
    """Load a Backbone file as (name, network). Raise DataError, which opens with `source` or the file, for any other."""
    state = load(file)
    try:
        return backbone_from_state_dict(state)
    except ValueError as error:
        raise DataError(f"{source or file}: not a backbone's state dict ({error}); name a Backbone file") from None


def cpu_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict on the CPU, so that it loads anywhere."""
    return _on_cpu(module.state_dict())


def _on_cpu(value: Any) -> Any:
    """`value` with all tensors in its dictionaries and lists on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value


def check_finite(module: nn.Module, name: str, remedy: str = "lower --lr, or raise --warmup_epochs") -> None:
    """Raises RunError if a weight or a running statistic of `module` is not finite."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"the {name}'s {key} is no longer finite; {remedy}")


def save_epoch(run: Run, backbone: nn.Module, head: nn.Module, state: dict[str, Any]) -> Path:
    """Writes the three files of an epoch and returns the Backbone's path, as save_parts does."""
    return save_parts(run, {"Backbone": backbone, "Head": head}, state)


def save_parts(run: Run, networks: Mapping[str, nn.Module], state: dict[str, Any]) -> Path:
    """Writes a file for each network and the Optimizer file, with `state` in it; returns the path of the first.

    The Optimizer file comes last, so an epoch that has one is whole.
    """
    contents = {part: cpu_state_dict(network) for part, network in networks.items()} | {"Optimizer": state}
    paths = [save_part(run, part, content, state) for part, content in contents.items()]
    return paths[0]


def save_part(run: Run, part: str, content: dict[str, Any], state: dict[str, Any]) -> Path:
    """Writes one file of an epoch, whole or not at all, with its tensors on the CPU; `state` knows epoch and step."""
    path = run.checkpoints / f"{part}_{state['epoch']}_{state['step']}.pth"
    with atomic_write(path) as partial:
        torch.save(_on_cpu(content), partial)
    return path


def save_best(run: Run, file: Path) -> None:
    """Makes an epoch's files the best ones: as hard links, which cost no space, or copies where there are none."""
    run.best.mkdir(parents=True, exist_ok=True)
    (run.best / "Optimizer_Best.pth").unlink(missing_ok=True)  # back last: a set of files that has it is one epoch's
    for part in next(
        parts for parts in (CHECKPOINT_FILES, SR_CHECKPOINT_FILES) if file.name.startswith(f"{parts[0]}_")
    ):
        source = _part(file, part)
        with atomic_write(run.best / f"{part}_Best.pth") as partial:
            partial.unlink(missing_ok=True)
            try:
                os.link(source, partial)
            except OSError:
                shutil.copyfile(source, partial)


@contextmanager
def add_last_checkpoint_to_errors(latest: str) -> Iterator[None]:
    """Around an epoch: an error that ends the run names the checkpoint to go on from. Too little memory becomes one."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{error}. The last good checkpoint is {latest}") from None
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise RunError(f"{reason}; lower --batch_size. The last good checkpoint is {latest}") from None


def get_rng_state() -> dict[str, Any]:
    """The state of torch's generators: dropout draws from them."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(states: dict[str, Any]) -> None:
    """Takes back what random_states gave; GPUs beyond those of the earlier machine keep their own."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)


def check_classes(resumed: Resumable, found: list[str], root: Path) -> None:
    """Raises DataError unless the people of a run and of its data are the same: the head has a row for each."""
    saved, file = resumed.state["classes"], resumed.files["Optimizer"]
    remedy = "resume with the same data, or start a new run without --resume_dir"
    if len(saved) != len(found):
        raise DataError(f"{file}: trained on {len(saved)} people, and {root} has {len(found)}; {remedy}")
    for before, now in zip(saved, found, strict=True):
        if before != now:
            raise DataError(f"{file}: trained on {before!r}, where {root} has {now!r}; {remedy}")
