import json

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.checkpoint.run_dir import Run
from util.training.log import Progress, RunLog, image_grid
from util.training.report import evaluation_lines, flatten_results
from util.verification import VerificationResult, verify

AVERAGES = {"loss": 1.23456, "prec1": 12.345, "prec5": 50.0, "lr": 0.025}


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "checkpoints" / "run").mkdir(parents=True)
    return Run(tmp_path / "checkpoints" / "run", tmp_path / "best" / "run", tmp_path / "log" / "run")


def result(wrong: int) -> VerificationResult:
    """Of 100 pairs, `wrong` ones a fold of ten are judged wrongly: an accuracy of 1 - wrong / 10."""
    issame = np.arange(100) % 2 == 0
    called_same = issame.copy()
    for fold in range(10):
        called_same[10 * fold : 10 * fold + 2 * wrong : 2] = False
    rows = np.zeros((200, 2), np.float32)
    rows[:, 0] = 1
    rows[1::2][~called_same] = (0, 1)
    return verify(rows, issame)


def record(epoch: int, **more) -> dict:
    return {"epoch": epoch, "step": 10 * epoch, **AVERAGES, "margin": 0.5, **more}


@pytest.mark.parametrize(("steps", "lines"), [(25, 10), (1000, 10), (10, 10), (4, 4), (1, 1)])
def test_progress_prints_a_line_every_tenth(capsys, steps, lines):
    with Progress("epoch 2/50", steps, 64) as progress:
        for done in range(1, steps + 1):
            if done % progress.report_every == 0 or done == steps:
                progress.report(done, AVERAGES)
    out, err = capsys.readouterr()
    printed = out.splitlines()
    assert err == "" and "\r" not in out
    assert len(printed) == lines
    assert printed[-1].startswith(f"epoch 2/50  {steps}/{steps}  loss 1.2346  Prec@1 ")
    for part in ("Prec@5 50.00", "lr 0.025", " images/s", "00:00 left"):
        assert part in printed[-1]


