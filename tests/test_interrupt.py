"""Training that is interrupted within an epoch, and continues: signals, the rolling checkpoint, how a run ends."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import train
from tests.test_train import ROOT, SMALL, assert_equal_states, run_training, states, tiny_networks  # noqa: F401
from util.checkpoint import io, run_dir
from util.cli.types import Interval
from util.distributed import DistEnv
from util.errors import DataError, Interrupted, RunError
from util.training import control, engine, loop, trainer
from util.training.control import StepControl

pytestmark = pytest.mark.usefixtures("no_plots")

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


@contextmanager
def signal_in(owner: object, name: str, call: int = 1, number: int = signal.SIGTERM) -> Iterator[None]:
    """Send a signal to this process at the start of the given call of a function."""
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        yield


@pytest.fixture(autouse=True)
def restored_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def optimizer(run: Path, name: str = "2_12") -> dict:
    """Return the tensors of an Optimizer file: its buffers, and the state of the random generator."""
    state = io.load(run / f"Optimizer_{name}.pth")
    entries = state["optimizer"]["state"]
    buffers = {f"{index}.{key}": value for index, entry in entries.items() for key, value in entry.items()}
    return buffers | {"rng": state["random_states"]["cpu"]}


@pytest.fixture(scope="module")
def finished() -> dict[tuple[str, ...], Path]:
    """Return the runs without an interruption, by their flags: tests share them."""
    return {}


@pytest.fixture
def uninterrupted(run_training, data, finished):  # noqa: F811
    def run(*flags: str) -> Path:
        if flags not in finished:
            finished[flags] = run_training(*FLAGS, *flags, data=data, name="whole")
        return finished[flags]

    return run


def assert_same_run(run: Path, whole: Path) -> None:
    assert_equal_states(states(run, "2_12"), states(whole, "2_12"))
    assert_equal_states([optimizer(run)], [optimizer(whole)])
    for file in run.glob("EMA_*.pth"):
        assert_equal_states([io.load(file)], [io.load(whole / file.name)])
    assert (run / "Evaluation.txt").read_text() == (whole / "Evaluation.txt").read_text()
    logs = [each.parent.with_name(f"{each.parent.name}_log") / each.name for each in (run, whole)]
    assert (logs[0] / "metrics.jsonl").read_text() == (logs[1] / "metrics.jsonl").read_text()
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("step", [1, 4, STEPS, STEPS + 3])
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--accumulate=2", "--clip_grad_norm=0.5", "--schedule=cosine", "--ema=0.9"),
        ("--sample_rate=0.5", "--LR_train"),
        ("--optimizer=adamw", "--schedule=poly", "--clip_grad_norm=0.5", "--grad_checkpoint"),
    ],
)
def test_an_interrupted_run_equals_a_whole_one(
    run_training,  # noqa: F811
    uninterrupted,
    data,
    tmp_path,
    step,
    flags,
):
    with signal_in(engine.TrainingStep, "backward", step), pytest.raises(Interrupted) as stopped:
        run_training(*FLAGS, *flags, data=data)
    run = run_dir.newest_run(tmp_path / "a")
    assert stopped.value.message == (
        f"Stopped by SIGTERM: saved {run}/Backbone_Last.pth. Continue with: python train.py --resume_dir={run}"
    )
    run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
    assert_same_run(run, uninterrupted(*flags))


def test_interrupted_run_with_loader_processes_equals_a_full_one(run_training, uninterrupted, data, tmp_path):  # noqa: F811
    with signal_in(engine.TrainingStep, "backward", STEPS + 2, signal.SIGUSR1), pytest.raises(Interrupted) as stopped:
        run_training(*FLAGS, "--num_workers=2", data=data)
    assert stopped.value.number == signal.SIGUSR1
    run = run_dir.newest_run(tmp_path / "a")
    run_training(*FLAGS, "--num_workers=2", f"--resume_dir={run}", data=data, backbone="")
    assert_same_run(run, uninterrupted())


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_signal_in_the_evaluation_saves_the_finished_steps(run_training, uninterrupted, data, tmp_path, call):  # noqa: F811
    with signal_in(trainer, "evaluate", call, signal.SIGINT), pytest.raises(Interrupted):
        run_training(*FLAGS, data=data)
    run = run_dir.newest_run(tmp_path / "a")
    state = io.load(run / "Optimizer_Last.pth")
    assert state["epoch_step"] == STEPS and state["epoch"] == (call > 2)
    run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
    assert_same_run(run, uninterrupted())


def test_a_signal_while_an_epoch_is_saved_stops_after_it(run_training, uninterrupted, data, tmp_path):  # noqa: F811
    with signal_in(loop, "save_checkpoint"), pytest.raises(Interrupted, match="15") as stopped:
        run_training(*FLAGS, data=data)
    run = run_dir.newest_run(tmp_path / "a")
    assert f"saved {run}/Backbone_1_6.pth. " in stopped.value.message
    assert not list(run.glob("*_Last.pth"))
    run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
    assert_same_run(run, uninterrupted())


def test_the_rolling_checkpoint_of_a_killed_run_is_continued(run_training, uninterrupted, data, tmp_path):  # noqa: F811
    class Killed(BaseException):
        pass

    calls = []

    def killed(self, *batch):
        calls.append(None)
        if len(calls) == STEPS + 5:
            raise Killed
        return backward(self, *batch)

    backward = engine.TrainingStep.backward
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine.TrainingStep, "backward", killed)
        run_training(*FLAGS, "--save_every=2", data=data)
    run = run_dir.newest_run(tmp_path / "a")
    state = io.load(run / "Optimizer_Last.pth")
    assert (state["epoch"], state["epoch_step"], state["step"]) == (1, 4, STEPS + 4)
    run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
    assert_same_run(run, uninterrupted())


def test_a_kill_in_an_evaluation_loses_no_step(run_training, uninterrupted, data, tmp_path, monkeypatch):  # noqa: F811
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(control, "_EVALUATION_RISK", 0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "evaluate", killed)
        run_training(*FLAGS, data=data)
    run = run_dir.newest_run(tmp_path / "a")
    state = io.load(run / "Optimizer_Last.pth")
    assert (state["epoch"], state["epoch_step"], state["step"]) == (0, STEPS, STEPS)
    run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
    assert_same_run(run, uninterrupted())


@pytest.mark.parametrize(
    ("interval", "seconds", "save"),
    [
        (Interval("15m", seconds=900), 59, False),
        (Interval("15m", seconds=900), 61, True),
        (Interval("5s", seconds=5), 6, True),
        (Interval("3", steps=3), 6000, False),
        (Interval("2", steps=2), 0, True),
        (Interval("none"), 6000, False),
    ],
)
def test_steps_of_a_minute_are_saved_before_an_evaluation(monkeypatch, interval, seconds, save):
    class Signals:
        received = 0

    monkeypatch.setattr(control.time, "monotonic", lambda: 0)
    steps = StepControl(DistEnv(), Signals(), torch.device("cpu"), interval)
    steps.count_step()
    steps.count_step()
    monkeypatch.setattr(control.time, "monotonic", lambda: seconds)
    assert steps.agree(True, before_evaluation=True) and steps.save == save


def test_other_batches_continue_at_the_same_images(run_training, data, tmp_path, capsys):  # noqa: F811
    with signal_in(engine.TrainingStep, "backward", 4), pytest.raises(Interrupted):
        run_training(*FLAGS, data=data)
    run = run_dir.newest_run(tmp_path / "a")
    run_training(*FLAGS, f"--resume_dir={run}", "--batch_size=8", data=data, backbone="")
    assert "other batches than before: continuing at step 2 of the epoch" in capsys.readouterr().out
    assert (run / "Backbone_1_5.pth").is_file() and (run / "Backbone_2_8.pth").is_file()


def test_resume_dir_auto_starts_continues_and_starts_again(run_training, data, tmp_path, capsys):  # noqa: F811
    command = (*FLAGS, "--resume_dir=auto")
    for step in (2, 3):
        with signal_in(engine.TrainingStep, "backward", step), pytest.raises(Interrupted) as stopped:
            run_training(*command, data=data)
        assert stopped.value.message.endswith("The same command continues from there.")
    run = run_training(*command, data=data)
    assert capsys.readouterr().out.count("no run of these settings to continue") == 1
    assert len(list((tmp_path / "a").iterdir())) == 1 and (run / "Backbone_2_12.pth").is_file()
    run_training(*command, data=data)
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_run_stopped_before_its_first_save_leaves_nothing(run_training, data, tmp_path):  # noqa: F811
    with signal_in(trainer.Trainer, "open_log"), pytest.raises(Interrupted) as stopped:
        run_training(*FLAGS, data=data)
    assert stopped.value.message == ("Stopped by SIGTERM: there is no checkpoint yet. Start the same command again.")
    assert [path for path in tmp_path.rglob("*") if "HRTRAIN" in path.name] == []


def test_an_error_of_the_data_saves_the_steps_before_it(run_training, uninterrupted, data, tmp_path, monkeypatch):  # noqa: F811
    def broken(self, epoch, start_step=0):
        for step, batch in enumerate(epoch_of(self, epoch, start_step), start_step):
            if (epoch, step) == (1, 3):
                raise DataError("a.jpg: broken.")
            yield batch

    epoch_of = trainer.TrainLoader.epoch
    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainLoader, "epoch", broken)
        with pytest.raises(DataError, match=r"^a.jpg: broken\. The last good checkpoint is .*_Last\.pth\. Continue"):
            run_training(*FLAGS, data=data)
    run = run_dir.newest_run(tmp_path / "a")
    assert io.load(run / "Optimizer_Last.pth")["step"] == STEPS + 3
    run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
    assert_same_run(run, uninterrupted())


def test_nothing_is_saved_while_steps_are_skipped(run_training, data, tmp_path):  # noqa: F811
    run = run_training("--epochs=1", *SMALL, data=data)
    with pytest.raises(RunError, match=r"at a learning rate of 1e\+30. Lower --lr.*good checkpoint is .*Backbone_Last"):
        run_training("--epochs=2", "--lr=1e30", "--save_every=1", f"--resume_dir={run}", data=data, backbone="")
    assert io.load(run / "Optimizer_Last.pth")["step"] == STEPS + 1  # the step that ruined the weights


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """Mount a small disk at a folder. Skip the test if this user cannot."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk_within_an_epoch_keeps_what_is_saved(run_training, uninterrupted, data, tmp_path, monkeypatch):  # noqa: F811
    def filled(self, *batch):
        calls.append(None)
        if len(calls) == STEPS + 3:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        return backward(self, *batch)

    calls, backward, filler = [], engine.TrainingStep.backward, tmp_path / "a" / "filler"
    with small_disk(tmp_path / "a", "size=8m"):
        with monkeypatch.context() as patch, pytest.raises(RunError, match=r"/a/HRTRAIN.*Free some space"):
            patch.setattr(engine.TrainingStep, "backward", filled)
            run_training(*FLAGS, "--save_every=1", data=data)
        filler.unlink()
        run = run_dir.newest_run(tmp_path / "a")
        for file in run.glob("*.pth"):
            io.load(file)  # no file is cut
        assert io.load(run / "Optimizer_Last.pth")["step"] == STEPS + 2
        run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
        assert_same_run(run, uninterrupted())


