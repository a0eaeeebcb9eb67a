"""Where the networks run: the one place that turns device numbers into devices and wrappers."""

import os
from collections.abc import Sequence

import torch
from torch import nn

from util.errors import UsageError
from util.precision import in_precision


def select_devices(gpu_num: Sequence[int]) -> list[torch.device]:
    """The devices for --gpu_num (empty: the CPU), the first of which holds the head. Without CUDA, the CPU is taken.

    Raises UsageError, listing the GPUs there are, if one does not exist.
    """
    if not gpu_num:
        return [torch.device("cpu")]
    if not torch.cuda.is_available():
        print(f"warning: no CUDA on this machine; --gpu_num={list(gpu_num)} runs on the CPU", flush=True)
        return [torch.device("cpu")]
    count = torch.cuda.device_count()
    for index in gpu_num:
        if index >= count:
            names = ", ".join(f"{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
            raise UsageError(f"--gpu_num={list(gpu_num)}: there is no GPU {index} here; there are: {names}")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape: the search for the fastest way pays
    torch.cuda.set_device(gpu_num[0])  # what names no device, like pinned memory, then leaves GPU 0 alone
    return [torch.device("cuda", index) for index in gpu_num]


def wrap(
    backbone: nn.Module,
    devices: Sequence[torch.device],
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The backbone as it is run: moved to its device, computing in `dtype` (see util.precision), compiled if wanted;
    several devices each get a copy at every step.

    Nothing else is wrapped: neither the head's weights nor its logits travel between GPUs. The parameters stay those of
    `backbone`, which is the one to save.
    """
    # The layout in which pixels arrive; without it a CPU spends most of a step on shuffling them.
    backbone.to(devices[0], memory_format=torch.channels_last)
    runner = in_precision(backbone, dtype)
    runner = torch.compile(runner) if compiled else runner
    return runner if len(devices) == 1 else nn.DataParallel(runner, device_ids=list(devices))


def available_cores() -> int:
    """The cores that this process may use: on a cluster fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(devices: Sequence[torch.device], cores: int) -> int:
    """Loader processes where --num_workers is not given: on a CPU the network needs the cores, on a GPU it does not."""
    return max(1, min(4, cores // 4)) if devices[0].type == "cpu" else max(1, min(8, cores - 1))
