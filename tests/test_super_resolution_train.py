"""Training of super resolution, run as a user runs it: what it leaves, how it goes on, and how it refuses."""

import json
import re
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from applications.super_resolution import train
from applications.super_resolution.engine import CosineSchedule, SuperResolutionStep
from applications.super_resolution.settings import TrainSettings
from model.backbone import build_backbone
from model.super_resolution import RCAN, identify_rcan
from tests.multiprocess import launch, signal_at
from tests.test_interrupt import signal_in
from util.checkpoint import io, run_dir
from util.errors import DataError, Interrupted, RunError, UsageError
from util.training import loop

ROOT = Path(__file__).parents[1]
TINY = ("--num_features=4", "--num_rg=1", "--num_rcab=1", "--reduction=2", "--batch_size=2", "--val_images=3")


@pytest.fixture
def run_training(tmp_path, tiny_data):
    """Trains with the given flags in tmp_path on the tiny data, and returns the folder of the newest run."""

    def run(*flags: str, name: str = "a", data: Path = tiny_data / "imgs", sizes: tuple[str, ...] = TINY) -> Path:
        folders = [f"--checkpoint_dir={tmp_path / name}", f"--best_checkpoint_dir={tmp_path / name}_best"]
        common = [f"--data={data}", f"--log_dir={tmp_path / name}_log", "--gpu_num=cpu", "--num_workers=0"]
        train.main(folders + common + list(sizes) + list(flags))
        return run_dir.dated_runs(tmp_path / name, "SR_*.pth")[-1]

    return run


def load(run: Path, name: str) -> dict:
    return torch.load(run / f"{name}.pth", weights_only=True)


def test_a_run_leaves_its_files(run_training, tmp_path, capsys):
    run = run_training("--epochs=2", "--steps=3", "--scale=2")
    assert re.fullmatch(r"SR_x2_\d{4}-\d\d-\d\d-\d\d-\d\d", run.name)
    assert {file.name for file in run.iterdir()} == {
        f"{part}_{e}.pth" for part in ("SR", "Optimizer") for e in ("1_3", "2_6")
    }
    assert identify_rcan(load(run, "SR_2_6")) == (2, {"num_features": 4, "num_rg": 1, "num_rcab": 1, "reduction": 2})
    best = tmp_path / "a_best" / run.name
    assert {file.name for file in best.iterdir()} == {"SR_Best.pth", "Optimizer_Best.pth"}
    log = tmp_path / "a_log" / run.name
    records = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 3), (2, 6)]
    assert records[0]["bicubic"] == records[1]["bicubic"] and records[0]["SR"] != records[1]["SR"]
    assert (log / "samples.png").read_bytes().startswith(b"\x89PNG")
    lines = re.findall(
        r"^Epoch \d/2, Validation: luma PSNR [\d.]+ dB \(bicubic [\d.]+, [+-][\d.]+\).*$", capsys.readouterr().out, re.M
    )
    assert len(lines) == 2


def test_a_network_that_is_worse_than_bicubic_is_reported(run_training, capsys):
    run_training("--epochs=2", "--steps=1", "--lr=0.05")
    printed = capsys.readouterr().out
    assert len(re.findall(r"after the last epoch the network is [\d.]+ dB worse than bicubic", printed)) == 1


