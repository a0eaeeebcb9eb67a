"""What the backbone computes in. Weights, embeddings, logits, margin and loss are float32 whatever it is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from util.errors import UsageError

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_for(precision: str, device: torch.device) -> torch.dtype:
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


def in_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
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
