"""Checkpoints that are damaged, mixed, foreign or cut off by a kill; two processes on one run."""

import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from model.backbone import BACKBONES, build_backbone
from model.head import build_head, shard_range
from tests.multiprocess import in_processes
from util.checkpoint import io, run_dir
from util.checkpoint.io import CHECKPOINT_FILES, SR_CHECKPOINT_FILES, RecognitionState, SuperResolutionState
from util.checkpoint.lock import lock_folder
from util.checkpoint.run_dir import Run
from util.checkpoint.sharded import save_sharded_checkpoint
from util.errors import DataError, RunError, UsageError
from util.public_networks import read_public_network
from util.training.optim import build_sgd

ROOT = Path(__file__).parents[1]
SETTINGS = {"backbone": "IR_50", "LR_scale": [4], "epochs": 5, "gpu_num": [0], "save_every": "15m", "data_dir": "d"}


def networks(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return {"Backbone": backbone, "Head": nn.Linear(4, 2, bias=False)}


def state(epoch: int, epoch_step: int = 0, **changes: object) -> RecognitionState:
    content = RecognitionState(
        optimizer={"state": {0: {"momentum_buffer": torch.ones(4, 3)}}, "param_groups": []},
        epoch=epoch,
        step=epoch * 10 + epoch_step,
        best=0.5,
        best_epoch=epoch,
        rng_state=io.get_rng_state(),
        classes=["Ann", "Bob"],
        settings=SETTINGS,
        epoch_step=epoch_step,
        progress={"loss": 1.5},
    )
    return replace(content, **changes)


@pytest.fixture
def run(tmp_path) -> Run:
    return run_dir.new_run(*folders(tmp_path), prefix="HRTRAIN", now=datetime(2022, 7, 28, 19, 15))


def folders(root: Path) -> tuple[str, str, str]:
    return str(root / "checkpoints"), str(root / "best"), str(root / "log")


def save(run: Run, epoch: int, epoch_step: int = 0, **changes: object) -> Path:
    return io.save_checkpoint(
        run.checkpoints,
        networks(epoch * 10 + epoch_step),
        state(epoch, epoch_step, **changes),
        rolling=epoch_step > 0,
    )


def resume(run: Run, path: Path | None = None) -> tuple[run_dir.Resumable, Run]:
    root = run.checkpoints.parents[1]
    resumed = run_dir.load_resumable(path or run.checkpoints)
    return resumed, run_dir.resumed_run(resumed, *folders(root))


def position(resumed: run_dir.Resumable) -> tuple[int, int]:
    """Return where a checkpoint is, after a check that all its files are of this place."""
    place = resumed.state.epoch, resumed.state.epoch_step
    for kind, network in networks(place[0] * 10 + place[1]).items():
        for key, value in network.state_dict().items():
            assert torch.equal(resumed.networks[kind][key], value)
    return place


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Damage in a file.


@pytest.mark.parametrize("kind", CHECKPOINT_FILES)
def test_every_flipped_bit_is_noticed(run, kind):
    file = save(run, 1).with_name(f"{kind}_1_10.pth")
    content = file.read_bytes()
    generator = random.Random(0)
    ends = [*range(64), *range(len(content) - 60, len(content))]  # where zip files have their headers
    for place in [*ends, *(generator.randrange(len(content)) for _ in range(100))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << generator.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(DataError, match=rf"{kind}_1_10\.pth: (is damaged|not a checkpoint)"):
            io.load(file, mmap=bool(place % 2))
    file.write_bytes(content)
    io.load(file)


@pytest.mark.parametrize("kind", CHECKPOINT_FILES)
def test_every_truncation_is_noticed(run, kind):
    file = save(run, 1).with_name(f"{kind}_1_10.pth")
    content = file.read_bytes()
    generator = random.Random(0)
    for kept in [*range(4), *range(len(content) - 40, len(content)), *generator.sample(range(len(content)), 20)]:
        file.write_bytes(content[:kept])
        with pytest.raises(DataError, match=rf"{kind}_1_10\.pth: (is damaged|not a checkpoint)") as caught:
            io.load(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(content + b"\0")
    with pytest.raises(DataError, match="is damaged"):
        io.load(file)


def test_damage_in_files_of_other_programs_is_named(tmp_path):
    file = tmp_path / "Backbone.pth"
    torch.save({"weight": torch.zeros(1000), "bias": torch.ones(7)}, file)
    assert torch.equal(io.load(file, mmap=True)["bias"], torch.ones(7))
    damage(file)
    with pytest.raises(DataError, match=r"Backbone\.pth: is damaged \(the CRC-32 of .*/data/0 differs\)"):
        io.load(file)


def test_other_programs_read_saved_files(run):
    file = save(run, 1)
    for mmap in (False, True):
        content = torch.load(file, mmap=mmap, weights_only=True)
        assert list(content) == list(networks()["Backbone"].state_dict())
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    before = file.read_bytes()
    assert save(run, 1).read_bytes() == before  # no time and no process is in it


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(5_000_000))
    with pytest.raises(DataError, match="is damaged"):
        io.load(tmp_path / "a.pth")


# Files that are no backbones.


@pytest.fixture
def few_backbones(monkeypatch):
    """Compare files with two backbones only, which saves seconds."""
    monkeypatch.setattr(
        "model.backbone.BACKBONES", {name: BACKBONES[name] for name in ("MobileFaceNet_050", "MobileFaceNet_025")}
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.usefixtures("few_backbones")
def test_the_message_says_what_another_file_holds(tmp_path, capfd):
    file = tmp_path / "Backbone.pth"
    good = build_backbone("MobileFaceNet_025", embedding_size=32).state_dict()
    assert read_public_network(write(file, good)).name == "MobileFaceNet_025"
    assert read_public_network(write(file, {f"module.{key}": value for key, value in good.items()}))
    assert read_public_network(write(file, {"args": Path("x"), "state_dict": good})).name == "MobileFaceNet_025"
    first = next(iter(good))
    for content, message in (
        (
            networks()["Backbone"],
            r"holds Python objects, .* code of torch\.nn\.modules\.container\.Sequential is not run",
        ),
        (
            {"epoch": 3, "model": good},
            r"under the key 'model'\. Take them out: torch\.save\(torch\.load\('.*",
        ),
        ({"model": OrderedDict(good)}, r"under the key 'model'\. Take them out"),
        (
            {**good, "fc.weight": torch.zeros(2, 3)},
            r"nearest is MobileFaceNet_025, but fc\.weight is \(2, 3\) in the file",
        ),
        (
            {k: v for k, v in good.items() if k != first},
            rf"MobileFaceNet_025, but {first} is absent in the file and \(",
        ),
        (state(1).to_dict(), "not a backbone's state dict .*it is the state of an optimizer"),
        ({"state": {}, "param_groups": []}, "not a backbone's state dict .*it is the state of an optimizer"),
        ({"weight": torch.zeros(3, 4)}, "not a backbone's state dict .*it is the weight of a head"),
        ({"weight": 3, 4: []}, "not a backbone's state dict"),
        ([1, 2], "holds a list. A checkpoint holds a dictionary"),
    ):
        check_message(write(file, content), message)
    torch.jit.script(nn.Linear(2, 2)).save(file)
    check_message(file, r"holds a TorchScript program.* torch\.save\(model\.state_dict\(\), FILE\)")
    file.write_text("# a text file\n")
    check_message(file, "not a checkpoint of PyTorch, or damaged")
    assert capfd.readouterr() == ("", "")


def write(file: Path, content: object) -> Path:
    torch.save(content, file)
    return file


def check_message(file: Path, message: str) -> None:
    with pytest.raises(DataError, match=rf"^{re.escape(str(file))}: .*{message}") as caught:
        read_public_network(file)
    assert str(caught.value).isprintable() and str(caught.value)[-1] in ".)"


@pytest.mark.usefixtures("few_backbones")
def test_the_code_in_a_message_takes_the_weights_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = build_backbone("MobileFaceNet_025", embedding_size=32).state_dict()
    with pytest.raises(DataError) as caught:
        read_public_network(write(tmp_path / "wrapped.pth", {"model": good}))
    exec(str(caught.value).partition("Take them out: ")[2].removesuffix("."), {"torch": torch})
    assert read_public_network(Path("Backbone.pth")).name == "MobileFaceNet_025"


def test_a_backbone_of_elsewhere_cannot_be_resumed(tmp_path):
    for name, message in (
        (
            "model.pth",
            "needs a Backbone file of a run of this toolkit.*start from the weights of a network is not to resume",
        ),
        ("Backbone_ms1m.pth", r"Head_ms1m\.pth: missing\. Resuming needs the files Backbone, Head, Optimizer"),
    ):
        with pytest.raises(DataError, match=message):
            run_dir.load_resumable(write(tmp_path / name, networks()["Backbone"].state_dict()))


# Which checkpoint is resumed.


def test_resume_takes_the_newest_of_epochs_and_rolling(run):
    for epoch, epoch_step in ((1, 0), (1, 3), (1, 6), (2, 0), (2, 3)):
        save(run, epoch, epoch_step)
        assert position(run_dir.load_resumable(run.checkpoints)) == (epoch, epoch_step)
        assert run_dir.load_state(run.checkpoints).epoch_step == epoch_step
    assert run_dir.load_resumable(run.checkpoints).state.progress == {"loss": 1.5}
    assert run_dir.find_backbone(run.checkpoints).name == "Backbone_2_20.pth"
    save(run, 3)
    assert position(run_dir.load_resumable(run.checkpoints)) == (3, 0)
    run_dir.remove_rolling(run.checkpoints)
    assert not list(run.checkpoints.glob("*Last*")) and position(run_dir.load_resumable(run.checkpoints)) == (3, 0)


def test_a_rolling_checkpoint_is_all_that_a_first_epoch_has(run):
    file = save(run, 0, 4)
    assert names(run.checkpoints) == {f"{kind}_Last.pth" for kind in CHECKPOINT_FILES}
    assert run_dir.find_backbone(run.checkpoints) == file == run.checkpoints / "Backbone_Last.pth"
    resumed, same = resume(run)
    assert position(resumed) == (0, 4) and same == run
    assert names(run.checkpoints) == {f"{kind}_Last.pth" for kind in CHECKPOINT_FILES}


def test_a_rolling_checkpoint_of_super_resolution_is_resumed(tmp_path):
    sr = SuperResolutionState(
        optimizer={}, epoch=1, step=13, best=30.0, best_epoch=1, settings={}, epoch_step=3, data={"images": 5}
    )
    for rolling, epoch_step in ((False, 0), (True, 3)):
        saved = replace(sr, epoch_step=epoch_step, step=10 + epoch_step)
        io.save_checkpoint(tmp_path, {"SR": nn.Linear(2, 2)}, saved, rolling=rolling)
    assert names(tmp_path) == {"SR_1_10.pth", "Optimizer_1_10.pth", "SR_Last.pth", "Optimizer_Last.pth"}
    assert run_dir.load_resumable(tmp_path, SR_CHECKPOINT_FILES).state == sr
    run_dir.remove_rolling(tmp_path)
    assert names(tmp_path) == {"SR_1_10.pth", "Optimizer_1_10.pth"}


@pytest.mark.parametrize("kind", CHECKPOINT_FILES)
@pytest.mark.parametrize("fault", ["damaged", "missing", "empty", "of another save"])
@pytest.mark.parametrize("rolling", [True, False])
def test_a_bad_checkpoint_is_passed_over_and_both_are_named(run, capsys, kind, fault, rolling):
    save(run, 1)
    bad = save(run, 1, 5) if rolling else save(run, 2)
    file = bad.with_name(bad.name.replace("Backbone", kind))
    if fault == "damaged":
        damage(file)
    elif fault == "missing" and kind != "Backbone":
        file.unlink()
    elif fault == "of another save":
        other = run_dir.new_run(*folders(run.log.parent / "other"), prefix="HRTRAIN", now=datetime.now())
        file.write_bytes(save(other, 3).with_name(f"{kind}_3_30.pth").read_bytes())
        kind = "Backbone" if kind == "Optimizer" else kind
    else:
        file.write_bytes(b"")
    named = bad.with_name(bad.name.replace("Backbone", kind))
    with pytest.raises(DataError, match=re.escape(str(named))):
        run_dir.load_resumable(bad)
    resumed, _ = resume(run)
    assert position(resumed) == (1, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{named}: ") and line.endswith(f"Taken instead: {run.checkpoints / 'Backbone_1_10.pth'}")


def test_a_run_without_any_good_checkpoint_names_the_newest(run):
    for epoch in (1, 2):
        damage(save(run, epoch))
    with pytest.raises(DataError, match=r"Backbone_2_20\.pth: is damaged"):
        run_dir.load_resumable(run.checkpoints)
    with pytest.raises(DataError, match=r"Backbone_2_20\.pth: is damaged"):
        read_public_network(run_dir.find_backbone(run.checkpoints))


def test_an_epoch_resumed_by_name_sets_a_newer_rolling_aside(run):
    older = save(run, 1)
    save(run, 1, 5)
    resumed, _ = resume(run, older)
    assert position(resumed) == (1, 0)
    assert names(run.checkpoints / "superseded") == {f"{kind}_Last.pth" for kind in CHECKPOINT_FILES}
    assert position(run_dir.load_resumable(run.checkpoints)) == (1, 0)


def test_a_rolling_checkpoint_sets_later_epochs_aside(run):
    save(run, 3)
    file = save(run, 1, 5)
    resume(run, file)
    assert names(run.checkpoints / "superseded") == {f"{kind}_3_30.pth" for kind in CHECKPOINT_FILES}
    assert position(run_dir.load_resumable(run.checkpoints)) == (1, 5)


@pytest.mark.parametrize("kind", CHECKPOINT_FILES)
def test_damaged_best_files_are_restored_from_their_epoch(run, kind):
    run_dir.save_best(run, save(run, 1))
    save(run, 2, best_epoch=1)
    best = run.best / f"{kind}_Best.pth"
    best.unlink()
    best.write_bytes(b"")
    resume(run)
    assert position(run_dir.load_resumable(run.best)) == (1, 0)


def test_best_files_of_a_damaged_epoch_are_no_error(run, capsys):
    run_dir.save_best(run, save(run, 1))
    save(run, 2, best_epoch=1)
    damage(run.best / "Head_Best.pth")  # the same file on the disk as the epoch's
    resumed, _ = resume(run)
    assert position(resumed) == (2, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{run.checkpoints / 'Head_1_10.pth'}: is damaged" in line and "The next best epoch replaces" in line
    with pytest.raises(DataError, match=r"Head_Best\.pth: is damaged"):
        run_dir.load_resumable(run.best)


# Kills.


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process and return its exit code."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("step", range(9))
def test_a_kill_within_a_save_leaves_one_whole_checkpoint(run, monkeypatch, step):
    save(run, 1, 3)
    count = []

    def killed_at(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            count.append(1)
            if len(count) > step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    def work() -> None:
        monkeypatch.setattr(os, "fsync", killed_at(os.fsync))
        monkeypatch.setattr(Path, "replace", killed_at(os.replace))
        save(run, 1, 6)

    assert in_child(work) == -signal.SIGKILL
    resumed, _ = resume(run)
    assert position(resumed) == ((1, 3) if step < 4 else (1, 6))  # three files are synced before the first rename
    assert names(run.checkpoints) == {f"{kind}_Last.pth" for kind in CHECKPOINT_FILES}
    assert position(run_dir.load_resumable(run.checkpoints)) == position(resumed)


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_within_save_best_is_repaired_at_resume(run, monkeypatch, renames):
    run_dir.save_best(run, save(run, 1))
    second = save(run, 2)
    done = []

    def replace_until_killed(source: Path, target: Path) -> Path:
        if len(done) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(os.replace(source, target))
        return target

    def work() -> None:
        monkeypatch.setattr(Path, "replace", replace_until_killed)
        run_dir.save_best(run, second)

    assert in_child(work) == -signal.SIGKILL
    resume(run)
    assert position(run_dir.load_resumable(run.best)) == (2, 0)
    assert names(run.best) == {f"{kind}_Best.pth" for kind in CHECKPOINT_FILES}


def save_sharded(folder: Path, rank: int, world_size: int) -> int:
    torch.manual_seed(0)
    backbone = nn.Linear(6, 4)
    head = build_head("ArcFace", 4, 7, rows=shard_range(7, rank, world_size))
    optimizer = build_sgd((backbone, head), 0.1, 0.9, weight_decay=0, dtype=torch.float32)
    for step in (2, 4):
        head(backbone(torch.ones(3, 6)), torch.zeros(3, dtype=torch.long)).sum().backward()
        optimizer.step()
        at_step = state(1, step, optimizer=optimizer.state_dict())
        save_sharded_checkpoint(folder, backbone, head, optimizer=optimizer, state=at_step, rolling=True)
    return io.checkpoint_bytes({"Backbone": backbone, "Head": head}, optimizer)


def test_ranks_replace_a_rolling_checkpoint_together(tmp_path):
    sizes = in_processes(2, tmp_path, partial(save_sharded, tmp_path))
    resumed = run_dir.load_resumable(tmp_path)
    assert (resumed.state.epoch, resumed.state.epoch_step) == (1, 4)
    assert resumed.networks["Head"]["weight"].shape == (7, 4)
    assert {path.name for path in tmp_path.glob("*.pth")} == {f"{kind}_Last.pth" for kind in CHECKPOINT_FILES}
    assert not list(tmp_path.glob(".*"))
    weights = 6 * 4 + 4 + 7 * 4
    assert sizes == [2 * 4 * weights] * 2  # float32 weights and momentum, the full head on every rank


@pytest.mark.parametrize("removed", range(1, 3))
def test_a_kill_while_a_rolling_checkpoint_is_removed(run, monkeypatch, capsys, removed):
    save(run, 1, 3)
    save(run, 2)
    done = []

    def unlink(path: Path, missing_ok: bool) -> None:
        if path.exists():
            if len(done) == removed:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(os.unlink(path))

    def work() -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        run_dir.remove_rolling(run.checkpoints)

    assert in_child(work) == -signal.SIGKILL
    assert position(resume(run)[0]) == (2, 0) and capsys.readouterr().out == ""


# Old checkpoints, empty runs and full disks.


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [(None, 1, {1, 2, 3, 4}), (2, 1, {1, 3, 4}), (2, 4, {3, 4}), (1, 3, {3, 4}), (9, 4, {1, 2, 3, 4})],
)
def test_old_epochs_are_deleted_but_the_best(run, keep_last, best, kept):
    for epoch in (1, 2, 3, 4):
        save(run, epoch)
    io.save_checkpoint(run.checkpoints, networks(), state(4, 2), rolling=True)
    others = {"Backbone_Last.pth", "Head_Last.pth", "Optimizer_Last.pth", "my_1_10.pth", "Evaluation.txt"}
    for name in ("my_1_10.pth", "Evaluation.txt"):
        (run.checkpoints / name).touch()
    run_dir.remove_old_epochs(run, keep_last, best)
    assert names(run.checkpoints) == others | {f"{kind}_{n}_{n}0.pth" for kind in CHECKPOINT_FILES for n in kept}


def test_incomplete_epochs_do_not_count_among_those_kept(run):
    for epoch in (1, 2, 3):
        save(run, epoch)
    (run.checkpoints / "Optimizer_3_30.pth").unlink()
    run_dir.remove_old_epochs(run, 1, 2)
    assert position(run_dir.load_resumable(run.checkpoints)) == (2, 0)
    assert not list(run.checkpoints.glob("*_1_10.pth"))


def test_an_empty_run_is_discarded(run):
    run.log.mkdir(parents=True)
    made = ["metrics.jsonl", "run.json", "samples.png", "events.out.tfevents.123.host"]
    for file in (*(run.log / name for name in made), run.checkpoints / ".Backbone_1_10.1.partial.pth"):
        file.touch()
    (run.checkpoints / ".Backbone_1_10.1.partial.pth").rename(
        run.checkpoints / f".Backbone_1_10.{os.getpid()}.partial.pth"
    )
    with run_dir.lock_run(run):
        run_dir.discard_empty_run(run)
    assert not run.checkpoints.exists() and not run.log.exists() and not run.best.exists()


def test_a_run_with_a_checkpoint_or_notes_is_not_discarded(run):
    run.log.mkdir(parents=True)
    for file in (run.log / "metrics.jsonl", run.log / "notes.txt"):
        file.touch()
    run_dir.discard_empty_run(run)
    assert names(run.log) == {"notes.txt"} and not run.checkpoints.exists()
    run.checkpoints.mkdir()
    (run.log / "metrics.jsonl").touch()
    save(run, 0, 1)
    run_dir.discard_empty_run(run)
    assert (run.log / "metrics.jsonl").exists() and position(run_dir.load_resumable(run.checkpoints)) == (0, 1)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_checkpoint_bytes_estimates_a_checkpoint(tmp_path, name):
    modules = {"Backbone": nn.Linear(300, 500), "Head": nn.Linear(500, 300, bias=False)}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1, **options)
    before = io.checkpoint_bytes(modules, optimizer)
    modules["Head"](modules["Backbone"](torch.ones(1, 300))).sum().backward()
    optimizer.step()
    io.save_checkpoint(tmp_path, modules, state(1, optimizer=optimizer.state_dict()))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert before == io.checkpoint_bytes(modules, optimizer) == pytest.approx(size, rel=0.03)


def test_a_disk_without_room_for_a_checkpoint_is_named(tmp_path):
    io.check_free_space(tmp_path, 1000, "--checkpoint_dir")
    with pytest.raises(
        UsageError, match=r"^--checkpoint_dir=/\S+: a checkpoint takes 10,0\S+\.0 MB, .* Free some space"
    ):
        io.check_free_space(tmp_path, 10**22, "--checkpoint_dir")
    with pytest.raises(RunError, match=rf"^{tmp_path}: a checkpoint takes .* continue with --resume_dir={tmp_path}\.$"):
        io.check_free_space(tmp_path, 10**22)


# Two processes on one run.

HOLD = "import sys; from pathlib import Path; from util.checkpoint.lock import lock_folder\n"
HOLD += "with lock_folder(Path(sys.argv[1])): print('held', flush=True); input()"


@pytest.fixture
def holder(run):
    """Start a process that holds the lock of the run."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, run.checkpoints], stdin=pipe, stdout=pipe, cwd=ROOT) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_changes_nothing(run, holder):
    older = save(run, 1)
    save(run, 2)
    before = names(run.checkpoints)
    message = rf"^{run.checkpoints}: process {holder.pid} on {os.uname().nodename} writes this run\. Stop it, or wait"
    with pytest.raises(RunError, match=message), run_dir.lock_run(run):
        pass
    with pytest.raises(RunError, match=message):
        resume(run, older)
    with pytest.raises(RunError, match=message):
        run_dir.find_run_to_continue(run.checkpoints.parent, SETTINGS)
    assert names(run.checkpoints) == before


def test_the_lock_of_a_killed_process_is_taken_over(run, holder, capsys):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run_dir.lock_run(run):
        assert (run.checkpoints / "run.lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    assert capsys.readouterr().out == ""


def test_a_lock_is_held_until_its_block_ends(run):
    def try_to_lock() -> None:
        with lock_folder(run.checkpoints):
            os._exit(7)

    def in_new_process() -> int:
        command = [sys.executable, "-c", HOLD, run.checkpoints]
        return subprocess.run(command, cwd=ROOT, input=b"\n", capture_output=True).returncode

    save(run, 1)
    with run_dir.lock_run(run):
        resume(run)  # locks once more
        with lock_folder(run.checkpoints):
            pass
        assert in_new_process() == 1
        assert in_child(try_to_lock) in (0, 7)  # a loader worker that ends does not release it
        assert in_new_process() == 1
    assert in_new_process() == 0


def test_a_file_system_without_locks_gives_a_warning(run, monkeypatch, capsys):
    def fail(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fail)
    with run_dir.lock_run(run):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        "run.lock: cannot be locked (No locks available). Start no second process that writes this run."
    )


# --resume_dir auto.


def started(run: Run, minute: int, **settings: object) -> Run:
    """Make a later run with one checkpoint in its second epoch."""
    root = run.checkpoints.parents[1]
    other = run_dir.new_run(*folders(root), prefix="HRTRAIN", now=datetime(2023, 1, 1, 0, minute))
    save(other, 1, 3, settings=SETTINGS | settings)
    return other


def test_auto_continues_the_newest_unfinished_run(run):
    parent = run.checkpoints.parent
    assert run_dir.find_run_to_continue(parent, SETTINGS) is None
    assert run_dir.find_run_to_continue(parent / "none", SETTINGS) is None
    first = started(run, 1)
    second = started(run, 2, gpu_num=[0, 1], save_every="5m", resume_dir="auto", of_a_later_version=3)
    started(run, 3, backbone="IR_101")
    assert run_dir.find_run_to_continue(parent, SETTINGS | {"newer": 1}) == second.checkpoints
    save(second, 5)  # all epochs
    assert run_dir.find_run_to_continue(parent, SETTINGS) == first.checkpoints
    assert run_dir.find_run_to_continue(parent, SETTINGS | {"data_dir": "other"}) is None
    assert run_dir.find_run_to_continue(parent, SETTINGS, network="SR") is None


def test_auto_reads_settings_of_earlier_versions(run):
    earlier = started(run, 1, LR_scale=4)
    assert run_dir.find_run_to_continue(run.checkpoints.parent, SETTINGS) == earlier.checkpoints


@pytest.mark.parametrize("kind", CHECKPOINT_FILES)
def test_auto_passes_over_a_damaged_run(run, capsys, kind):
    good = started(run, 1)
    bad = started(run, 2).checkpoints / f"{kind}_Last.pth"
    bad.write_bytes(bad.read_bytes()[:-1])
    assert run_dir.find_run_to_continue(run.checkpoints.parent, SETTINGS) == good.checkpoints
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{bad}: is damaged") and line.endswith("This run is passed over.")


def test_auto_does_not_read_runs_with_other_settings(run, monkeypatch):
    started(run, 1, backbone="IR_101")
    monkeypatch.setattr(io, "_check_bytes", lambda path: pytest.fail(f"read {path}"))
    assert run_dir.find_run_to_continue(run.checkpoints.parent, SETTINGS) is None


def test_auto_continues_a_run_of_super_resolution(tmp_path):
    folder = tmp_path / "SR_x4_2022-01-01-00-00"
    folder.mkdir()
    sr = SuperResolutionState(
        optimizer={}, epoch=1, step=10, best=30.0, best_epoch=1, settings={"scale": 4, "epochs": 2}, data={}
    )
    io.save_checkpoint(folder, {"SR": nn.Linear(2, 2)}, sr)
    for settings, expected in (({"scale": 4, "epochs": 2}, folder), ({"scale": 2, "epochs": 2}, None)):
        assert run_dir.find_run_to_continue(tmp_path, settings, network="SR") == expected
