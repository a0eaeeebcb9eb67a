import copy

import pytest
import torch
from torch import nn

from util.cli.types import EVAL_BATCH_DEFAULTS
from util.device import default_eval_batch_size, default_num_workers, prepare_module, select_devices
from util.errors import UsageError


def fake_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Model {index}")


def test_without_cuda_one_line_warns_and_the_cpu_is_taken(monkeypatch, capsys):
    fake_gpus(monkeypatch, 0)
    assert select_devices([0, 1]) == [torch.device("cpu")]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: no CUDA") and "--gpu_num=[0, 1]" in line


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_cpu_is_taken_silently_where_it_is_asked_for(monkeypatch, capsys, gpus):
    fake_gpus(monkeypatch, gpus)
    assert select_devices([]) == [torch.device("cpu")]
    assert capsys.readouterr() == ("", "")


def test_gpus_come_in_the_order_in_which_they_are_listed(monkeypatch, capsys):
    fake_gpus(monkeypatch, 3)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert select_devices((2, 0)) == [torch.device("cuda", 2), torch.device("cuda", 0)]
    assert current == [2]  # GPU 0 gets nothing that belongs to the first one
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("gpu_num", [[2], [0, 5]])
def test_a_gpu_that_is_not_there_is_an_error_that_lists_those_that_are(monkeypatch, gpu_num):
    fake_gpus(monkeypatch, 2)
    with pytest.raises(UsageError, match=rf"there is no GPU {gpu_num[-1]} here.*0 \(Model 0\), 1 \(Model 1\)"):
        select_devices(gpu_num)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_one_device_needs_no_wrapper():
    backbone = network()
    assert prepare_module(backbone, [torch.device("cpu")]) is backbone


def test_a_wrapped_backbone_shares_its_parameters(monkeypatch):
    class Recorded(nn.Module):
        def __init__(self, module, device_ids):
            super().__init__()
            self.module, self.device_ids = module, device_ids

    monkeypatch.setattr(nn, "DataParallel", Recorded)
    backbone, cpu = network(), torch.device("cpu")
    wrapped = prepare_module(backbone, [cpu, cpu])
    assert isinstance(wrapped, Recorded) and wrapped.device_ids == [cpu, cpu]
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in backbone.parameters()]


def test_channels_last_changes_no_result():
    images = torch.rand(4, 3, 8, 8)
    expected = network()(images)
    torch.testing.assert_close(prepare_module(network(), [torch.device("cpu")])(images), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives():
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
def test_loader_processes_leave_the_cores_to_whom_they_belong(device, cores, workers):
    assert default_num_workers([torch.device(device)], cores) == workers


def test_a_validation_has_a_batch_size_of_its_own():
    gpus = [torch.device("cuda", index) for index in range(3)]
    assert (
        default_eval_batch_size([torch.device("cpu")]),
        default_eval_batch_size(gpus[:1]),
        default_eval_batch_size(gpus),
    ) == (64, 128, 384)
    assert EVAL_BATCH_DEFAULTS == "64 on the CPU, 128 on each GPU"
