"""Checkpoints of a run whose head is spread over processes: in the files, head and momentum are whole.

So any number of processes, and any other program, can read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from util.checkpoint.io import Resumable, Run, cpu_state_dict, save_part
from util.device import gather_rows_to_main
from util.errors import DataError

if TYPE_CHECKING:
    from model.head import MarginHead


def save_sharded_epoch(
    run: Run, backbone: nn.Module, head: MarginHead, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """As save_epoch; all processes call it, and the first one writes. One matrix is whole at a time.

    `state["optimizer"]` is that of `optimizer`, with the momentum of this process's shard.
    """
    first = torch.distributed.get_rank() == 0
    weight = gather_rows_to_main(head.weight)
    file = run.checkpoints / f"Backbone_{state['epoch']}_{state['step']}.pth"
    if first:
        save_part(run, "Backbone", cpu_state_dict(backbone), state)
        save_part(run, "Head", {"weight": weight}, state)
    del weight
    number = _number_of(head.weight, optimizer)
    saved = state["optimizer"]
    momentum = {
        key: gather_rows_to_main(value) if _is_rows(value, head.weight.shape) else value
        for key, value in saved["state"].get(number, {}).items()
    }
    if first:
        whole = saved | {"state": saved["state"] | ({number: momentum} if momentum else {})}
        save_part(run, "Optimizer", state | {"optimizer": whole}, state)
    return file


def load_shard(head: MarginHead, optimizer: torch.optim.Optimizer, resumed: Resumable) -> None:
    """Loads a process's rows of the head, and the optimizer with their momentum. DataError for another head's file."""
    shape = (head.out_features, head.in_features)
    weight = resumed.head.get("weight")
    if weight is None or tuple(weight.shape) != shape:
        found = "absent" if weight is None else tuple(weight.shape)
        raise DataError(
            f"{resumed.files['Head']}: weight is {found} in the file and {shape} in the network; take another epoch, "
            f"or start a new run without --resume_dir"
        )
    rows = slice(head.rows.start, head.rows.stop)
    with torch.no_grad():
        head.weight.copy_(weight[rows])
    saved, number = resumed.state["optimizer"], _number_of(head.weight, optimizer)
    # Clones: what is read from the disk where it is needed, page by page, is not to become a part of the optimizer.
    entries = {
        position: {
            key: value[rows].clone() if position == number and _is_rows(value, shape) else _cloned(value)
            for key, value in entry.items()
        }
        for position, entry in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": entries})


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_rows(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(shape)


def _number_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> int:
    """The number under which an optimizer's state dict has what belongs to a parameter."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return next(number for number, each in enumerate(parameters) if each is parameter)