def test_plain_lines_are_spread_over_the_epoch(capsys):
    with Progress("epoch 1/2", 200, 4) as progress:
        for done in range(1, 201):
            progress.report(done, AVERAGES)
    assert [int(line.split("  ")[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()] == [
        *range(20, 201, 20)
    ]


def test_on_a_terminal_a_bar_is_drawn_instead(capsys):
    with Progress("epoch 1/2", 4, 8, terminal=True) as progress:
        progress.report(2, AVERAGES)
        progress.report(4, AVERAGES)
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 1/2" in err and "4/4" in err and "loss 1.2346" in err


@pytest.mark.parametrize(("steps", "every"), [(5, 1), (25, 2), (999, 99), (100000, 100)])
def test_reports_are_neither_rare_nor_a_burden(steps, every):
    assert Progress("", steps, 1, terminal=False).report_every == every


def test_evaluation_lines_have_the_older_form(run, no_plots):
    log = RunLog(run)
    log.epoch(50, record(3), {"HR": {"LFW": result(0), "AgeDB": result(2)}, "LR": {"LFW": result(1)}})
    log.epoch(50, record(4), {})
    log.close()
    assert (run.checkpoints / "Evaluation.txt").read_text() == (
        "Epoch 3/50, Evaluation: LFW : 1.0000, AgeDB : 0.8000, Avg : 0.9000\n"
        "Epoch 3/50, Evaluation LR: LFW : 0.9000, Avg : 0.9000\n"
    )


def test_metrics_are_a_json_object_an_epoch(run, no_plots):
    log = RunLog(run)
    log.epoch(2, record(1), {"HR": {"LFW": result(0)}, "LR": {"LFW": result(1)}})
    log.epoch(2, record(2), {})
    log.close()
    first, second = map(json.loads, (run.log / "metrics.jsonl").read_text().splitlines())
    assert first == {**record(1), "accuracy": {"LFW": 1.0, "LFW LR": 0.9}}
    assert second == {**record(2), "accuracy": {}}


def test_tensorboard_holds_scalars_and_the_roc(run):
    log = RunLog(run)
    log.samples(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    log.epoch(2, record(1), {"HR": {"LFW": result(0)}, "LR": {"LFW": result(1)}})
    log.epoch(2, record(2, loss=0.5), {"HR": {"LFW": result(1)}, "LR": {"LFW": result(1)}})
    log.close()
    events = EventAccumulator(str(run.log)).Reload()
    train = [f"train/{name}" for name in ("loss", "prec1", "prec5", "lr", "margin")]
    assert set(events.Tags()["scalars"]) == {*train, "HR/LFW", "LR/LFW"}
    assert set(events.Tags()["images"]) == {"train/samples", "ROC", "distances/LFW", "distances/LFW LR"}
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(10, pytest.approx(1.23456)), (20, 0.5)]
    assert [event.value for event in events.Scalars("HR/LFW")] == pytest.approx([1.0, 0.9])


def test_plots_are_images_and_there_is_no_roc_without_a_set(run):
    log = RunLog(run)
    log.epoch(2, record(1), {})
    assert not (run.log / "roc.png").exists()
    log.epoch(2, record(2), {"HR": {"LFW": result(0)}})
    log.close()
    for name in ("roc.png", "curves.png"):
        assert (run.log / name).read_bytes().startswith(b"\x89PNG")


def test_samples_keep_their_colors(run):
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    images[0, :, :, 0] = 255  # red
    log = RunLog(run)
    log.samples(images)
    log.close()
    picture = cv2.imread(str(run.log / "samples.png"), cv2.IMREAD_COLOR_RGB)
    assert picture[10, 10].tolist() == [255, 0, 0]


@pytest.mark.parametrize("number", [2, 8, 9, 32])
def test_image_grid_has_gaps_and_fills_the_last_row(number):
    images = np.random.default_rng(0).integers(0, 256, (number, 5, 4, 3)).astype(np.uint8)
    grid = image_grid(images, columns=8, gap=2, color=7)
    rows, columns = -(-number // 8), min(number, 8)
    expected = np.full((rows * 7 - 2, columns * 6 - 2, 3), 7, np.uint8)
    for index, image in enumerate(images):
        top, left = index // 8 * 7, index % 8 * 6
        expected[top : top + 5, left : left + 4] = image
    assert np.array_equal(grid, expected)


def test_log_cuts_lines_after_the_resumed_epoch(run, no_plots):
    log = RunLog(run)
    for epoch in (1, 2, 10):
        log.epoch(10, record(epoch), {"HR": {"LFW": result(0)}, "LR": {"LFW": result(1)}})
    log.close()
    log = RunLog(run, epoch=2, step=20)
    log.epoch(10, record(3, loss=7.0), {"HR": {"LFW": result(3)}, "LR": {"LFW": result(1)}})
    log.close()
    lines = (run.checkpoints / "Evaluation.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"Epoch {epoch}/10" for epoch in (1, 1, 2, 2, 3, 3)]
    assert lines[4].endswith("LFW : 0.7000, Avg : 0.7000")
    metrics = map(json.loads, (run.log / "metrics.jsonl").read_text().splitlines())
    assert [(line["epoch"], line["loss"]) for line in metrics] == [(1, 1.23456), (2, 1.23456), (3, 7.0)]
    events = EventAccumulator(str(run.log)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30]


def test_views_are_told_apart_by_name():
    sets = {"LFW": result(0), "AgeDB": result(1)}
    names = flatten_results({"HR": sets, "LR": {"LFW": result(2)}})
    assert list(names) == ["LFW", "AgeDB", "LFW LR"]
    assert names["LFW LR"].accuracy == pytest.approx(0.8)


def test_evaluation_lines_end_with_their_view_s_average():
    lines = evaluation_lines({"HR": {"LFW": result(0), "CFP_FF": result(1)}, "LR": {"LFW": result(2)}}, " Acc: ")
    assert lines == [
        "Evaluation: LFW Acc: 1.0000, CFP_FF Acc: 0.9000, Avg Acc: 0.9500",
        "Evaluation LR: LFW Acc: 0.8000, Avg Acc: 0.8000",
    ]
