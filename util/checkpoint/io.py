"""Save and load the files of a checkpoint: atomic writes, no code execution on load, exact resume.

Backbone, Head, EMA and SR files are plain state dicts. All else that an exact resume needs is in the Optimizer file.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from model.head import MarginHead
from util.errors import DataError, RunError, UsageError
from util.files import atomic_write_all

CHECKPOINT_FILES = ("Backbone", "Head", "Optimizer")  # of an epoch of recognition training
SR_CHECKPOINT_FILES = ("SR", "Optimizer")  # of an epoch of super-resolution training
# The end of our zip files. Their comment is the CRC-32 of the whole file. Zip's own ones cover the content alone.
_END = re.compile(rb"PK\x05\x06.{16}\x0e\0crc32:(?P<crc>[0-9a-f]{8})", re.DOTALL)
_END_SIZE = 36
_SAVE_WEIGHTS = "Where it was made, save the weights alone: torch.save(model.state_dict(), FILE)"
AVERAGE_FILE = "EMA"  # of an epoch whose run averages the weights of the backbone
SIBLINGS = "siblings"  # key of an Optimizer file: the CRC-32 of each file that was saved with it


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The content of an Optimizer file: all that an exact resume needs besides the networks.

    KEYS maps a field to its key on disk where the two differ. Files of earlier versions lack the fields with a default.
    """

    KEYS: ClassVar[Mapping[str, str]] = {}

    optimizer: dict[str, Any]
    epoch: int  # finished epochs
    step: int  # finished steps, over all epochs
    best: float | None  # the value of the best epoch
    best_epoch: int
    settings: dict[str, Any]
    epoch_step: int = 0  # finished steps of the unfinished epoch
    progress: dict[str, Any] = field(default_factory=dict)  # what the training loop needs to continue within the epoch

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that is saved."""
        return {self.KEYS.get(each.name, each.name): getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], file: Path) -> Self:
        """Build the state from the content of `file`. Raise DataError if another program wrote it."""
        values, missing = {}, []
        for each in fields(cls):
            key = cls.KEYS.get(each.name, each.name)
            if key in content:
                values[each.name] = content[key]
            elif each.default is MISSING and each.default_factory is MISSING:
                missing.append(key)
        if missing:
            raise DataError(
                f"{file}: lacks {', '.join(sorted(missing))}, so it is not a run of this toolkit. Start a new run "
                f"without --resume_dir."
            )
        numbers = (values["epoch"], values["step"], values["best_epoch"], values.get("epoch_step", 0))
        if not isinstance(values["settings"], dict) or not all(isinstance(number, int) for number in numbers):
            raise DataError(f"{file}: its settings or counters are damaged. Take another epoch.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class RecognitionState(TrainState):
    """The state of a run that trains a backbone and a head."""

    KEYS: ClassVar = {"best": "best_accuracy", "rng_state": "random_states", "world_size": "ranks"}

    rng_state: dict[str, Any]
    classes: list[str]
    scaler: dict[str, Any] = field(default_factory=dict)  # empty except for fp16
    world_size: int = 1
    rank_states: list[dict[str, Any]] = field(default_factory=list)  # what differs between several ranks


@dataclass(frozen=True, kw_only=True)
class SuperResolutionState(TrainState):
    """The state of a run that trains a super-resolution network. `data` counts its images and identities."""

    KEYS: ClassVar = {"best": "best_psnr"}

    data: dict[str, int]


def load(path: Path, mmap: bool = False, check: bool = True) -> dict[str, Any]:
    """Load the dictionary in a file to the CPU, without executing code that the file may hold.

    Args:
        path: a file that torch.save wrote.
        mmap: read a tensor only when it is used. For callers that need a slice of a large matrix.
        check: read the file once more to see that no bit changed. False is for a look at the settings.

    Raises:
        DataError: the file is damaged, would execute code, or holds no dictionary.
    """
    try:
        is_zip = _check_bytes(path) if check else zipfile.is_zipfile(path)
        # torch before 1.6 wrote a format that cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check the file and the disk.") from None
    except Exception as error:
        reason = "not a checkpoint of PyTorch, or damaged. Give a file that torch.save wrote"
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):  # the rest of torch's text is about flags of its own
            reason = (
                f"not a checkpoint that can be loaded safely: it holds Python objects, and the code of {match[1]} is "
                f"not run. {_SAVE_WEIGHTS}"
            )
        raise DataError(f"{path}: {reason}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}. A checkpoint holds a dictionary.")
    return content


def recorded_crc(path: Path) -> str | None:
    """Return the CRC-32 that save_checkpoint() wrote into a file, None for files of others."""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _END_SIZE, 0))
        match = _END.fullmatch(file.read())
    return match["crc"].decode() if match else None


def is_bomb(archive: zipfile.ZipFile, path: Path) -> bool:
    """Return whether entries are larger than the file: torch does not compress, so they would only fill the memory."""
    return sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size


def _check_bytes(path: Path) -> bool:
    """Return whether a file is a zip file. Raise DataError if its bytes changed since it was written.

    Files of others have a CRC-32 in each entry of the zip file; before torch 1.6 they had none.
    """
    damaged = "Take another epoch, or copy the file again."
    if expected := recorded_crc(path):
        crc = 0
        with path.open("rb") as file:
            left = path.stat().st_size - len("..crc32:01234567")
            while block := file.read(min(left, 1 << 20)):
                crc = zlib.crc32(block, crc)
                left -= len(block)
        if f"{zlib.crc32(bytes(2), crc):08x}" != expected:  # torch wrote a comment of length 0
            raise DataError(f"{path}: is damaged (its CRC-32 differs). {damaged}")
        return True
    with path.open("rb") as file:
        has_start = file.read(4) == b"PK\3\4"
        file.seek(max(file.seek(0, os.SEEK_END) - 22, 0))
        end = file.read()
    if not has_start and not zipfile.is_zipfile(path):
        return False
    if not has_start or not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
        raise DataError(f"{path}: is damaged (it is cut short, or its end changed). {damaged}")
    names = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            wrong = "the list of entries" if is_bomb(archive, path) else archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError):
        wrong = "an entry"
    if any(name.endswith("/constants.pkl") for name in names):
        raise DataError(f"{path}: holds a TorchScript program, not a checkpoint. {_SAVE_WEIGHTS}.")
    if wrong:
        raise DataError(f"{path}: is damaged (the CRC-32 of {wrong} differs). {damaged}")
    return True


def load_state_dict_strict(module: nn.Module, state: dict[str, torch.Tensor], file: Path) -> None:
    """Load a state dict strictly. Raise DataError, which names the first key that differs, if it does not fit."""
    expected = module.state_dict()
    for key in [*expected, *state]:
        if key not in expected or key not in state or expected[key].shape != state[key].shape:
            saved, built = (tuple(d[key].shape) if key in d else "absent" for d in (state, expected))
            raise DataError(
                f"{file}: {key} is {saved} in the file and {built} in the network. Take another epoch, or start a new "
                f"run without --resume_dir."
            )
    module.load_state_dict(state, strict=True)


def cpu_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict with all tensors on the CPU, so that it loads on any machine."""
    return _to_cpu(module.state_dict())