@pytest.mark.parametrize("flags", [(), ("--patch=9", "--crop_share=0.7", "--scale=2")])
def test_resume_equals_an_uninterrupted_run(run_training, flags):
    whole = run_training("--epochs=3", "--steps=3", *flags)
    stopped = run_training("--epochs=3", "--steps=3", *flags, name="b")
    for part in io.SR_CHECKPOINT_FILES:
        for epoch in ("2_6", "3_9"):
            (stopped / f"{part}_{epoch}.pth").unlink()
    torch.manual_seed(0)  # whatever happened in between
    resumed = run_training(f"--resume_dir={stopped}", "--num_workers=1", name="b", sizes=())
    assert resumed == stopped
    for name in ("SR_2_6", "SR_3_9"):
        ours, theirs = load(whole, name), load(resumed, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = load(whole, "Optimizer_3_9"), load(resumed, "Optimizer_3_9")
    assert (ours["best_psnr"], ours["best_epoch"]) == (theirs["best_psnr"], theirs["best_epoch"])
    for key, value in ours["optimizer"]["state"].items():
        assert all(torch.equal(value[name], theirs["optimizer"]["state"][key][name]) for name in value)


def test_a_signal_within_an_epoch_stops_after_the_step(run_training, tmp_path):
    whole = run_training("--epochs=2", "--steps=4", name="whole")
    with signal_in(SuperResolutionStep, "backward", call=6), pytest.raises(Interrupted) as stopped:
        run_training("--epochs=2", "--steps=4")
    (run,) = (tmp_path / "a").iterdir()
    assert f"Stopped by SIGTERM: saved {run}/SR_Last.pth. Continue with: python -m appl" in stopped.value.message
    state = load(run, "Optimizer_Last")
    assert (state["epoch"], state["epoch_step"], state["step"]) == (1, 2, 6)
    run_training(f"--resume_dir={run}", sizes=())
    ours, theirs = load(whole, "SR_2_8"), load(run, "SR_2_8")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert records(tmp_path, run) == records(tmp_path, whole, "whole")


def test_the_rolling_checkpoint_is_saved_within_an_epoch(run_training, monkeypatch):
    saved = []
    save = loop.save_checkpoint

    def note(folder, networks, state, rolling):
        saved.append((state.step, rolling))
        return save(folder, networks, state, rolling)

    monkeypatch.setattr(loop, "save_checkpoint", note)
    run_training("--epochs=1", "--steps=5", "--save_every=2")
    assert saved == [(2, True), (4, True), (5, False)]


def records(tmp_path: Path, run: Path, name: str = "a") -> list[dict]:
    lines = (tmp_path / f"{name}_log" / run.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_waves(root: Path) -> Path:
    """Eight images of four people, of fine waves that shrinking weakens: what to do about it can be learned quickly."""
    rng = np.random.default_rng(2)
    rows, columns = np.mgrid[:112, :112]
    for number in range(8):
        angle, length = rng.uniform(0, np.pi), rng.uniform(4.5, 6)
        wave = np.sin(2 * np.pi * (columns * np.cos(angle) + rows * np.sin(angle)) / length)
        image = np.rint(128 + 90 * wave[:, :, None] * rng.uniform(0.5, 1, 3)).astype(np.uint8)
        (root / f"person_{number // 2}").mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / f"person_{number // 2}" / f"{number}.png"), image)
    return root


def test_training_beats_interpolation_and_its_start(run_training, tmp_path):
    data = write_waves(tmp_path / "waves")
    flags = ("--scale=2", "--steps=25", "--patch=24", "--val_share=0.25")
    sizes = ("--num_features=8", "--num_rg=1", "--num_rcab=1", "--reduction=2", "--batch_size=2")
    run = run_training("--epochs=3", "--lr=0.003", *flags, data=data, sizes=sizes)
    untrained = run_training("--epochs=1", "--lr=1e-12", *flags, data=data, sizes=sizes, name="b")
    epochs, (start,) = records(tmp_path, run), records(tmp_path, untrained, "b")
    assert start["bicubic"] == epochs[0]["bicubic"]
    assert epochs[-1]["loss"] < 0.7 * min(epochs[0]["loss"], start["loss"])
    assert epochs[-1]["SR"]["psnr_luma"] > max(start["SR"]["psnr_luma"], start["bicubic"]["psnr_luma"]) + 1


def test_the_learning_rate_rises_and_then_falls_along_a_cosine():
    schedule = CosineSchedule(steps_per_epoch=10, epochs=10, lr=2.0)
    rates = [schedule.lr_at(step) for step in range(101)]
    assert [rate > 0 for rate in rates[:100]] == [True] * 100
    assert rates[0] == pytest.approx(0.4) and max(rates) == rates[4] < 2
    assert rates[50] == pytest.approx(1) and rates[100] == pytest.approx(0)
    assert all(first > second for first, second in pairwise(rates[4:]))
    assert schedule.lr_at(150) == pytest.approx(0)


def test_an_epoch_without_steps_takes_as_many_as_the_images_fill(run_training, capsys):
    run = run_training("--epochs=1")
    assert "8 images of 2 people" in (said := capsys.readouterr().out) and "4 steps an epoch" in said
    assert (run / "SR_1_4.pth").is_file()


