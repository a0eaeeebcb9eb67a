"""Save and load the files of a checkpoint: atomic writes, no code execution on load, exact resume.

Backbone, Head and SR files are plain state dicts. Everything else that an exact resume needs is in the Optimizer file.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from model.backbone import backbone_from_state_dict
from util.errors import DataError, RunError
from util.files import atomic_write

CHECKPOINT_FILES = ("Backbone", "Head", "Optimizer")  # of an epoch of recognition training
SR_CHECKPOINT_FILES = ("SR", "Optimizer")  # of an epoch of super-resolution training


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
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class RecognitionState(TrainState):
    """The state of a run that trains a backbone and a head."""

    KEYS: ClassVar = {"best": "best_accuracy", "rng_state": "random_states", "world_size": "ranks"}

    rng_state: dict[str, Any]
    classes: list[str]
    scaler: dict[str, Any] = field(default_factory=dict)  # empty except for fp16
    world_size: int = 1


@dataclass(frozen=True, kw_only=True)
class SuperResolutionState(TrainState):
    """The state of a run that trains a super-resolution network. `data` counts its images and identities."""

    KEYS: ClassVar = {"best": "best_psnr"}

    data: dict[str, int]


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Load the dictionary in a file to the CPU, without executing code that the file may hold.

    Args:
        path: a file that torch.save wrote.
        mmap: read a tensor only when it is used. For callers that need a slice of a large matrix.

    Raises:
        DataError: the file is damaged, would execute code, or holds no dictionary.
    """
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # torch before 1.6 wrote a format that cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: not a checkpoint that can be loaded safely ({reason[:160]}). Take another.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}. A checkpoint holds a dictionary.")
    return content


def load_backbone(file: Path, source: str | None = None) -> tuple[str, nn.Module]:
    """Load a Backbone file as (name, network).

    Raises:
        DataError: the file holds something else. The message starts with `source`, or with the file.
    """
    state = load(file)
    try:
        return backbone_from_state_dict(state)
    except ValueError as error:
        raise DataError(f"{source or file}: not a backbone's state dict ({error}). Give a Backbone file.") from None


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


def save_checkpoint(folder: Path, networks: Mapping[str, nn.Module], state: TrainState) -> Path:
    """Write one file for each network and then the Optimizer file of an epoch.

    Args:
        folder: the run's checkpoint folder.
        networks: {"Backbone": …, "Head": …} or {"SR": …}.
        state: the content of the Optimizer file. It is written last, so an epoch that has one is complete.

    Returns:
        The path of the first network's file.
    """
    files = [save_file(folder, kind, cpu_state_dict(network), state) for kind, network in networks.items()]
    save_file(folder, "Optimizer", state.to_dict(), state)
    return files[0]


def save_file(folder: Path, kind: str, content: dict[str, Any], state: TrainState) -> Path:
    """Write {kind}_{epoch}_{step}.pth atomically, with all tensors on the CPU, and return its path."""
    path = folder / f"{kind}_{state.epoch}_{state.step}.pth"
    with atomic_write(path) as partial:
        torch.save(_to_cpu(content), partial)
    return path


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