def _to_cpu(value: Any) -> Any:
    """Copy `value` with all tensors in its dictionaries and lists on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def save_checkpoint(folder: Path, networks: Mapping[str, nn.Module], state: TrainState, rolling: bool = False) -> Path:
    """Write one file for each network and the Optimizer file, all or none.

    Args:
        folder: the run's checkpoint folder.
        networks: {"Backbone": …, "Head": …}, with "EMA": … for an average of the weights, or {"SR": …}.
        state: the content of the Optimizer file.
        rolling: replace the rolling checkpoint (KIND_Last.pth) instead of writing an epoch's (KIND_{epoch}_{step}.pth).

    Returns:
        The path of the first network's file.

    Raises:
        RunError: the disk is full.
    """
    paths = checkpoint_paths(folder, [*networks, "Optimizer"], state, rolling=rolling)
    with checkpoint_writer(paths) as write:
        for kind, network in networks.items():
            write(kind, cpu_state_dict(network))
        write("Optimizer", state.to_dict())
    return next(iter(paths.values()))


def checkpoint_paths(folder: Path, kinds: Iterable[str], state: TrainState, *, rolling: bool) -> dict[str, Path]:
    """Return the path of each kind of file. See save_checkpoint() for the arguments."""
    tag = "Last" if rolling else f"{state.epoch}_{state.step}"
    return {kind: folder / f"{kind}_{tag}.pth" for kind in kinds}


@contextmanager
def checkpoint_writer(paths: Mapping[str, Path]) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Yield write(kind, content), which saves one file. The files replace older ones when the block ends.

    The Optimizer file is the last: it records the CRC-32 of the others, so files of two saves are told apart.
    """
    files = list(paths.values())
    with atomic_write_all(files, then=f"continue with --resume_dir={files[0].parent}") as partials:
        partial_of = dict(zip(paths, partials, strict=True))
        crcs: dict[str, str] = {}

        def write(kind: str, content: dict[str, Any]) -> None:
            if kind == "Optimizer":
                content = content | {SIBLINGS: dict(crcs)}
            crcs[kind] = _save_file(partial_of[kind], _to_cpu(content))

        yield write


