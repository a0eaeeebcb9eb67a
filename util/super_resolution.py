"""Super resolution networks in use: find a checkpoint, load its network, enlarge images.

file = find_super_resolution("checkpoints_best", scale=4)
network = load_super_resolution(file, 4)
large = enlarge(network, torch.from_numpy(shrink(faces, 28)))      # uint8 in, uint8 out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.super_resolution import RCAN, rcan_from_state_dict
from util.checkpoint.io import load
from util.checkpoint.run_dir import dated_runs, find_network
from util.console import logger
from util.device import prepare_module
from util.errors import DataError


def run_prefix(scale: int) -> str:
    """Return how the names of runs that train a network for this scale begin."""
    return f"SR_x{scale}"


def find_super_resolution(path: str | Path, scale: int, flag: str = "--sr_checkpoint_dir") -> Path:
    """Find a file with a super resolution network.

    Args:
        path: a .pth file; a run's folder, for its best or else newest epoch; or a folder of runs such as
            checkpoints_best, for the newest run for the scale.
        scale: how many times the network enlarges.
        flag: the flag that names `path`, for messages.

    Raises:
        DataError: there is no such file.
    """
    path = Path(path)
    if path.is_file() or any(path.glob("SR_*.pth")):
        return find_network(path, "SR", flag=flag)
    runs = [run for run in dated_runs(path, "SR_*.pth") if run.name.startswith(f"{run_prefix(scale)}_")]
    if runs:
        return find_network(runs[-1], "SR", flag=flag)
    raise DataError(
        f"{flag}={path}: no super resolution network for scale {scale} in it. Train one with `python -m "
        f"applications.super_resolution.train --scale {scale} --data DIR`, or name its file with {flag}."
    )


def load_networks(path: str | Path, scales: Sequence[int], devices: Sequence[torch.device]) -> dict[int, nn.Module]:
    """Load the network for each scale: {scale: network on the devices}. Raise DataError for a missing one."""
    networks = {}
    for scale in scales:
        file = find_super_resolution(path, scale)
        networks[scale] = prepare_module(load_super_resolution(file, scale).requires_grad_(False), devices)
        logger.info(f"super resolution x{scale}: {file}")
    return networks


def load_super_resolution(file: Path, expected_scale: int | None) -> RCAN:
    """Load the network in an SR file, in eval mode.

    Raises:
        DataError: the file holds no RCAN, or one for another scale than `expected_scale` (None: any).
    """
    network = rcan_from_file_state(load(file), file)
    if expected_scale is not None and network.scale != expected_scale:
        raise DataError(
            f"{file}: enlarges {network.scale} times, but scale {expected_scale} is requested. Name a file for scale "
            f"{expected_scale}, or request scale {network.scale}."
        )
    return network


def rcan_from_file_state(state: Mapping[str, Tensor], file: Path) -> RCAN:
    """Build the RCAN of a state dict. Raise DataError, naming the file, for other keys or shapes."""
    try:
        return rcan_from_state_dict(state)
    except ValueError as error:
        raise DataError(f"{file}: not a super resolution network ({error}). Name an SR file.") from None


def to_unit(images: Tensor) -> Tensor:
    """Turn pixels into floats: (N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1].

    These are the inputs of super resolution networks. The result is in channels_last memory order, so the layout is not
    copied.
    """
    return images.permute(0, 3, 1, 2).float().div_(255)


def to_levels(images: Tensor) -> Tensor:
    """Clip to [0, 1] and round to pixels: (N, 3, H, W) float -> (N, H, W, 3) uint8."""
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1)


@torch.inference_mode()
def enlarge(network: nn.Module, images: Tensor) -> Tensor:
    """Enlarge (N, h, w, 3) RGB uint8 to (N, scale * h, scale * w, 3), both on the network's device."""
    return to_levels(network(to_unit(images)))
