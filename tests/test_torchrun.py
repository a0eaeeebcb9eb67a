"""train.py and validation.py under torchrun: what several processes learn, leave and say."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import run as torchrun

import train as train_script
import validation
from benchmarks.ddp_parity import losses
from config import TrainConfig
from model.backbone import build_backbone
from tests.multiprocess import launch, main_as_ranks, signal_at
from util.checkpoint import io, run_dir
from util.training.engine import TrainingStep

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SMALL = ("--backbone=MobileFaceNet_025", "--batch_size=2", "--embedding_size=32", "--s=16", "--lr=0.001")
Train = Callable[..., subprocess.Popen]

pytestmark = pytest.mark.slow


def common_flags(folder: Path, data: Path, name: str = "a") -> list[str]:
    """Return the flags of a run of that name in `folder`."""
    folders = [f"--checkpoint_dir={folder / name}", f"--best_checkpoint_dir={folder / name}_best"]
    return [*folders, f"--log_dir={folder / name}_log", f"--data_dir={data}", "--gpu_num=cpu", "--num_workers=0"]


@pytest.fixture
def start(tmp_path: Path) -> Train:
    """Return start(ranks, *flags), which starts train.py under torchrun, in folders of tmp_path."""
    started = []

    def start_torchrun(ranks: int, *flags: str, data: Path, script: tuple[str, ...] = ("--", "train.py")):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [*LAUNCH, f"--nproc_per_node={ranks}", *script, *common_flags(tmp_path, data), *flags],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start_torchrun
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Return a function of (ranks, *flags) that trains in so many processes and returns the run and its output."""

    def run(ranks: int, *flags: str, data: Path, name: str = "a") -> tuple[Path, str]:
        arguments = [*common_flags(tmp_path, data, name), *flags]
        output = main_as_ranks(ranks, train_script.main, arguments, tmp_path / "output.txt")
        return run_dir.newest_run(tmp_path / name), output

    return run


def states(run: Path, suffix: str) -> list[dict]:
    return [torch.load(run / f"{part}_{suffix}.pth", weights_only=True) for part in io.CHECKPOINT_FILES]


def assert_same(first: object, second: object) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)


def test_two_processes_go_on_bit_for_bit_and_other_numbers_go_on(start, train, tiny_data, tmp_path) -> None:
    flags = ("--margin=0.2", "--head_scale=16", *(flag for flag in SMALL if not flag.startswith("--s=")))
    process = start(2, "--epochs=2", *flags, data=tiny_data, script=("train.py",))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    whole = run_dir.newest_run(tmp_path / "a")
    assert len(re.findall("training on", output)) == 1
    assert "2 processes with 2 images each: batches of 4" in output
    part, _ = train(2, "--epochs=1", *flags, name="b", data=tiny_data)
    resumed, _ = train(2, "--epochs=2", f"--resume_dir={part}", name="b", data=tiny_data)
    for one, other in zip(states(whole, "2_6"), states(resumed, "2_6"), strict=True):
        assert_same({**one, "settings": 0}, {**other, "settings": 0})
    assert (resumed / "Evaluation.txt").read_text().replace("1/1", "1/2") == (whole / "Evaluation.txt").read_text()

    backbone, head, state = states(whole, "2_6")
    assert {key: tuple(value.shape) for key, value in head.items()} == {"weight": (3, 32)}
    assert not any(key.startswith("module.") for key in backbone)
    momenta = [entry["momentum_buffer"].shape for entry in state["optimizer"]["state"].values()]
    assert momenta.count((3, 32)) == 1
    assert (state["settings"]["m"], state["settings"]["s"]) == (0.2, 16.0)
    assert "margin" not in state["settings"] and "head_scale" not in state["settings"]
    for ranks in (1, 3):
        more, output = train(ranks, "--epochs=3", f"--resume_dir={whole}", "--batch_size=4", data=tiny_data)
        assert f"resuming with {ranks} processes (was 2)" in output
        assert list(more.glob("Optimizer_3_*.pth"))
        for file in more.glob("*_3_*.pth"):
            file.unlink()