class _CrcWriter(io.BufferedWriter):
    """A file that computes the CRC-32 of what is written to it."""

    crc = 0

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return super().write(data)


def _save_file(path: Path, content: dict[str, Any]) -> str:
    """Save a file with its CRC-32 in the zip file's comment. Return the CRC-32."""
    # torch.save into an open file puts no file name into the zip file: the same content gives the same bytes.
    with _CrcWriter(io.FileIO(path, "w")) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the error of a full disk
            raise error.__context__ or error from None
        crc = f"{file.crc:08x}"
        file.seek(-2, os.SEEK_END)
        file.write(b"\x0e\0crc32:" + crc.encode())  # the comment, after its length
    return crc


def check_siblings(files: Mapping[str, Path], optimizer_content: Mapping[str, Any]) -> None:
    """Raise DataError if a file was not saved together with the Optimizer file.

    Files of earlier versions, and files that a user changed and saved with torch.save, are not compared.
    """
    for kind, crc in optimizer_content.get(SIBLINGS, {}).items():
        if recorded_crc(files[kind]) not in (crc, None):
            raise DataError(
                f"{files[kind]}: was not saved together with {files['Optimizer'].name}. Take another epoch."
            )


def checkpoint_bytes(networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Return about how many bytes a checkpoint takes. A head that is split over ranks counts as a full one."""
    # The optimizer's buffers have the size of the weights, and exist from the first step on.
    buffers = 2 if "betas" in optimizer.defaults else int(bool(optimizer.defaults.get("momentum")))
    total = 0
    for network in networks.values():
        size = sum(tensor.nbytes for tensor in network.state_dict().values())
        size += buffers * sum(each.nbytes for each in network.parameters() if each.requires_grad)
        if isinstance(network, MarginHead):
            size = size * network.out_features // len(network.rows)
        total += size
    return total


def check_free_space(folder: Path, needed: int, flag: str | None = None) -> None:
    """Raise RunError, or UsageError if `flag` names the folder, unless its disk has `needed` bytes of free space."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        reason = f"a checkpoint takes {needed / 1e6:,.1f} MB, and only {free / 1e6:,.1f} MB of the disk are free"
        if flag:
            raise UsageError(f"{flag}={folder}: {reason}. Free some space, or name another folder.")
        raise RunError(f"{folder}: {reason}. Free some space, and continue with --resume_dir={folder}.")


def check_finite(module: nn.Module, name: str, fix: str = "Lower --lr, or raise --warmup_epochs") -> None:
    """Raise RunError if a weight or a running statistic of `module` is NaN or infinite."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"the {name}'s {key} is no longer finite. {fix}.")


def get_rng_state() -> dict[str, Any]:
    """Return the state of torch's random generators, which dropout uses."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(states: dict[str, Any]) -> None:
    """Restore what get_rng_state() returned. GPUs that the earlier machine did not have keep their state."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