def test_a_verification_set_can_be_validated_on(run_training, tiny_data, capsys):
    run_training("--epochs=1", "--steps=1", f"--val_data={tiny_data / 'lfw_align_112' / 'lfw'}")
    said = capsys.readouterr().out
    assert "12 images of 3 people" in said and "validating on 3 images of" in said


def test_the_identity_term_is_trained_and_logged(run_training, tmp_path, capsys):
    torch.manual_seed(0)
    file = tmp_path / "Backbone_1_2.pth"
    torch.save(build_backbone("MobileFaceNet_025", embedding_size=16).state_dict(), file)
    run = run_training("--epochs=1", "--steps=2", "--identity_weight=0.5", f"--identity_backbone={file}")
    record = records(tmp_path, run)[0]
    assert record["loss"] == pytest.approx(record["l1"] + 0.5 * record["identity"], rel=1e-5)
    assert record["identity"] > 0 and "identity: 0.5 * (1 - cosine) under MobileFaceNet_025" in capsys.readouterr().out
    assert set(load(run, "SR_1_2")) == set(RCAN(4, 4, 1, 1, 2).state_dict())


def test_sizes_follow_the_device_and_flags_of_their_own():
    given = TrainSettings(data="x", num_rg=3)
    small = given.with_size("small")
    assert small.network_sizes == {"num_features": 32, "num_rg": 3, "num_rcab": 4, "reduction": 8}
    assert (small.lr, small.batch_size) == (5e-4, 4)
    paper = TrainSettings(data="x", size="default", lr=0.5).with_size("small")
    assert paper.network_sizes == {"num_features": 64, "num_rg": 10, "num_rcab": 20, "reduction": 16}
    assert (paper.lr, paper.batch_size) == (0.5, 16)


def test_resume_keeps_settings_unless_given(run_training, tmp_path, capsys):
    run = run_training("--epochs=1", "--steps=1")
    run_training("--epochs=2", f"--resume_dir={run / 'SR_1_1.pth'}", sizes=())
    said = capsys.readouterr().out
    assert "SR_1_1.pth after epoch 1" in said and "changed setting: --epochs was 1, now 2" in said
    assert said.count("changed setting") == 1 and (run / "SR_2_2.pth").is_file()
    best = tmp_path / "a_best" / run.name
    run_training("--epochs=3", f"--resume_dir={best}", sizes=())
    assert (run / "SR_3_3.pth").is_file()
    run_training(f"--resume_dir={run}", "--epochs=3", sizes=())
    assert "all of its 3 epochs are done" in capsys.readouterr().out


def test_resume_moves_later_epochs(run_training, tmp_path):
    run = run_training("--epochs=2", "--steps=1")
    run_training(f"--resume_dir={run / 'SR_1_1.pth'}", sizes=())
    assert {file.name for file in (run / "superseded").iterdir()} == {"SR_2_2.pth", "Optimizer_2_2.pth"}
    assert [record["epoch"] for record in records(tmp_path, run)] == [1, 2]


def test_other_validation_images_reset_the_best_epoch(run_training, capsys):
    run = run_training("--epochs=1", "--steps=1")
    state = load(run, "Optimizer_1_1")
    state["best_psnr"] = 99.0
    torch.save(state, run / "Optimizer_1_1.pth")
    run_training("--epochs=2", f"--resume_dir={run}", sizes=())
    assert load(run, "Optimizer_2_2")["best_psnr"] == 99
    run_training("--epochs=3", f"--resume_dir={run}", "--val_images=2", sizes=())
    assert "the search for the best epoch starts again" in capsys.readouterr().out
    assert load(run, "Optimizer_3_3")["best_epoch"] == 3


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--scale=2", "--scale=2: the run to resume has 4. Leave it"),
        ("--num_rg=2", "--num_rg=2: the run to resume has 1"),
    ],
)
def test_another_network_cannot_be_resumed_with(run_training, flag, message):
    run = run_training("--epochs=1", "--steps=1")
    with pytest.raises(UsageError, match=message):
        run_training("--epochs=2", f"--resume_dir={run}", flag, sizes=())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale=3"], r"--scale: '3' is not one of 2, 4, 8"),
        (["--scale=8", "--patch=15"], "--patch=15: a face has 14 pixels at --scale=8"),
        (["--identity_weight=1"], "--identity_weight: needs a recognition network"),
        (["--identity_weight=1", "--identity_backbone=x", "--patch=8"], "--patch: the identity of a patch is unknown"),
        (["--val_share=0"], "--val_share=0: leaves nothing to validate on"),
        (["--num_features=6", "--reduction=4"], "--num_features and --reduction: 6 channels cannot be squeezed by 4"),
        (["--num_features=2"], "2 channels cannot carry 3 colors"),
        (["--batch_size=64"], "--batch_size=64: .* has only 8 images"),
        (["--lr=0"], "--lr: '0' is not a number above 0"),
        (["--sizes=small"], "--sizes: unknown flag. The nearest one is --size"),
    ],
)
def test_bad_command_lines_are_refused(run_training, flags, message):
    with pytest.raises(UsageError, match=message):
        run_training("--epochs=1", *flags)


