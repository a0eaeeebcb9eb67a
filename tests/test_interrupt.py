"""Training that is interrupted within an epoch, and goes on: signals, the rolling checkpoint, and how it ends."""

import os
import signal
from pathlib import Path

import pytest

from tests.test_train import SMALL, assert_equal_states, run_training, states, tiny_networks  # noqa: F401
from util.checkpoint import io, run_dir
from util.errors import Interrupted
from util.training import engine

FLAGS = ("--epochs=2", *SMALL)
STEPS = 6  # an epoch of the data below has


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_people, tiny_data) -> Path:
    """Return a data folder with three people of eight images, and the verification sets of tiny_data."""
    root = tmp_path_factory.mktemp("interrupt")
    make_people(root / "imgs", people=3, images=8)
    for name in ("lfw_align_112", "AgeDB"):
        (root / name).symlink_to(tiny_data / name)
    return root


@pytest.fixture
def send(monkeypatch):
    """Return a function: send(owner, name, call, number) sends a signal in the given call of a function."""

    def schedule(owner: object, name: str, call: int = 1, number: int = signal.SIGTERM) -> None:
        original, calls = getattr(owner, name), []

        def interrupted(*args, **kwargs):
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, interrupted)

    return schedule


def optimizer(run: Path, name: str = "2_12") -> dict:
    """Return the tensors of an Optimizer file: momentum, and the state of the random generator."""
    state = io.load(run / f"Optimizer_{name}.pth")
    momentum = {str(key): entry["momentum_buffer"] for key, entry in state["optimizer"]["state"].items()}
    return momentum | {"rng": state["random_states"]["cpu"]}


@pytest.fixture
def uninterrupted(run_training, data):  # noqa: F811
    return lambda *flags: run_training(*FLAGS, *flags, data=data, name="whole")


def assert_same_run(run: Path, whole: Path, tmp_path: Path, name: str = "a") -> None:
    assert_equal_states(states(run, "2_12"), states(whole, "2_12"))
    assert_equal_states([optimizer(run)], [optimizer(whole)])
    assert (run / "Evaluation.txt").read_text() == (whole / "Evaluation.txt").read_text()
    logs = [tmp_path / f"{each}_log" / folder.name for each, folder in ((name, run), ("whole", whole))]
    assert (logs[0] / "metrics.jsonl").read_text() == (logs[1] / "metrics.jsonl").read_text()
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("step", [1, 4, STEPS, STEPS + 3])
@pytest.mark.parametrize("flags", [(), ("--accumulate=2",), ("--sample_rate=0.5", "--LR_train")])
def test_a_run_interrupted_at_a_step_equals_a_whole_one(
    run_training,  # noqa: F811
    uninterrupted,
    data,
    send,
    tmp_path,
    monkeypatch,
    step,
    flags,
):
    with monkeypatch.context():
        send(engine.TrainingStep, "backward", step)
        with pytest.raises(Interrupted) as stopped:
            run_training(*FLAGS, *flags, data=data)
    monkeypatch.undo()
    run = run_dir.newest_run(tmp_path / "a")
    assert f"Stopped by SIGTERM: saved {run}/Backbone_Last.pth. Continue with: python train.py" in stopped.value.message
    run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
    assert_same_run(run, uninterrupted(*flags), tmp_path)
