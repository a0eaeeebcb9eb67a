import pytest
import torch
from torch import nn

from model.backbone import build_backbone
from util import device as precision
from util.device import autocast_module, loss_scaler, prepare_module, resolve_dtype
from util.errors import UsageError

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_cpu_computes_in_float32_unless_bf16_is_asked_for(name, dtype):
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
def test_a_cpu_that_would_emulate_bf16_is_warned_of(monkeypatch, capsys, capabilities, warned):
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: capabilities)
    assert resolve_dtype("bf16", CPU) == torch.bfloat16
    assert ("warning: --precision=bf16: this CPU has no instructions" in capsys.readouterr().out) == warned
    resolve_dtype("auto", CPU)
    assert capsys.readouterr().out == ""


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match=r"^--precision=fp16: is for GPUs; take fp32 or bf16"):
        resolve_dtype("fp16", CPU)


@needs_gpu
def test_auto_is_bf16_on_a_gpu_that_has_it():
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == expected


def test_float32_needs_no_wrapper():
    network = nn.Linear(2, 2)
    assert autocast_module(network, torch.float32) is network


def test_layers_compute_in_bf16_while_weights_and_output_stay_float32():
    network, seen = nn.Linear(8, 4), []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    out = autocast_module(network, torch.bfloat16)(torch.randn(2, 8))
    assert (seen, out.dtype, network.weight.dtype) == ([torch.bfloat16], torch.float32, torch.float32)
    out.sum().backward()
    assert network.weight.grad.dtype == torch.float32


def test_each_of_several_devices_computes_in_the_type_that_was_asked_for():
    network, seen = nn.Linear(8, 4), []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    wrapped = prepare_module(network, [CPU], dtype=torch.bfloat16)
    with torch.autocast("cpu", enabled=False):  # as a thread of DataParallel sees it
        wrapped(torch.randn(2, 8))
    assert seen == [torch.bfloat16]


def test_embeddings_in_bf16_point_where_those_in_float32_do():
    torch.manual_seed(0)
    network = build_backbone("MobileFaceNet_025").eval()
    images = torch.rand(4, 3, 112, 112) * 2 - 1
    with torch.inference_mode():
        exact, coarse = network(images), autocast_module(network, torch.bfloat16)(images)
    assert nn.functional.cosine_similarity(exact, coarse).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_fp16_has_its_loss_scaled(dtype):
    assert loss_scaler(dtype, CPU).is_enabled() == (dtype == torch.float16)
