"""Signals in each phase of a training, alone and under torchrun, and kills at random moments."""

import itertools
import os
import random
import signal
from collections.abc import Callable
from functools import partial

import pytest

import train
from model.backbone import BACKBONES
from tests.multiprocess import Launched, launch, signal_at
from tests.test_interrupt import data  # noqa: F401
from tests.test_train import SMALL, TinyNet, assert_equal_states, states
from util.checkpoint import io, run_dir
from util.training import engine, loop, trainer

# The function whose call begins a phase, which call of it, and the step and the name of what is then saved.
# An epoch has 6 steps.
PHASES = {
    "start-up": (trainer.Trainer, "check_images", 1, 0, ""),
    "first batch": (engine.TrainingStep, "backward", 1, 1, "Last"),
    "mid-epoch": (engine.TrainingStep, "backward", 9, 9, "Last"),
    "validation": (trainer, "evaluate", 3, 12, "Last"),
    "save": (loop, "check_free_space", 3, 12, "2_12"),
}
SIGNALS = [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM]  # one for each phase
KILLS = int(os.environ.get("KILLS", "6"))

Start = Callable[..., Launched]


def use_tiny_network() -> None:
    BACKBONES["MobileFaceNet"] = TinyNet


def send_at(*moments: tuple[str, int]) -> None:
    """Let the program receive a signal when its rank 0 begins a phase."""
    use_tiny_network()
    for phase, number in moments:
        signal_at(*PHASES[phase][:3], number)


@pytest.fixture
def start(tmp_path, data) -> Start:  # noqa: F811
    """Return start(prepare, *flags), which trains in folders of tmp_path until the end: see launch()."""
    folders = [f"--{name}={tmp_path / name}" for name in ("checkpoint_dir", "best_checkpoint_dir", "log_dir")]
    common = [*SMALL, *folders, f"--data_dir={data}", "--gpu_num=cpu", "--backbone=MobileFaceNet", "--resume_dir=auto"]

    def run(prepare: Callable[[], None], *flags: str, **options) -> Launched:
        return launch(train.main, [*common, *flags], tmp_path / "output.txt", prepare, **options)

    return run


@pytest.mark.parametrize(("phase", "number"), list(zip(PHASES, SIGNALS, strict=True)))
@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_in_any_phase_saves_and_ends_all(start, tmp_path, ranks, phase, number):
    flags = ("--epochs=400", "--num_workers=2", f"--batch_size={4 // ranks}")
    ended = start(partial(send_at, (phase, number)), *flags, ranks=ranks)
    assert ended.code == (128 + number if ranks == 1 else 1)
    assert ended.output.count("Traceback") == ranks - 1  # of torchrun
    assert not list(tmp_path.rglob("*partial*"))
    step, name = PHASES[phase][3:]
    if not name:
        line = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "error: torchrun was stopped, or "}[number]
        assert line in ended.output.splitlines()
        assert not list(tmp_path.rglob("HRTRAIN*"))
        return
    run = run_dir.newest_run(tmp_path / "checkpoint_dir")
    line = f"Stopped by {signal.Signals(number).name}: saved {run}/Backbone_{name}.pth. The same command continues "
    assert ended.output.count(line) == 1
    state = io.load(run / f"Optimizer_{name}.pth")
    assert (state["step"], (run / "Optimizer_Last.pth").exists()) == (step, name == "Last")


@pytest.mark.parametrize(
    ("first", "second"),
    [("first batch", "first batch"), ("mid-epoch", "mid-epoch"), ("validation", "save"), ("save", "save")],
)
def test_second_signal_in_any_phase_ends_all_at_once(start, tmp_path, first, second):
    prepare = partial(send_at, (second, signal.SIGTERM), (first, signal.SIGINT))
    ended = start(prepare, "--epochs=400", "--num_workers=2")
    assert ended.code == 128 + signal.SIGTERM
    assert "Traceback" not in ended.output and "Stopped by" not in ended.output
    names = {file.name for file in tmp_path.glob("checkpoint_dir/*/*.pth")}
    assert names == ({f"{kind}_1_6.pth" for kind in io.CHECKPOINT_FILES} if PHASES[first][3] > 6 else set())
    for file in tmp_path.rglob("*.pth"):
        io.load(file)  # no file is cut


def test_two_signals_to_torchrun_save_and_end_all(start, tmp_path):
    prepare = partial(send_at, ("mid-epoch", signal.SIGTERM), ("mid-epoch", signal.SIGTERM))
    ended = start(prepare, "--epochs=400", "--batch_size=2", "--num_workers=0", ranks=2)
    assert ended.code == 1 and "Stopped by SIGTERM: saved " in ended.output
    run = run_dir.newest_run(tmp_path / "checkpoint_dir")
    assert io.load(run / "Optimizer_Last.pth")["step"] >= 9


def kill_at(moment: int) -> None:
    """Kill this process at a moment: before a training step, a sync to the disk or a rename, which are counted."""
    use_tiny_network()
    moments = itertools.count(1)

    def killed(original: Callable) -> Callable:
        def function(*args, **kwargs):
            if next(moments) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return function

    for owner, name in ((engine.TrainingStep, "backward"), (os, "fsync"), (os, "replace")):
        setattr(owner, name, killed(getattr(owner, name)))


def test_run_killed_at_random_moments_ends_alike(start, tmp_path):
    """A step is followed by a save of the rolling checkpoint. KILLS=50 in the environment kills 50 times."""
    epochs = 2 * KILLS + 12
    flags = (f"--epochs={epochs}", "--num_workers=0", "--save_every=1", "--keep_last=2")
    rng = random.Random(KILLS)
    in_saves, resumed = 0, 0
    for _ in range(KILLS):
        ended = start(partial(kill_at, rng.randint(1, 100)), *flags)
        assert ended.code == -signal.SIGKILL and "error" not in ended.output, ended.output
        resumed += "resuming" in ended.output
        in_saves += any(tmp_path.glob("checkpoint_dir/*/.*"))
    assert resumed > KILLS / 2 and in_saves > KILLS / 4
    print(f"{KILLS} kills, {in_saves} of them within a save, {resumed} of them after a resume")
    last = f"{epochs}_{6 * epochs}"
    runs = []
    for name in ("killed", "whole"):
        assert start(use_tiny_network, *flags).code == 0
        (tmp_path / "checkpoint_dir").rename(tmp_path / name)  # the next start finds no run to continue
        (file,) = tmp_path.glob(f"{name}/*/Backbone_{last}.pth")  # a kill before the first save leaves an empty run
        runs.append(file.parent)
    assert_equal_states(states(runs[0], last), states(runs[1], last))
    logs = [tmp_path / "log_dir" / run.name / "metrics.jsonl" for run in runs]
    assert logs[0].read_text() == logs[1].read_text()
