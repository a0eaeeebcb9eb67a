"""Checkpoints of a run whose head is split over ranks. The files hold the full head and its full momentum.

Any number of ranks, and any other program, can therefore read them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from util.checkpoint.io import (
    AVERAGE_FILE,
    CHECKPOINT_FILES,
    RecognitionState,
    checkpoint_paths,
    checkpoint_writer,
    cpu_state_dict,
)
from util.checkpoint.run_dir import Resumable
from util.device import gather_rows_to_main
from util.errors import DataError

if TYPE_CHECKING:
    from model.head import MarginHead


def save_sharded_checkpoint(
    folder: Path,
    backbone: nn.Module,
    head: MarginHead,
    *,
    optimizer: torch.optim.Optimizer,
    state: RecognitionState,
    rolling: bool = False,
    average: nn.Module | None = None,
) -> Path:
    """Save a checkpoint like save_checkpoint(). Collective: all ranks call it, and rank 0 writes.

    Args:
        folder: the run's checkpoint folder.
        backbone: the same on all ranks.
        head: this rank's rows. Rank 0 gathers one full matrix at a time.
        optimizer: has the momentum of this rank's rows.
        state: `state.optimizer` is the state dict of `optimizer`.
        rolling: see save_checkpoint().
        average: average of the weights of the backbone, the same on all ranks.

    Returns:
        The path of the Backbone file, on every rank.
    """
    is_main = torch.distributed.get_rank() == 0
    index = _index_of(head.weight, optimizer)
    entries = dict(state.optimizer["state"])
    kinds = CHECKPOINT_FILES if average is None else (*CHECKPOINT_FILES, AVERAGE_FILE)
    paths = checkpoint_paths(folder, kinds, state, rolling=rolling)
    with checkpoint_writer(paths) if is_main else nullcontext() as write:
        weight = gather_rows_to_main(head.weight)
        if write:
            write("Backbone", cpu_state_dict(backbone))
            if average is not None:
                write(AVERAGE_FILE, cpu_state_dict(average))
            write("Head", {"weight": weight} | dict(head.named_buffers()))
        del weight  # before the momentum, which is as large
        if index in entries:
            entries[index] = {
                key: gather_rows_to_main(value) if _has_shape(value, head.weight.shape) else value
                for key, value in entries[index].items()
            }
        if write:
            write("Optimizer", replace(state, optimizer=state.optimizer | {"state": entries}).to_dict())
    return paths["Backbone"]


def load_shard(head: MarginHead, optimizer: torch.optim.Optimizer, resumed: Resumable) -> None:
    """Load this rank's rows of the head, and the optimizer with their momentum.

    Args:
        head: its `rows` say which rows are this rank's.
        optimizer: of the backbone and the head.
        resumed: files with the full head, loaded with mmap so that only these rows are read.

    Raises:
        DataError: the file is from a head of another size.
    """
    saved_head = resumed.networks["Head"]
    shape = (head.out_features, *head.weight.shape[1:])
    shapes = {"weight": shape} | {name: tuple(buffer.shape) for name, buffer in head.named_buffers()}
    for name, expected in shapes.items():
        if not _has_shape(saved_head.get(name), expected):
            found = tuple(saved_head[name].shape) if name in saved_head else "absent"
            raise DataError(
                f"{resumed.files['Head']}: {name} is {found} in the file and {expected} in the network. Take another "
                f"epoch, or start a new run without --resume_dir."
            )
    rows = slice(head.rows.start, head.rows.stop)
    with torch.no_grad():
        head.weight.copy_(saved_head["weight"][rows])
        for name, buffer in head.named_buffers():
            buffer.copy_(saved_head[name])

    # Clone everything: the optimizer must not keep tensors that are read from the file page by page.
    saved = resumed.state.optimizer
    index = _index_of(head.weight, optimizer)
    entries: dict[int, dict[str, Any]] = {}
    for position, entry in saved["state"].items():
        entries[position] = {}
        for key, value in entry.items():
            if position == index and _has_shape(value, shape):
                value = value[rows]
            entries[position][key] = value.clone() if isinstance(value, torch.Tensor) else value
    optimizer.load_state_dict(saved | {"state": entries})


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(shape)


def _index_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> int:
    """Return the index under which an optimizer's state dict has the entry of a parameter."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return next(index for index, each in enumerate(parameters) if each is parameter)
