"""Device selection, precision, module wrappers, collectives between ranks, and prefetching of batches."""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from util.cli.types import EVAL_BATCH_CPU, EVAL_BATCH_GPU
from util.console import logger
from util.errors import UsageError

Batch = tuple[torch.Tensor, torch.Tensor]  # images and labels

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ROWS_PER_MESSAGE = 2**16  # of a matrix that one rank sends to another
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h of glibc


# Devices


def select_devices(gpu_num: Sequence[int]) -> list[torch.device]:
    """Return the devices for --gpu_num; the first one holds the head.

    An empty list means the CPU. A machine without CUDA prints a warning and uses the CPU.

    Raises:
        UsageError: a GPU does not exist. The message lists the GPUs of the machine.
    """
    if gpu_num and not torch.cuda.is_available():
        logger.warning(f"warning: no CUDA on this machine; --gpu_num={list(gpu_num)} runs on the CPU")
    if not gpu_num or not torch.cuda.is_available():
        keep_freed_memory()
        return [torch.device("cpu")]
    count = torch.cuda.device_count()
    for index in gpu_num:
        if index >= count:
            names = ", ".join(f"{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
            raise UsageError(f"--gpu_num={list(gpu_num)}: there is no GPU {index} here. Choose from: {names}.")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape, so the search for the fastest kernel pays
    torch.cuda.set_device(gpu_num[0])  # allocations without a device number, like pinned memory, then leave GPU 0 alone
    return [torch.device("cuda", index) for index in gpu_num]


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next operation, where it is glibc (Linux).

    Torch frees each intermediate result on the CPU. By default glibc gives every large one back to the kernel, which
    clears the pages of the next one again: a third of the time of an evaluation.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # never allocate outside the heap
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # never shrink the heap


def use_deterministic_algorithms() -> None:
    """Make every operation give the same bits again, where torch can. On a GPU this costs speed.

    Operations without such an algorithm print a warning.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for this
    torch.backends.cudnn.benchmark = False  # the search may choose another algorithm in each run
    torch.use_deterministic_algorithms(True, warn_only=True)


def num_cpus() -> int:
    """Return how many CPU cores this process may use: on a cluster fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_num_workers(devices: Sequence[torch.device], cores: int) -> int:
    """Return the number of loader processes for a run without --num_workers."""
    if devices[0].type == "cpu":  # the network needs the cores
        return max(1, min(4, cores // 4))
    return max(1, min(8, cores - 1))


def default_eval_batch_size(devices: Sequence[torch.device]) -> int:
    """Return the batch size for evaluation, which keeps no gradients and so has its own size."""
    return EVAL_BATCH_CPU if devices[0].type == "cpu" else EVAL_BATCH_GPU * len(devices)


# Precision


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for --precision on a device.

    `auto` is bf16 on a GPU with bf16 instructions, and float32 elsewhere. bf16 on a CPU without them prints a warning.

    Raises:
        UsageError: fp16 on a CPU, which is slow, or bf16 on a GPU that would emulate it.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if on_gpu and has_bf16 else torch.float32
    if precision == "fp16" and not on_gpu:
        raise UsageError("--precision=fp16: is for GPUs. Use fp32 or bf16 on a CPU, or leave it out.")
    if precision == "bf16" and not has_bf16:
        raise UsageError("--precision=bf16: this GPU has no instructions for it. Use fp16 or fp32, or leave it out.")
    if precision == "bf16" and not on_gpu:
        capabilities = cpu_capabilities()
        known = [capabilities[name] for name in ("avx512_bf16", "amx_bf16", "bf16") if name in capabilities]
        if known and not any(known):
            logger.warning("warning: --precision=bf16: this CPU has no instructions for it, and is faster in fp32")
    return _DTYPES[precision]


def cpu_capabilities() -> Mapping[str, Any]:
    """Return the CPU features that torch reports, by name; empty for versions of torch without this API."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def autocast_module(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Wrap a network so that it computes in `dtype` where autocast allows, with float32 weights and float32 output."""
    return network if dtype == torch.float32 else _AutocastModule(network, dtype)


class _AutocastModule(nn.Module):
    """Autocast inside the module, not around the call: the threads of DataParallel would use the default dtype."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self._network = network
        self._dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, self._dtype):
            return self._network(images).float()


def grad_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Return a scaler that keeps small gradients above the smallest number of fp16; for other dtypes it is disabled."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


# Module wrappers


def prepare_module(
    backbone: nn.Module,
    devices: Sequence[torch.device],
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Move a network to its device and wrap it for execution.

    The parameters stay those of `backbone`, which is the module to save. The head is never wrapped: neither its weights
    nor its logits travel between GPUs.

    Args:
        backbone: the network; it is moved in place.
        devices: with several devices, each one gets a copy of the network at every step (DataParallel).
        compiled: wrap in torch.compile.
        dtype: the type of the computation, see `autocast_module`.

    Returns:
        The module to call; `backbone` itself if no wrapper is needed.
    """
    # The layout in which pixels arrive. Without it a CPU spends most of a step on reordering them.
    backbone.to(devices[0], memory_format=torch.channels_last)  # type: ignore[call-overload]
    runner = autocast_module(backbone, dtype)
    if compiled:
        runner = torch.compile(runner)  # type: ignore[assignment]
    return runner if len(devices) == 1 else nn.DataParallel(runner, device_ids=list(devices))


def wrap_ddp(runner: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module in DistributedDataParallel: backward averages the gradients over the ranks.

    The running statistics of batch norm stay local to each rank until `average_buffers`.
    """
    device_ids = [device] if device.type == "cuda" else None
    wrapper = nn.parallel.DistributedDataParallel
    # torch 2.13 renamed the flag and warns about the old name.
    names = ("forward_sync_buffers", "broadcast_buffers")
    sync = next(name for name in names if name in signature(wrapper).parameters)
    return wrapper(runner, device_ids=device_ids, gradient_as_bucket_view=True, **{sync: False})  # type: ignore[arg-type]


# Collectives: every rank has to call them


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Replace the running statistics on each rank by their mean over the ranks. Counters are equal already."""
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    averages = flat.split([buffer.numel() for buffer in buffers])
    for buffer, average in zip(buffers, averages, strict=True):
        buffer.copy_(average.view_as(buffer))


def sum_over_ranks(count: int, device: torch.device) -> int:
    """Return the sum of a number over the ranks, or the number itself in a single process."""
    if not dist.is_initialized():
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)


@torch.no_grad()
def gather_rows_to_main(shard: torch.Tensor) -> torch.Tensor | None:
    """Gather row shards from all ranks into one CPU tensor on rank 0, in the order of the ranks.

    Rank 0 never holds a second copy of a shard. Shards may have different numbers of rows.

    Returns:
        The full tensor on rank 0, None on the other ranks.
    """
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, len(shard))
    if dist.get_rank() > 0:
        for rows in shard.split(_ROWS_PER_MESSAGE):
            dist.send(rows.cpu().contiguous(), dst=0)
        return None
    full = torch.empty(sum(sizes), *shard.shape[1:], dtype=shard.dtype)
    shards = full.split(sizes)  # views
    shards[0].copy_(shard)
    for rank, target in enumerate(shards[1:], 1):
        for rows in target.split(_ROWS_PER_MESSAGE):
            dist.recv(rows, src=rank)
    return full


# Batches


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Move batches to the device, each copy overlapping with the step before it.

    Python queues the work of a step on a GPU and continues at once. The next batch is then copied on a separate CUDA
    stream while that step computes. The batches must be in pinned memory: a copy from other memory waits.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    copy_stream = torch.cuda.Stream(device)
    compute_stream = torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copy_stream):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        compute_stream.wait_stream(copy_stream)
        for tensor in (images, labels):
            tensor.record_stream(compute_stream)  # else the allocator could reuse its memory while the step reads it
        yield images, labels
