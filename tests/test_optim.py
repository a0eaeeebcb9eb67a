import copy
import math

import pytest
import torch
from torch import nn

from util.training.optim import Schedule, build_adamw, build_sgd, parameter_groups, ramp_at


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


def test_adamw_decays_neither_vectors_nor_norms():
    backbone = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.PReLU(6), nn.BatchNorm1d(6))
    optimizer = build_adamw([backbone], lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    for parameter in backbone.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if name == "0.weight" else 1.0))


def test_adamw_equals_the_formula_of_its_paper():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False)
    optimizer = build_adamw([layer], lr=0.01, weight_decay=0.1)
    weight = layer.weight.detach().double()
    first = torch.zeros_like(weight)
    second = torch.zeros_like(weight)
    for step in range(1, 6):
        gradient = torch.randn(3, 5)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        weight -= 0.01 * 0.1 * weight
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(layer.weight.detach(), weight.float())


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


@pytest.mark.parametrize(
    "build", [lambda each: build_sgd([each], 0.1, 0.9, 0.0, torch.float16), lambda each: build_adamw([each], 0.1, 0.0)]
)
def test_overflow_in_the_first_step_leaves_no_momentum(build):
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    spared = copy.deepcopy(layer)
    scaler, losses = torch.amp.GradScaler("cpu"), (math.inf, 1.0)
    for module, factors in ((layer, losses), (spared, losses[1:])):
        optimizer = build(module)
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


def test_poly_equals_the_scheduler_of_arcface_torch():
    base_lr, steps_per_epoch, epochs, warmup_epochs = 0.2, 5, 8, 2
    max_steps = epochs * steps_per_epoch
    warmup_steps = warmup_epochs * steps_per_epoch
    schedule = Schedule(steps_per_epoch, base_lr, warmup_epochs, (), 0, 0, decay="poly", epochs=epochs)
    for last_epoch in range(max_steps):  # their name of the step
        if last_epoch < warmup_steps:
            expected = base_lr * (last_epoch + 1) / warmup_steps  # theirs starts at 0
        else:
            alpha = pow(1 - float(last_epoch - warmup_steps) / float(max_steps - warmup_steps), 2)
            expected = base_lr * alpha
        assert schedule.lr_at(last_epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 1.5])
def test_cosine_falls_symmetrically_to_zero(warmup):
    schedule = Schedule(10, 0.4, warmup, (), 0, 0, decay="cosine", epochs=5)
    start = round(10 * warmup)
    rates = [schedule.lr_at(step) for step in range(start, 51)]
    assert rates[0] == pytest.approx(0.4) and rates[-1] == pytest.approx(0)
    assert [rate + other for rate, other in zip(rates, reversed(rates), strict=True)] == pytest.approx(
        [0.4] * len(rates)
    )
    angles = torch.linspace(0, math.pi, len(rates), dtype=torch.float64)
    assert rates == pytest.approx((0.2 + 0.2 * angles.cos()).tolist())


@pytest.mark.parametrize("decay", ["poly", "cosine"])
def test_decay_begins_after_a_warm_up_of_all_epochs(decay):
    schedule = Schedule(4, 0.4, 3, (1,), 0, 0, decay=decay, epochs=2)
    assert [schedule.lr_at(step) for step in range(8)] == pytest.approx([0.4 * (step + 1) / 12 for step in range(8)])


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