def test_read_only_disk_is_one_line_before_training(data, tmp_path, end_of):
    with small_disk(tmp_path / "a", "ro"):
        flags = [f"--data_dir={data}", "--gpu_num=cpu", *SMALL, f"--checkpoint_dir={tmp_path}/a/checkpoints"]
        flags += [f"--{name}={tmp_path / name}" for name in ("best_checkpoint_dir", "log_dir")]
        code, printed = end_of(train.main, flags)
    assert code == 2 and printed == (
        f"error: --checkpoint_dir={tmp_path}/a/checkpoints: cannot be written to (Read-only file system). Name another "
        "folder.\n"
    )


def test_old_epochs_are_deleted_but_not_the_best(run_training, data, tmp_path):  # noqa: F811
    run = run_training("--epochs=6", "--keep_last=2", *SMALL, data=data)
    epochs = sorted({int(path.name.split("_")[1]) for path in run.glob("*.pth")})
    best = io.load(run / "Optimizer_6_36.pth")["best_epoch"]
    assert epochs == sorted({best, 5, 6})
    for epoch in epochs:
        assert len(list(run.glob(f"*_{epoch}_*.pth"))) == 3
    assert len(list((tmp_path / "a_best" / run.name).iterdir())) == 3


def test_run_json_tells_the_run_again(run_training, data, tmp_path):  # noqa: F811
    with signal_in(engine.TrainingStep, "backward", 4), pytest.raises(Interrupted):
        run_training(*FLAGS, data=data)
    run = run_dir.newest_run(tmp_path / "a")
    run_training(*FLAGS, f"--resume_dir={run}", data=data, backbone="")
    first, second = json.loads((tmp_path / "a_log" / run.name / "run.json").read_text())["sessions"]
    assert first["exit"].startswith("Stopped by SIGTERM: saved ") and second["exit"] == "finished"
    assert first["start"] <= first["end"] <= second["start"] <= second["end"]
    assert first["settings"]["epochs"] == 2 and second["settings"]["resume_dir"] == str(run)
    assert first["data"] == second["data"]
    assert (first["data"]["images"], first["data"]["classes"], len(first["data"]["sha256"])) == (24, 3, 64)
    assert first["versions"]["torch"] == torch.__version__ and first["machine"]["host"]
    assert first["command"] == sys.orig_argv and re.fullmatch(r"[0-9a-f]{40}\+?", first["revision"] or "0" * 40)


def test_two_runs_of_a_seed_are_the_same(run_training, uninterrupted, data, tmp_path):  # noqa: F811
    assert_same_run(run_training(*FLAGS, "--deterministic", data=data), uninterrupted())


def test_ranks_stop_and_save_together_after_one_signal():
    class Signals:
        received = 0

    control = StepControl(DistEnv(), Signals(), torch.device("cpu"), Interval("2", steps=2))
    assert control.agree(torch.tensor(True)) and not control.agree(torch.tensor(False))
    control.count_step()
    control.agree(True)
    assert control.save
    control.saved()
    Signals.received = 10
    control.agree(True)
    assert (control.stop, control.save) == (10, False)


def test_a_second_signal_ends_the_process_at_once(data):
    code = (
        "import os, signal, time\nfrom util.distributed import DistEnv\nfrom util.training.control import StopSignals\n"
        "with StopSignals(DistEnv()) as signals:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(signals.received, flush=True)\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (130, "15\n")
    assert ended.stderr == "SIGTERM: saving a checkpoint after this step; a second signal ends at once\n"
