import copy
import math

import pytest
import torch
from torch import nn

from util.training.optim import Schedule, build_sgd, parameter_groups, ramp_at


def networks() -> tuple[nn.Module, nn.Module]:
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    )
    return backbone, nn.Linear(6, 5, bias=False)


def test_parameter_groups_spare_batch_norm_weight_decay():
    backbone, head = networks()
    decayed, spared = parameter_groups([backbone, head], 5e-4)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    norms = [backbone[1].weight, backbone[1].bias, backbone[3][1].weight, backbone[3][1].bias]
    assert [id(p) for p in spared["params"]] == [id(p) for p in norms]
    everything = {id(p) for p in [*backbone.parameters(), *head.parameters()]}
    assert {id(p) for p in decayed["params"]} == everything - {id(p) for p in norms}
    assert len(decayed["params"]) == len(everything) - len(norms)


def test_parameter_groups_skip_frozen_parameters():
    backbone, head = networks()
    backbone[0].weight.requires_grad_(False)
    backbone[1].bias.requires_grad_(False)
    found = {id(p) for group in parameter_groups([backbone, head], 0.1) for p in group["params"]}
    assert found == {id(p) for p in [*backbone.parameters(), *head.parameters()] if p.requires_grad}


def test_weight_decay_shrinks_all_but_batch_norm():
    backbone, head = networks()
    optimizer = torch.optim.SGD(parameter_groups([backbone, head], 0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    for parameter in backbone.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in backbone.named_parameters():
        factor = 1.0 if name in ("1.weight", "1.bias", "3.1.weight", "3.1.bias") else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sgd_is_fused_except_for_fp16(dtype):
    optimizer = build_sgd(networks(), 0.1, 0.9, 5e-4, dtype)
    assert {group["fused"] for group in optimizer.param_groups} == {dtype != torch.float16}


def test_backbone_has_groups_with_a_rate_of_its_own():
    backbone, head = networks()
    plain = build_sgd((backbone, head), 0.1, 0.9, 5e-4)
    split = build_sgd((backbone, head), 0.1, 0.9, 5e-4, backbone_lr=0.2)
    flat = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (plain, split)]
    assert flat[0] == flat[1] and len(plain.param_groups) == 2
    of_backbone = {id(p) for p in backbone.parameters()}
    for group in split.param_groups:
        owners = {id(p) in of_backbone for p in group["params"]}
        assert owners == {group.get("lr_factor") == 0.2}
        assert group["lr"] == pytest.approx(0.02 if owners == {True} else 0.1)
    assert [group["weight_decay"] for group in split.param_groups] == [5e-4, 5e-4, 0.0]


def test_sgd_overflow_in_the_first_step_leaves_no_momentum():
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    spared = copy.deepcopy(layer)
    scaler, losses = torch.amp.GradScaler("cpu"), (math.inf, 1.0)
    for module, factors in ((layer, losses), (spared, losses[1:])):
        optimizer = build_sgd([module], 0.1, 0.9, 0.0, torch.float16)
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale(module(torch.ones(1, 4)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    for moved, expected in zip(layer.parameters(), spared.parameters(), strict=True):
        torch.testing.assert_close(moved, expected)


def test_learning_rate_equals_a_slow_count():
    steps_per_epoch, epochs, warmup, stages = 7, 12, 2, (4, 6, 11)
    expected, step = [], 0
    for epoch in range(epochs):
        for _ in range(steps_per_epoch):
            step += 1
            rate = 0.4
            if epoch < warmup:
                rate = 0.4 * step / (warmup * steps_per_epoch)
            for stage in stages:
                if epoch >= stage:
                    rate /= 10
            expected.append(rate)
    schedule = Schedule(steps_per_epoch, lr=0.4, warmup_epochs=warmup, stages=stages, margin=0, margin_warmup_epochs=0)
    ours = [schedule.lr_at(step) for step in range(steps_per_epoch * epochs)]
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(0, [1, 1, 1]), (1, [0.25, 0.5, 0.75, 1, 1]), (0.5, [0.5, 1, 1]), (1.5, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])],
)
def test_ramp_rises_to_one_and_is_never_zero(epochs, expected):
    assert [ramp_at(step, 4, epochs) for step in range(len(expected))] == pytest.approx(expected)


def test_schedule_has_separate_ramps_for_rate_and_margin():
    schedule = Schedule(10, lr=0.2, warmup_epochs=1, stages=(3,), margin=0.5, margin_warmup_epochs=2)
    assert schedule.lr_at(4) == pytest.approx(0.1)
    assert schedule.lr_at(30) == pytest.approx(0.02)
    assert schedule.margin_at(4) == pytest.approx(0.125)
    assert schedule.margin_at(40) == 0.5
