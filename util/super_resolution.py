"""Checkpoints of super resolution: which file is meant, and the network in it.

file = find_super_resolution("checkpoints_best", scale=4)
network = load_super_resolution(file, 4, load_rcan)      # load_rcan of model.super_resolution
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from util.checkpoint import dated_runs, find_network, load
from util.errors import DataError

if TYPE_CHECKING:
    from model.super_resolution import RCAN


def run_prefix(scale: int) -> str:
    """How the names of runs that train a network for this scale begin."""
    return f"SR_x{scale}"


def find_super_resolution(path: str | Path, scale: int, flag: str = "--sr_checkpoint_dir") -> Path:
    """The SR file meant by `path`: a .pth file; a run's best, or else newest, epoch; or the best of a folder's runs.

    The run of such a folder, like checkpoints_best, is the newest one for the scale. DataError, which names `flag`,
    where there is none.
    """
    path = Path(path)
    if path.is_file() or any(path.glob("SR_*.pth")):
        return find_network(path, "SR", flag=flag)
    if runs := [run for run in dated_runs(path, "SR_*.pth") if run.name.startswith(f"{run_prefix(scale)}_")]:
        return find_network(runs[-1], "SR", flag=flag)
    raise DataError(
        f"{flag}={path}: no super resolution network for scale {scale} in it; train one with `python -m "
        f"applications.super_resolution.train --scale {scale} --data DIR`, or name its file with {flag}"
    )


def load_super_resolution(
    file: Path, expected_scale: int | None, build: Callable[[Mapping[str, Tensor]], RCAN]
) -> RCAN:
    """The network in an SR file, in eval mode. `build` makes it from its state dict: model.super_resolution.load_rcan.

    Raises DataError for a file that holds no RCAN, or one for another scale than the expected one (None: any).
    """
    try:
        network = build(load(file))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: not a super resolution network ({error}); name an SR file") from None
    if expected_scale is not None and network.scale != expected_scale:
        raise DataError(
            f"{file}: enlarges {network.scale} times, and scale {expected_scale} is wanted; name a file for scale "
            f"{expected_scale}, or ask for scale {network.scale}"
        )
    return network
