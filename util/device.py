"""Where the networks run: device numbers become devices and wrappers, and what processes hold becomes one."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from util.cli.types import EVAL_BATCH_CPU, EVAL_BATCH_GPU
from util.errors import UsageError

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


def prepare_module(
    backbone: nn.Module,
    devices: Sequence[torch.device],
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The backbone as it is run: moved to its device, computing in `dtype` (see util.device), compiled if wanted;
    several devices each get a copy at every step.

    Nothing else is wrapped: neither the head's weights nor its logits travel between GPUs. The parameters stay those of
    `backbone`, which is the one to save.
    """
    # The layout in which pixels arrive; without it a CPU spends most of a step on shuffling them.
    backbone.to(devices[0], memory_format=torch.channels_last)
    runner = autocast_module(backbone, dtype)
    runner = torch.compile(runner) if compiled else runner
    return runner if len(devices) == 1 else nn.DataParallel(runner, device_ids=list(devices))


def num_cpus() -> int:
    """The cores that this process may use: on a cluster fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_num_workers(devices: Sequence[torch.device], cores: int) -> int:
    """Loader processes where --num_workers is not given: on a CPU the network needs the cores, on a GPU it does not."""
    return max(1, min(4, cores // 4)) if devices[0].type == "cpu" else max(1, min(8, cores - 1))


def default_eval_batch_size(devices: Sequence[torch.device]) -> int:
    """Images in a batch of a validation for which no size is given; training's would be too small or too large."""
    return EVAL_BATCH_CPU if devices[0].type == "cpu" else EVAL_BATCH_GPU * len(devices)


def wrap_ddp(runner: nn.Module, device: torch.device) -> nn.Module:
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
def gather_rows_to_main(shard: torch.Tensor) -> torch.Tensor | None:
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


# --- Precision.

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type for --precision on a device; `auto` is bf16 on a GPU that computes in it, and float32 elsewhere.

    Raises UsageError for fp16 on a CPU, which is slow in it, and for bf16 on a GPU that would emulate it. A CPU that
    would is warned of.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if on_gpu and has_bf16 else torch.float32
    if precision == "fp16" and not on_gpu:
        raise UsageError("--precision=fp16: is for GPUs; take fp32 or bf16 on a CPU, or leave it out")
    if precision == "bf16" and not has_bf16:
        raise UsageError("--precision=bf16: this GPU does not compute in it; take fp16 or fp32, or leave it out")
    if precision == "bf16" and not on_gpu and _lacks_bf16(cpu_capabilities()):
        print("warning: --precision=bf16: this CPU has no instructions for it, and is faster in fp32", flush=True)
    return _TYPES[precision]


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of this CPU, by name; nothing, if it is a torch that does not look."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _lacks_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU, of x86 or of ARM, is known to have no instructions for it."""
    known = [capabilities[name] for name in ("avx512_bf16", "amx_bf16", "bf16") if name in capabilities]
    return bool(known) and not any(known)


def autocast_module(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network, computing in `dtype` where that is safe (autocast), with float32 weights and output."""
    return network if dtype == torch.float32 else _InPrecision(network, dtype)


class _InPrecision(nn.Module):
    """Autocast inside the module and not around the call: DataParallel's threads would take the default type."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self._network, self._dtype = network, dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, self._dtype):
            return self._network(images).float()


def loss_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Keeps small gradients above the smallest number of fp16; with any other type it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


# --- Batches on their way to the device.

Batch = tuple[torch.Tensor, torch.Tensor]


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on the device.

    A GPU works off what it is given while Python is already here again: the next batch is copied on a stream of its
    own, beside the step before it, and not after it. That needs batches in pinned memory; from other memory each copy
    waits. Nothing else here waits for the GPU.
    """
    if device.type != "cuda":
        yield from ((images.to(device), labels.to(device)) for images, labels in batches)
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        computing.wait_stream(copying)
        for tensor in (images, labels):
            tensor.record_stream(computing)  # else its memory would be given away while the step reads it
        yield images, labels