def test_data_are_asked_for():
    with pytest.raises(UsageError, match="--data: missing"):
        train.main(["--scale=4"])


def test_nan_loss_stops_the_run_and_saves_nothing(run_training):
    run = run_training("--epochs=1", "--steps=2")
    with pytest.raises(RunError, match=r"(no longer finite|became).*Lower --lr.*last good checkpoint is .*SR_1_2\.pth"):
        run_training("--epochs=3", "--lr=1e30", f"--resume_dir={run}", sizes=())
    assert {file.name for file in run.glob("*.pth")} == {"SR_1_2.pth", "Optimizer_1_2.pth"}


def test_a_full_disk_names_what_is_whole_and_leaves_no_part(run_training, monkeypatch):
    run = run_training("--epochs=1", "--steps=1")
    write = torch.save

    def failing(content, file):
        write(content, file)
        if file.name.name.startswith(".Optimizer_2"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(RunError, match=r"no space left .*Free some space.*last good checkpoint is .*SR_1_1"):
        run_training("--epochs=3", f"--resume_dir={run}", sizes=())
    assert not list(run.rglob("*partial*"))
    monkeypatch.undo()
    run_training(f"--resume_dir={run}", "--epochs=2", sizes=())
    assert (run / "Optimizer_2_2.pth").is_file()


def test_a_broken_image_is_named(run_training, make_people, tmp_path):
    root = make_people(tmp_path / "imgs", people=2, images=3)
    for number in range(3):
        (root / "person_1" / f"image_{number}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"person_1/image_\d\.jpg: not an image"):
        run_training("--epochs=1", "--steps=5", data=root)


@pytest.mark.parametrize("program", ["train", "upscale"])
@pytest.mark.parametrize("form", ["module", "script"])
def test_help_and_mistakes_are_answered_without_importing_torch(program, form):
    name = f"applications.super_resolution.{program}"
    run = f"runpy.run_module('{name}', run_name='__main__')"
    if form == "script":
        run = f"runpy.run_path('{name.replace('.', '/')}.py', run_name='__main__')"
    for flag, code, printed in (("--help", 0, "--gpu_num"), ("--scale=5", 2, "--scale: '5' is not one of 2, 4, 8")):
        ended = subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys, runpy; sys.argv = ['x', '{flag}']\ntry: {run}\n"
                "finally: print('torch' in sys.modules, 'skimage' in sys.modules)",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == code and ended.stdout.endswith("False False\n")
        assert printed in ended.stdout + ended.stderr and ended.stderr.count("\n") == (code > 0)


def test_ctrl_c_ends_the_run_in_one_line(tiny_data, tmp_path):
    folders = [f"--{name}={tmp_path / name}" for name in ("checkpoint_dir", "best_checkpoint_dir", "log_dir")]
    flags = [f"--data={tiny_data / 'imgs'}", *folders, *TINY, "--gpu_num=cpu", "--epochs=9999", "--steps=10"]
    interrupt = partial(signal_at, SuperResolutionStep, "__call__", 14, signal.SIGINT)
    ended = launch(train.main, [*flags, "--num_workers=1"], tmp_path / "output.txt", interrupt)
    assert ended.code == 130 and "Stopped by SIGINT: saved " in ended.output and "Traceback" not in ended.output
    assert not list(tmp_path.rglob("*partial*"))