def test_two_processes_have_the_losses_of_one_with_frozen_norm(tiny_data) -> None:
    options = Namespace(data=tiny_data / "imgs", batch=6, steps=3, backbone="MobileFaceNet_025", double=True, lr=0.001)
    one, two = (losses(ranks, True, options) for ranks in (1, 2))
    assert len(set(one.tolist())) == 3
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)


def test_one_process_saves_what_two_resume_and_samples_classes(train, tiny_data) -> None:
    run, _ = train(1, "--epochs=1", "--sample_rate=0.5", *SMALL, data=tiny_data)
    _, output = train(2, "--epochs=2", "--scale_lr", f"--resume_dir={run}", data=tiny_data)
    assert "learning rate 0.002: --lr=0.001, scaled by the number of processes" in output
    before, after = (states(run, suffix)[1]["weight"] for suffix in ("1_6", "2_9"))
    assert before.shape == after.shape and not torch.equal(before, after)


def test_torchrun_names_a_broken_image(make_people, tmp_path) -> None:
    images = make_people(tmp_path / "data" / "imgs", people=3, images=4)
    broken = images / "person_1" / "image_2.jpg"
    broken.write_bytes(b"no image")
    flags = [*common_flags(tmp_path, tmp_path / "data"), "--epochs=20", "--max_bad=0", *SMALL]
    ended = launch(train_script.main, flags, tmp_path / "output.txt", ranks=2)
    assert ended.code != 0
    assert f"error: {broken}" in ended.output
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "train.py") not in ended.output


def test_torchrun_names_a_bad_flag(start, tiny_data) -> None:
    process = start(2, "--epochs=none", data=tiny_data)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "error: --epochs: 'none' is not" in output


def test_ctrl_c_ends_torchrun_and_all_ranks(tiny_data, tmp_path) -> None:
    """A terminal sends it to torchrun and to the ranks, and torchrun sends it to the ranks again."""
    interrupt = partial(signal_at, TrainingStep, "backward", 4, signal.SIGINT, to="terminal")
    flags = [*common_flags(tmp_path, tiny_data), "--epochs=5000", *SMALL]
    ended = launch(train_script.main, flags, tmp_path / "output.txt", interrupt, ranks=2)
    assert ended.code != 0
    assert ended.output.count("Stopped by SIGINT: saved ") == 1
    run = run_dir.newest_run(tmp_path / "a")
    assert not list(run.glob(".*partial*"))
    for file in run.glob("*.pth"):
        io.load(file)  # no file is cut


def test_a_validation_is_shared_and_said_once(tiny_data: Path, tmp_path: Path):
    torch.manual_seed(0)
    torch.save(build_backbone("MobileFaceNet_025", embedding_size=32).state_dict(), tmp_path / "Backbone_Best.pth")
    flags = [f"--data_dir={tiny_data}", "--gpu_num=cpu", f"--resume_dir={tmp_path}", "--LR_eval", "--batch_size=8"]
    two = launch(validation.main, [*flags, f"--json={tmp_path / 'two.json'}"], tmp_path / "output.txt", ranks=2).output
    one = main_as_ranks(1, validation.main, [*flags, f"--json={tmp_path / 'one.json'}"], tmp_path / "output.txt")
    for output in (one, two):
        assert output.count("validating ") == output.count("results: ") == 1
    found = [json.loads((tmp_path / name).read_text())["views"] for name in ("one.json", "two.json")]
    for one in found:
        for view in one.values():
            for result in view["sets"].values():
                assert result.pop("images_per_second") > 0
    assert found[0] == found[1]


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_flag_of_train_passes_through_torchrun(field):
    """torchrun stops at what abbreviates several flags of its own, as --m does, unless `--` precedes the script."""
    passed = set()
    for name in (field.name, *field.metadata["option"].aliases):
        for flag in ([f"--{name}=1"], [f"--{name}", "1"]):
            assert torchrun.parse_args(["--", "train.py", *flag]).training_script_args == flag
        with suppress(SystemExit):
            assert torchrun.parse_args(["train.py", *flag]).training_script_args == flag
            passed.add(name)
    assert passed, "give the setting an alias that torchrun does not know"
