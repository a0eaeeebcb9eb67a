"""Training under torchrun with faults: signals, and a rank or torchrun that hangs or dies."""

import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from model.backbone import BACKBONES
from tests.multiprocess import launch, signal_at
from tests.test_torchrun import SMALL, assert_same, common_flags, start, states, train  # noqa: F401
from tests.test_train import TinyNet
from train import main
from util.checkpoint import io, run_dir
from util.training.engine import TrainingStep

pytestmark = pytest.mark.slow

SLOW = ("--epochs=400", "--save_every=2", *SMALL)  # ends long after the test


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_people) -> Path:
    """Return a data folder with three people of eight images, without verification sets."""
    root = tmp_path_factory.mktemp("faults")
    make_people(root / "imgs", people=3, images=8)
    return root


def wait_for(process: subprocess.Popen, folder: Path, pattern: str) -> Path:
    """Return the first file like `pattern` in the run in a folder."""
    deadline = time.monotonic() + 120
    while not (found := list(folder.glob(f"*/{pattern}"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return found[0]


def ended_output(process: subprocess.Popen, seconds: float) -> str:
    """Return what was printed by a process and its children, which must all end within some seconds."""
    output = process.communicate(timeout=seconds)[0]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return output


ADAMW = ("--optimizer=adamw", "--schedule=cosine", "--clip_grad_norm=0.5", "--ema=0.9", "--grad_checkpoint")


def test_torchrun_passes_a_signal_on_to_ranks_that_save(start, data, tmp_path) -> None:  # noqa: F811
    process = start(2, *SLOW, data=data)
    wait_for(process, tmp_path / "a", "Optimizer_1_*.pth")
    process.send_signal(signal.SIGTERM)
    output = ended_output(process, 60)
    assert output.count("Stopped by SIGTERM: saved ") == 1, output


def prepare(stop_at: int) -> None:
    """Train a tiny network, and let torchrun receive SIGTERM in a step."""
    BACKBONES["MobileFaceNet_025"] = TinyNet
    signal_at(TrainingStep, "backward", stop_at, signal.SIGTERM)


@pytest.mark.parametrize("flags", [(), ("--batch_size=4", "--accumulate=2", "--sample_rate=0.5"), ADAMW])
def test_two_ranks_stopped_in_an_epoch_continue_bit_for_bit(data, tmp_path, flags) -> None:
    def train_tiny(name: str, *given: str, stop_at: int = 0) -> str:
        arguments = [*common_flags(tmp_path, data, name), *given]
        return launch(main, arguments, tmp_path / "output.txt", partial(prepare, stop_at), ranks=2).output

    train_tiny("whole", "--epochs=3", *SMALL, *flags)
    whole = run_dir.newest_run(tmp_path / "whole")
    output = train_tiny("a", "--epochs=3", *SMALL, *flags, stop_at=8)
    assert output.count("Stopped by SIGTERM: saved ") == 1, output
    run = run_dir.newest_run(tmp_path / "a")
    stopped_in = io.load(run / "Optimizer_Last.pth")
    train_tiny("a", f"--resume_dir={run}")
    assert run_dir.newest_run(tmp_path / "a") == run
    suffix = "3_9" if "--batch_size=4" in flags else "3_18"
    assert any(run.glob("EMA_*.pth")) == (flags is ADAMW)
    for average in run.glob("EMA_*.pth"):
        assert_same(io.load(whole / average.name), io.load(average))
    for one, other in zip(states(whole, suffix), states(run, suffix), strict=True):
        assert_same({**one, "settings": 0}, {**other, "settings": 0})
    assert 0 < stopped_in["epoch_step"] <= 6


def test_a_dead_rank_ends_the_run_which_continues(train, data, tmp_path) -> None:  # noqa: F811
    kill = partial(signal_at, TrainingStep, "backward", 8, signal.SIGKILL, to="rank", rank=1)
    ended = launch(main, [*common_flags(tmp_path, data), *SLOW], tmp_path / "output.txt", kill, ranks=2)
    assert ended.code != 0
    assert "another process of this run ended" in ended.output
    run = run_dir.newest_run(tmp_path / "a")
    assert not list(run.glob(".*partial*"))
    for file in run.glob("*.pth"):
        io.load(file)  # no file is cut
    epoch = run_dir.load_state(run).epoch
    _, output = train(2, f"--resume_dir={run}", f"--epochs={epoch + 1}", data=data)
    assert "resuming" in output


def test_ranks_save_and_end_when_torchrun_is_killed(start, data, tmp_path) -> None:  # noqa: F811
    process = start(2, *SLOW, data=data)
    wait_for(process, tmp_path / "a", "Optimizer_1_*.pth")
    process.kill()
    output = ended_output(process, 60)
    assert output.count(f"error: torchrun (process {process.pid}) has ended.") >= 1
    assert "Stopped by SIGTERM: saved " in output
