"""Training of super resolution, run as a user runs it: what it leaves, how it goes on, and how it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch

from applications.super_resolution import train
from model.super_resolution import identify_rcan
from util import checkpoint

TINY = ("--num_features=4", "--num_rg=1", "--num_rcab=1", "--reduction=2", "--batch_size=2", "--val_images=3")


@pytest.fixture
def run_training(tmp_path, tiny_data):
    """Trains with the given flags in tmp_path on the tiny data, and returns the folder of the newest run."""

    def run(*flags: str, name: str = "a", data: Path = tiny_data / "imgs", sizes: tuple[str, ...] = TINY) -> Path:
        folders = [f"--checkpoint_dir={tmp_path / name}", f"--best_checkpoint_dir={tmp_path / name}_best"]
        common = [f"--data={data}", f"--log_dir={tmp_path / name}_log", "--gpu_num=cpu", "--num_workers=0"]
        train.main(folders + common + list(sizes) + list(flags))
        return checkpoint.dated_runs(tmp_path / name, "SR_*.pth")[-1]

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


@pytest.mark.parametrize("flags", [(), ("--patch=9", "--crop_share=0.7", "--scale=2")])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_interrupted(run_training, flags):
    whole = run_training("--epochs=3", "--steps=3", *flags)
    stopped = run_training("--epochs=3", "--steps=3", *flags, name="b")
    for part in checkpoint.SR_PARTS:
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
