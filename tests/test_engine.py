import copy
import math

import pytest
import torch
from torch import nn

from model.backbone import build_backbone
from model.head import build_head
from model.loss import FocalLoss
from util.errors import RunError
from util.training.engine import EpochProgress, TrainingStep, target_rank, topk_accuracy, train_one_epoch
from util.training.optim import Schedule, parameter_groups

CPU = torch.device("cpu")


class TinyBackbone(nn.Module):
    """Backbone (N, 3, 8, 8) -> (N, 6), with each kind of layer of the real backbones."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten())
        self.out = nn.Linear(4 * 6 * 6, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(images))


class Setup:
    """Networks, optimizer and data of a short epoch of `steps` batches of 6 samples of `classes` classes."""

    def __init__(self, steps: int = 7, classes: int = 9):
        torch.manual_seed(0)
        self.backbone = TinyBackbone()
        self.head = build_head("ArcFace", 6, classes, s=16.0, m=0.3)
        self.criterion: nn.Module = FocalLoss()
        self.optimizer = torch.optim.SGD(parameter_groups([self.backbone, self.head], 0.0), lr=1.0, momentum=0.9)
        self.schedule = Schedule(steps, lr=0.05, warmup_epochs=1, stages=(2,), margin=0.3, margin_warmup_epochs=2)
        self.batches = [
            (torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8), torch.randint(0, classes, (6,)))
            for _ in range(steps)
        ]
        self.reports: list[tuple[int, dict[str, float]]] = []

    def step(self, accumulate: int = 1) -> TrainingStep:
        return TrainingStep(self.backbone, self.head, self.criterion, self.optimizer, CPU, accumulate)

    def train(
        self, epoch: int = 0, every: int = 3, accumulate: int = 1, progress: EpochProgress | None = None
    ) -> dict[str, float]:
        return train_one_epoch(
            self.step(accumulate),
            self.batches,
            self.schedule,
            epoch,
            lambda done, averages: self.reports.append((done, averages)),
            every,
            progress,
        )


class RecordingLoss(nn.Module):
    """Cross entropy that calls `note(logits)` and can multiply the loss of some steps by `factor`."""

    def __init__(self, note=lambda logits: None, bad_steps: frozenset[int] = frozenset(), factor: float = math.nan):
        super().__init__()
        self.calls, self._note, self._bad_steps, self._factor = 0, note, bad_steps, factor

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self._note(logits)
        loss = nn.functional.cross_entropy(logits, labels)
        return loss * self._factor if self.calls in self._bad_steps else loss


def test_step_moves_every_trainable_parameter():
    setup = Setup(steps=1)
    named = {**dict(setup.backbone.named_parameters()), "head": setup.head.weight}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    setup.train()
    assert len(before) == 7
    assert [name for name, parameter in named.items() if torch.equal(parameter, before[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileFaceNet", "IR_SE_50", "iresnet18"])
def test_step_moves_every_parameter_of_real_networks(name):
    torch.manual_seed(0)
    backbone, head = build_backbone(name), build_head("ArcFace", 512, 9)
    modules = {"backbone": backbone, "head": head}
    before = {key: copy.deepcopy(module.state_dict()) for key, module in modules.items()}
    optimizer = torch.optim.SGD(parameter_groups(modules.values(), 0.0), lr=1.0, momentum=0.9)
    schedule = Schedule(1, lr=1.0, warmup_epochs=0, stages=(), margin=0.5, margin_warmup_epochs=0)
    images = torch.randint(0, 256, (4, 112, 112, 3), dtype=torch.uint8)
    batches = [(images, torch.arange(4))]
    step = TrainingStep(backbone, head, FocalLoss(), optimizer, CPU)
    train_one_epoch(step, batches, schedule, 0, lambda done, averages: None)
    for key, module in modules.items():
        for parameter_name, parameter in module.named_parameters():
            moved = not torch.equal(parameter.detach(), before[key][parameter_name])
            assert moved == parameter.requires_grad, parameter_name


@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_give_the_weights_of_one_batch(accumulate):
    full, split = Setup(), Setup()
    for setup in (full, split):
        setup.backbone.body[1].train = lambda mode=True: None
        setup.backbone.body[1].training = False
    expected, averages = full.train(), split.train(accumulate=accumulate)
    assert averages == pytest.approx(expected, rel=1e-5)
    for key, value in full.backbone.state_dict().items():
        torch.testing.assert_close(split.backbone.state_dict()[key], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.head.weight, full.head.weight, rtol=1e-5, atol=1e-5)


def test_batch_norm_sees_each_micro_batch_separately():
    full, split = Setup(steps=1), Setup(steps=1)
    full.train()
    split.train(accumulate=3)
    assert full.backbone.body[1].num_batches_tracked == 1
    assert split.backbone.body[1].num_batches_tracked == 3


def test_backbone_gets_one_micro_batch_at_a_time():
    setup, sizes = Setup(steps=1), []
    setup.backbone.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    setup.train(accumulate=2)
    assert sizes == [3, 3]


def test_train_one_epoch_equals_a_slow_epoch():
    setup, slow = Setup(), Setup()
    images = [(pixels.double() - 127.5) / 127.5 for pixels, _ in slow.batches]
    losses = []
    topk_correct = {1: [], 5: []}
    slow.backbone.train()
    optimizer = torch.optim.SGD([*slow.backbone.parameters(), *slow.head.parameters()], lr=0.05, momentum=0.9)
    for step, (batch, (_, labels)) in enumerate(zip(images, slow.batches, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.05 * (step + 1) / 7
        margin = 0.3 * (step + 1) / 14
        logits = slow.head(slow.backbone(batch.permute(0, 3, 1, 2).float()), labels, margin=margin)
        chances = logits.softmax(1)[range(6), labels]
        loss = -((1 - chances) ** 2 * chances.log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for k, found in topk_correct.items():
            found += [label in row.argsort(descending=True)[:k] for row, label in zip(logits, labels, strict=True)]
    averages = setup.train()
    assert averages["loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert averages["prec1"] == pytest.approx(100 * sum(topk_correct[1]) / 42)
    assert averages["prec5"] == pytest.approx(100 * sum(topk_correct[5]) / 42)
    assert 0 < averages["prec5"] < 100
    assert averages["lr"] == pytest.approx(0.05)
    for ours, theirs in zip(setup.backbone.parameters(), slow.backbone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(setup.head.weight, slow.head.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("limit", [0.5, 100.0])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipped_step_equals_a_slow_step(limit, accumulate):
    setup, slow = Setup(steps=1), Setup(steps=1)
    for each in (setup, slow):
        each.backbone.body[1].train = lambda mode=True: None
        each.backbone.body[1].training = False
    images, labels = slow.batches[0]
    slow.step().backward(images, labels, 0.3, 0)
    parameters = [*slow.backbone.parameters(), slow.head.weight]
    norm = math.sqrt(sum(value**2 for each in parameters for value in each.grad.flatten().tolist()))
    assert 0.5 < norm < 100
    with torch.no_grad():
        for each in parameters:
            each -= 0.1 * each.grad * min(1.0, limit / norm)
    for group in setup.optimizer.param_groups:
        group["lr"] = 0.1
    step = setup.step(accumulate)
    step.clip_grad_norm = limit
    step(images, labels, margin=0.3)
    for ours, theirs in zip([*setup.backbone.parameters(), setup.head.weight], parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_after_the_loss_is_unscaled():
    plain, scaled = Setup(steps=1), Setup(steps=1)
    for setup, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=2.0**10))):
        step = TrainingStep(
            setup.backbone,
            setup.head,
            setup.criterion,
            setup.optimizer,
            CPU,
            scaler=scaler,
            clip_grad_norm=0.5,
        )
        step(*setup.batches[0], margin=0.3)
    torch.testing.assert_close(scaled.head.weight, plain.head.weight)
    torch.testing.assert_close(scaled.backbone.out.weight, plain.backbone.out.weight)


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6, 7]), (1, [1, 2, 3, 4, 5, 6, 7]), (7, [7]), (100, [7])])
def test_reports_come_at_the_interval_and_at_the_end(every, expected):
    setup = Setup()
    averages = setup.train(every=every)
    assert [done for done, _ in setup.reports] == expected
    assert setup.reports[-1][1] == averages
    assert set(averages) == {"loss", "prec1", "prec5", "lr"}


def test_reports_average_from_the_start_of_the_epoch():
    losses = []

    def note(logits: torch.Tensor) -> None:
        losses.append(nn.functional.cross_entropy(logits.detach(), setup.batches[len(losses)][1]).item())

    setup = Setup()
    setup.criterion = RecordingLoss(note)
    setup.train(every=3)
    for done, averages in setup.reports:
        assert averages["loss"] == pytest.approx(sum(losses[:done]) / done, rel=1e-5)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("bad_steps", [{1}, {4}, {2, 3, 4, 5}, {1, 3, 5, 7}])
def test_a_step_without_a_finite_loss_is_skipped(factor, bad_steps, capsys):
    setup, clean = Setup(), Setup()
    setup.criterion = RecordingLoss(bad_steps=bad_steps, factor=factor)
    clean.criterion = RecordingLoss()
    progress = EpochProgress()
    averages = setup.train(epoch=2, progress=progress)
    assert (progress.step, progress.skipped) == (7, len(bad_steps))
    assert progress.skipped_in_row == (7 in bad_steps)
    assert all(math.isfinite(value) for value in averages.values())
    assert capsys.readouterr().out.count("the loss is infinite or not a number in step") == len(bad_steps)

    # The same weights and running statistics as an epoch that the bad batches are not in.
    step = clean.step()
    step.train()
    for number, (images, labels) in enumerate(clean.batches):
        if number + 1 not in bad_steps:
            for group in clean.optimizer.param_groups:
                group["lr"] = clean.schedule.lr_at(14 + number)
            step(images, labels, margin=clean.schedule.margin_at(14 + number))
    for first, second in ((setup.backbone, clean.backbone), (setup.head, clean.head)):
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), key


def test_a_step_with_an_infinite_gradient_is_skipped(capsys):
    setup = Setup(steps=1)
    before = copy.deepcopy(setup.backbone.state_dict())
    setup.backbone.out.weight.register_hook(lambda gradient: gradient * math.inf)
    assert math.isnan(setup.train()["loss"])
    for key, value in setup.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert "a gradient is infinite or not a number in step 1 of epoch 1" in capsys.readouterr().out


def test_five_skipped_steps_in_a_row_end_the_run():
    setup = Setup()
    setup.criterion = criterion = RecordingLoss(bad_steps={1, 3, 4, 5, 6, 7})
    with pytest.raises(
        RunError, match=r"the loss became .* in 5 steps in a row, up to step 7 of epoch 1, .*rate of 0.05"
    ):
        setup.train()
    assert criterion.calls == 7


def test_skipped_steps_in_a_row_count_over_epochs_and_resumes():
    setup = Setup()
    setup.criterion = criterion = RecordingLoss(bad_steps={1})
    with pytest.raises(RunError, match="in 5 steps in a row, up to step 4 "):
        setup.train(progress=EpochProgress(step=3, skipped=3, skipped_in_row=4))
    assert criterion.calls == 1


def test_an_epoch_that_ends_in_a_broken_network_ends_the_run():
    setup = Setup(steps=2)
    setup.criterion = RecordingLoss(bad_steps={2})
    step = setup.step()

    def ruin() -> None:
        with torch.no_grad():
            setup.backbone.out.weight.fill_(math.inf)

    with pytest.raises(RunError, match="up to step 2 of epoch 1"):
        train_one_epoch(step, setup.batches, setup.schedule, 0, lambda *report: None, after_step=ruin)


def test_learning_rate_and_margin_follow_the_schedule():
    seen = []

    def note(head: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((setup.optimizer.param_groups[1]["lr"], kwargs["margin"]))

    setup = Setup()
    setup.head.register_forward_pre_hook(note, with_kwargs=True)
    setup.train(epoch=1)
    setup.train(epoch=2)
    schedule = setup.schedule
    assert seen == [(schedule.lr_at(step), schedule.margin_at(step)) for step in range(7, 21)]
    assert setup.head.m == 0.3
    assert seen[0] == pytest.approx((0.05, 0.3 * 8 / 14))
    assert seen[-1] == pytest.approx((0.005, 0.3))


def test_train_one_epoch_sets_training_mode():
    setup = Setup()
    setup.backbone.eval()
    setup.head.eval()
    running = copy.deepcopy(setup.backbone.body[1].running_mean)
    setup.train()
    assert setup.backbone.training and setup.head.training
    assert not torch.equal(setup.backbone.body[1].running_mean, running)


def test_topk_accuracy_counts_labels_among_the_highest():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(4, 1)
    top1, top5 = topk_accuracy(target_rank(logits, torch.tensor([0, 4, 5, 0]))).tolist()
    assert (top1, top5) == (50, 75)


def test_topk_accuracy_of_two_classes_is_full():
    ranks = target_rank(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
    top1, top5 = topk_accuracy(ranks).tolist()
    assert (top1, top5) == (50, 100)
    assert Setup(classes=2).train()["prec5"] == 100
