"""Where the networks run: device numbers become devices and wrappers, and what processes hold becomes one."""

import os
from collections.abc import Sequence
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn

from util.conversions import JUDGED_ON_CPU, JUDGED_ON_GPU
from util.errors import UsageError
from util.precision import in_precision

_ROWS_AT_ONCE = 2**16  # of a matrix that travels


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


def judged_together(devices: Sequence[torch.device]) -> int:
    """Images in a batch of a validation for which no size is given; training's would be too small or too large."""
    return JUDGED_ON_CPU if devices[0].type == "cpu" else JUDGED_ON_GPU * len(devices)


def on_every_rank(runner: nn.Module, device: torch.device) -> nn.Module:
    """What wrap() gives, in each process of torch.distributed: backward leaves the mean of their gradients in all.

    Batch norm's running statistics are each process's own until average_buffers().
    """
    device_ids = [device] if device.type == "cuda" else None
    wrapper = nn.parallel.DistributedDataParallel
    # torch 2.13 renamed the flag, and warns of the old name.
    names = ("forward_sync_buffers", "broadcast_buffers")
    sync = next(name for name in names if name in signature(wrapper).parameters)
    return wrapper(runner, device_ids=device_ids, gradient_as_bucket_view=True, **{sync: False})


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """The mean of the running statistics over the processes, in each; counters agree as they are."""
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if buffers:
        together = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        parts = together.split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def merged(shard: torch.Tensor) -> torch.Tensor | None:
    """The shards of all processes, one below the other in the order of the ranks, on the CPU of the first one.

    The others, which have to call this too, get None. The first one holds the whole and no second copy of any part.
    """
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, len(shard))
    if dist.get_rank():
        for part in shard.split(_ROWS_AT_ONCE):
            dist.send(part.cpu().contiguous(), dst=0)
        return None
    whole = torch.empty(sum(sizes), *shard.shape[1:], dtype=shard.dtype)
    places = whole.split(sizes)
    places[0].copy_(shard)
    for rank, place in enumerate(places[1:], 1):
        for part in place.split(_ROWS_AT_ONCE):
            dist.recv(part, src=rank)
    return whole
