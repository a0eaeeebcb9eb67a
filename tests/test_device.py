"""Device selection, precision, module wrappers and prefetching."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from model.backbone import build_backbone
from util import device as device_module
from util.cli.types import EVAL_BATCH_DEFAULTS
from util.device import (
    autocast_module,
    default_eval_batch_size,
    default_num_workers,
    grad_scaler,
    prefetch_to_device,
    prepare_module,
    resolve_dtype,
    select_devices,
)
from util.errors import UsageError

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def fake_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Model {index}")


def test_select_devices_warns_without_cuda(monkeypatch, capsys):
    fake_gpus(monkeypatch, 0)
    assert select_devices([0, 1]) == [CPU]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: no CUDA") and "--gpu_num=[0, 1]" in line


@pytest.mark.parametrize("gpus", [0, 2])
def test_select_devices_returns_the_cpu_without_a_warning(monkeypatch, capsys, gpus):
    fake_gpus(monkeypatch, gpus)
    assert select_devices([]) == [CPU]
    assert capsys.readouterr() == ("", "")


def test_select_devices_keeps_the_order_of_gpu_num(monkeypatch, capsys):
    fake_gpus(monkeypatch, 3)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert select_devices((2, 0)) == [torch.device("cuda", 2), torch.device("cuda", 0)]
    assert current == [2]  # GPU 0 gets nothing that belongs to the first one
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("gpu_num", [[2], [0, 5]])
def test_select_devices_lists_the_gpus_for_a_wrong_number(monkeypatch, gpu_num):
    fake_gpus(monkeypatch, 2)
    with pytest.raises(UsageError, match=rf"there is no GPU {gpu_num[-1]} here.*0 \(Model 0\), 1 \(Model 1\)"):
        select_devices(gpu_num)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_prepare_module_adds_no_wrapper_for_one_device():
    backbone = network()
    assert prepare_module(backbone, [CPU]) is backbone


def test_prepare_module_shares_the_parameters(monkeypatch):
    class Recorded(nn.Module):
        def __init__(self, module, device_ids):
            super().__init__()
            self.module, self.device_ids = module, device_ids

    monkeypatch.setattr(nn, "DataParallel", Recorded)
    backbone = network()
    wrapped = prepare_module(backbone, [CPU, CPU])
    assert isinstance(wrapped, Recorded) and wrapped.device_ids == [CPU, CPU]
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in backbone.parameters()]


def test_prepare_module_changes_no_result():
    images = torch.rand(4, 3, 8, 8)
    expected = network()(images)
    torch.testing.assert_close(prepare_module(network(), [CPU])(images), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_prepare_module_on_two_gpus_equals_one():
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).cuda(0)
    alone, shared = network(), copy.deepcopy(network())
    outputs = []
    for backbone, gpus in ((alone, [0]), (shared, [0, 1])):
        out = prepare_module(backbone, select_devices(gpus))(images)
        assert out.device == torch.device("cuda", 0)
        out.square().mean().backward()
        outputs.append(out.detach())
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    for one, two in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "cores", "workers"), [("cpu", 2, 1), ("cpu", 64, 4), ("cuda", 1, 1), ("cuda", 8, 7)]
)
def test_default_num_workers_leaves_cores_to_the_network(device, cores, workers):
    assert default_num_workers([torch.device(device)], cores) == workers


def test_default_eval_batch_size_depends_on_the_devices():
    gpus = [torch.device("cuda", index) for index in range(3)]
    assert (
        default_eval_batch_size([CPU]),
        default_eval_batch_size(gpus[:1]),
        default_eval_batch_size(gpus),
    ) == (64, 128, 384)
    assert EVAL_BATCH_DEFAULTS == "64 on the CPU, 128 on each GPU"


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_resolve_dtype_on_a_cpu(name, dtype):
    assert resolve_dtype(name, CPU) == dtype


@pytest.mark.parametrize(
    ("capabilities", "warned"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, False),
        ({}, False),
    ],
)
def test_resolve_dtype_warns_of_a_cpu_without_bf16(monkeypatch, capsys, capabilities, warned):
    monkeypatch.setattr(device_module, "cpu_capabilities", lambda: capabilities)
    assert resolve_dtype("bf16", CPU) == torch.bfloat16
    assert ("warning: --precision=bf16: this CPU has no instructions" in capsys.readouterr().out) == warned
    resolve_dtype("auto", CPU)
    assert capsys.readouterr().out == ""


def test_resolve_dtype_refuses_fp16_on_a_cpu():
    with pytest.raises(UsageError, match=r"^--precision=fp16: is for GPUs\. Use fp32 or bf16"):
        resolve_dtype("fp16", CPU)


@needs_gpu
def test_resolve_dtype_auto_is_bf16_on_a_gpu_with_bf16():
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == expected


def test_autocast_module_adds_no_wrapper_for_float32():
    network = nn.Linear(2, 2)
    assert autocast_module(network, torch.float32) is network


def test_autocast_module_keeps_weights_and_output_in_float32():
    network, seen = nn.Linear(8, 4), []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    out = autocast_module(network, torch.bfloat16)(torch.randn(2, 8))
    assert (seen, out.dtype, network.weight.dtype) == ([torch.bfloat16], torch.float32, torch.float32)
    out.sum().backward()
    assert network.weight.grad.dtype == torch.float32


def test_prepare_module_computes_in_dtype_in_any_thread():
    network, seen = nn.Linear(8, 4), []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    wrapped = prepare_module(network, [CPU], dtype=torch.bfloat16)
    with torch.autocast("cpu", enabled=False):  # as a thread of DataParallel sees it
        wrapped(torch.randn(2, 8))
    assert seen == [torch.bfloat16]


def test_autocast_module_bf16_embeddings_match_float32():
    torch.manual_seed(0)
    network = build_backbone("MobileFaceNet_025").eval()
    images = torch.rand(4, 3, 112, 112) * 2 - 1
    with torch.inference_mode():
        exact, coarse = network(images), autocast_module(network, torch.bfloat16)(images)
    assert nn.functional.cosine_similarity(exact, coarse).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_scaler_is_enabled_for_fp16_only(dtype):
    assert grad_scaler(dtype, CPU).is_enabled() == (dtype == torch.float16)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full((4, 8, 8, 3), index, dtype=torch.uint8), torch.full((4,), index)) for index in range(count)]


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_prefetch_to_device_keeps_all_batches_in_order(name, count):
    arrived = list(prefetch_to_device(batches(count), torch.device(name)))
    assert [(images.unique().tolist(), labels.unique().tolist()) for images, labels in arrived] == [
        ([index], [index]) for index in range(count)
    ]
    assert {tensor.device.type for batch in arrived for tensor in batch} <= {name}


def test_prefetch_to_device_reads_one_batch_at_a_time():
    requested = []

    def recorded():
        for index, batch in enumerate(batches(3)):
            requested.append(index)
            yield batch

    for index, _ in enumerate(prefetch_to_device(recorded(), CPU)):
        assert requested == list(range(index + 1))


PAGE_FAULTS = """
import ctypes
import resource
import torch
from util.device import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would be 512 times as few

def page_faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)  # 64 MiB: 16,384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = page_faults(20)
keep_freed_memory()
page_faults(20)  # glibc sets the remainder of each of the first blocks aside
print(returned, page_faults(20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc on Linux gives memory back to the kernel")
def test_keep_freed_memory_reuses_the_same_pages():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PAGE_FAULTS]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    returned, kept = map(int, done.stdout.split())
    assert returned > 20 * 10_000
    assert kept < 100
