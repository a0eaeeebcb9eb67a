"""train.py, run as a user runs it: what it leaves, how it goes on, and how it refuses."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from config import parse_train
from model.backbone import BACKBONES
from util.checkpoint import io, run_dir
from util.data.loader import ImageFolder
from util.data.recordio import write_identities
from util.distributed import DistEnv
from util.errors import DataError, RunError, UsageError
from util.evaluate import evaluate
from util.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_plots")

ROOT = Path(__file__).parents[1]


class TinyNet(nn.Sequential):
    """Stands in for a backbone where its depth does not matter: fast, with batch norm and dropout."""

    def __init__(self, embedding_size: int = 32, channels: int = 4):
        super().__init__(
            nn.Conv2d(3, channels, 7, stride=7),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(channels * 16 * 16, embedding_size),
        )


@pytest.fixture(autouse=True)
def tiny_networks(request, monkeypatch):
    """Trains tiny networks under the names of real ones, but in the slow tests."""
    if "slow" not in request.keywords:
        monkeypatch.setitem(BACKBONES, "MobileFaceNet", TinyNet)
        monkeypatch.setitem(BACKBONES, "iresnet18", partial(TinyNet, channels=5))


@pytest.fixture
def run_training(tmp_path, tiny_data):
    """Trains with the given flags in tmp_path on the tiny data, and returns the folder of the newest run."""

    def run(*flags: str, name: str = "a", data: Path = tiny_data, backbone: str = "MobileFaceNet") -> Path:
        folders = [f"--checkpoint_dir={tmp_path / name}", f"--best_checkpoint_dir={tmp_path / name}_best"]
        chosen = [f"--backbone={backbone}"] if backbone else []
        common = [f"--data_dir={data}", f"--log_dir={tmp_path / name}_log", "--gpu_num=cpu", "--num_workers=0"]
        train.main(folders + common + chosen + list(flags))
        return run_dir.newest_run(tmp_path / name)

    return run


SMALL = ("--batch_size=4", "--embedding_size=32", "--s=16", "--lr=0.01", "--warmup_epochs=1")


def states(run: Path, epoch_and_batch: str) -> list[dict[str, torch.Tensor]]:
    return [torch.load(run / f"{part}_{epoch_and_batch}.pth", weights_only=True) for part in ("Backbone", "Head")]


def assert_equal_states(first: list[dict], second: list[dict]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


def test_run_leaves_files_with_the_older_names(run_training, tmp_path, capsys, plots):
    run = run_training("--epochs=2", "--LR_eval", *SMALL)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"HRTRAIN_\d{4}-\d\d-\d\d-\d\d-\d\d", run.name)
    names = {path.name for path in run.iterdir()}
    assert names == {f"{part}_{e}.pth" for part in io.CHECKPOINT_FILES for e in ("1_3", "2_6")} | {"Evaluation.txt"}
    best = {path.name for path in (tmp_path / "a_best" / run.name).iterdir()}
    assert best == {f"{part}_Best.pth" for part in io.CHECKPOINT_FILES}

    lines = (run / "Evaluation.txt").read_text().splitlines()
    number = r"[01]\.\d{4}"
    form = rf"LFW : {number}, AgeDB : {number}, Avg : {number}"
    assert [
        bool(re.fullmatch(rf"Epoch 1/2, Evaluation{view}: {form}", line))
        for view, line in zip(("", " LR"), lines[:2], strict=True)
    ] == [True, True]
    assert len(lines) == 4
    assert "left out of the validation: CFP_FF, CFP_FP" in printed

    log = tmp_path / "a_log" / run.name
    records = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert set(records[0]["accuracy"]) == {"LFW", "AgeDB", "LFW LR", "AgeDB LR"}
    for plot in ("roc", "curves", "samples"):
        assert (log / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert any(path.name.startswith("events.out.tfevents") for path in log.iterdir())


@pytest.mark.parametrize(("flags", "size"), [((), 64), (("--val_batch_size=6",), 6)])
def test_validations_have_a_batch_size_of_their_own(run_training, monkeypatch, flags, size):
    sizes = []

    def spy(*given, **named):
        sizes.append(named["batch_size"])
        return evaluate(*given, **named)

    monkeypatch.setattr("util.training.trainer.evaluate", spy)
    run_training("--epochs=1", *SMALL, *flags)
    assert sizes == [size, size]  # one call for each set


def test_backbone_and_head_files_are_plain_state_dicts(run_training):
    run = run_training("--epochs=1", *SMALL)
    backbone, head = states(run, "1_3")
    assert all(isinstance(value, torch.Tensor) for value in backbone.values())
    assert not any(key.startswith("module.") for key in backbone)
    assert {key: tuple(value.shape) for key, value in head.items()} == {"weight": (3, 32)}


def test_low_resolution_training_is_named_after_its_scale(run_training):
    run = run_training("--epochs=1", "--LR_train=True", "--LR_scale=2", *SMALL)
    assert run.name.startswith("LRTRAIN_LRx2_")
    several = run_training(
        "--epochs=1", "--LR_train", "--LR_scale", "2", "4", "--LR_prob=0.7", "--LR_eval", *SMALL, name="b"
    )
    assert several.name.startswith("LRTRAIN_LRx2-4_")
    lines = (several / "Evaluation.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Epoch 1/1, Evaluation",
        "Epoch 1/1, Evaluation LRx2",
        "Epoch 1/1, Evaluation LRx4",
    ]


def test_resume_equals_an_uninterrupted_run(run_training, tmp_path):
    whole = run_training("--epochs=3", "--stages", "2", "--margin_warmup_epochs=2", *SMALL)
    part = run_training("--epochs=1", "--stages", "2", "--margin_warmup_epochs=2", *SMALL, name="b")
    torch.manual_seed(0)  # whatever happened in between
    resumed = run_training("--epochs=3", f"--resume_dir={part}", name="b", backbone="")
    assert resumed == part
    assert_equal_states(states(whole, "3_9"), states(resumed, "3_9"))
    lines = (resumed / "Evaluation.txt").read_text().replace("1/1", "1/3")
    assert lines == (whole / "Evaluation.txt").read_text()
    ours, theirs = (torch.load(run / "Optimizer_3_9.pth", weights_only=True) for run in (whole, resumed))
    assert ours["best_accuracy"] == theirs["best_accuracy"]
    assert torch.equal(ours["random_states"]["cpu"], theirs["random_states"]["cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["MobileFaceNet", "IR_SE_50"])
def test_real_networks_and_their_dropout_resume_too(run_training, make_people, tmp_path, backbone):
    data = tmp_path / "data"
    make_people(data / "imgs", people=2, images=2)
    flags = ("--batch_size=2", "--warmup_epochs=0", "--lr=0.01", "--embedding_size=32")
    run = run_training("--epochs=2", *flags, data=data, backbone=backbone)
    whole = states(run, "2_4")
    torch.rand(7)
    more = (f"--resume_dir={run}/Backbone_1_2.pth", "--num_workers=1")
    assert run_training("--epochs=2", *more, data=data, backbone="") == run
    assert (run / "superseded" / "Backbone_2_4.pth").is_file()  # what is compared was trained again
    assert_equal_states(whole, states(run, "2_4"))


@pytest.fixture
def record_data(tiny_data, tmp_path) -> Path:
    """A data folder with the tiny training images in faces_emore/train.rec, and no verification set."""
    images = ImageFolder(tiny_data / "imgs")
    path = tmp_path / "records" / "faces_emore" / "train.rec"
    path.parent.mkdir(parents=True)
    write_identities(path, ([images.encoded(4 * person + number) for number in range(4)] for person in range(3)))
    return tmp_path / "records"


def test_records_resume_exactly_and_train_like_a_folder(run_training, record_data, capsys):
    whole = run_training("--epochs=2", *SMALL, data=record_data)
    assert "faces_emore/train.rec: 12 images of 3 people" in capsys.readouterr().out
    part = run_training("--epochs=1", *SMALL, data=record_data, name="b")
    torch.manual_seed(0)
    more = (f"--resume_dir={part}", "--num_workers=2")
    resumed = run_training("--epochs=2", *more, data=record_data, name="b", backbone="")
    assert_equal_states(states(whole, "2_6"), states(resumed, "2_6"))
    folder = run_training("--epochs=2", *SMALL, name="c")
    assert_equal_states(states(whole, "2_6"), states(folder, "2_6"))
    classes = torch.load(whole / "Optimizer_2_6.pth", weights_only=True)["classes"]
    assert classes == ["0000000", "0000001", "0000002"]


def test_a_broken_record_is_named(run_training, record_data):
    path = record_data / "faces_emore" / "train.rec"
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8\xff")
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: record 1: not an image that can be decoded"):
        run_training("--epochs=5", *SMALL, f"--train_data={path}", "--max_bad=0", data=record_data)


def test_resume_reads_what_it_is_given(run_training):
    run = run_training("--epochs=1", *SMALL)
    run_training("--epochs=2", f"--resume_dir={run}", backbone="")
    before = states(run, "2_6")
    head = torch.load(run / "Head_1_3.pth", weights_only=True)
    torch.save({"weight": head["weight"].flip(0)}, run / "Head_1_3.pth")
    run_training("--epochs=2", f"--resume_dir={run / 'Backbone_1_3.pth'}", backbone="")
    after = states(run, "2_6")
    assert not torch.equal(before[1]["weight"], after[1]["weight"])
    assert any(not torch.equal(before[0][key], after[0][key]) for key in before[0])


def test_resume_moves_later_files_and_cuts_the_log(run_training, tmp_path):
    run = run_training("--epochs=2", *SMALL)
    run_training("--epochs=1", f"--resume_dir={run / 'Backbone_1_3.pth'}", backbone="")
    assert sorted(path.name for path in run.glob("*.pth")) == [f"{part}_1_3.pth" for part in io.CHECKPOINT_FILES]
    assert sorted(path.name for path in (run / "superseded").iterdir()) == [f"{p}_2_6.pth" for p in io.CHECKPOINT_FILES]
    assert [line.split(",")[0] for line in (run / "Evaluation.txt").read_text().splitlines()] == ["Epoch 1/2"]
    assert len((tmp_path / "a_log" / run.name / "metrics.jsonl").read_text().splitlines()) == 1


def test_resume_of_a_finished_run_trains_nothing(run_training, capsys):
    run = run_training("--epochs=1", *SMALL)
    run_training(f"--resume_dir={run}", backbone="")
    assert "all of its 1 epochs are done; raise --epochs to continue" in capsys.readouterr().out


def test_resume_of_best_files_continues_in_the_run_folder(run_training, tmp_path):
    run = run_training("--epochs=1", *SMALL)
    assert run_training("--epochs=2", f"--resume_dir={tmp_path / 'a_best' / run.name}", backbone="") == run
    assert (run / "Backbone_2_6.pth").is_file()


def test_resume_after_a_kill_uses_the_last_complete_epoch(run_training, capsys):
    run = run_training("--epochs=2", *SMALL)
    (run / "Optimizer_2_6.pth").unlink()
    run_training("--epochs=2", f"--resume_dir={run}", backbone="")
    assert "Backbone_1_3.pth after epoch 1" in capsys.readouterr().out
    assert (run / "Optimizer_2_6.pth").is_file()


def test_resume_keeps_settings_unless_given(run_training, capsys):
    run = run_training("--epochs=1", *SMALL)
    run_training("--epochs=2", "--lr=0.02", f"--resume_dir={run}", backbone="")
    printed = capsys.readouterr().out
    assert "changed setting: --lr was 0.01, now 0.02" in printed
    assert "changed setting: --epochs was 1, now 2" in printed
    assert "--s was" not in printed and "--backbone was" not in printed


def test_resume_compares_new_settings_with_their_defaults(run_training, capsys):
    run = run_training("--epochs=1", *SMALL)
    file = run / "Optimizer_1_3.pth"
    state = torch.load(file, weights_only=True)
    for name in ("val_data", "num_workers", "augment"):
        del state["settings"][name]
    torch.save(state, file)
    given_to_every_run_here = "changed setting: --num_workers was None, now 0"
    for flags, others in ((), []), (("--augment=strong",), ["changed setting: --augment was standard, now strong"]):
        capsys.readouterr()
        run_training(f"--resume_dir={run}", *flags, backbone="")
        printed = capsys.readouterr().out.splitlines()
        changes = [line for line in printed if line.startswith("changed setting")]
        assert sorted(changes) == sorted([given_to_every_run_here, *others])


def test_other_people_cannot_be_resumed_with(run_training, make_people, tmp_path):
    run = run_training("--epochs=1", *SMALL)
    make_people(tmp_path / "more" / "imgs", people=4, images=4)
    with pytest.raises(DataError, match=r"Optimizer_1_3.pth: trained on 3 identities, but .*imgs has 4. Resume with"):
        run_training("--epochs=2", f"--resume_dir={run}", data=tmp_path / "more", backbone="")


def test_another_network_or_optimizer_cannot_be_resumed_with(run_training):
    run = run_training("--epochs=1", *SMALL)
    with pytest.raises(UsageError, match=r"--backbone=iresnet18: the run to resume has MobileFaceNet\. Leave"):
        run_training("--epochs=2", f"--resume_dir={run}", backbone="iresnet18")
    with pytest.raises(UsageError, match=r"--optimizer=adamw: the run to resume has sgd\. Leave"):
        run_training("--epochs=2", "--optimizer=adamw", f"--resume_dir={run}", backbone="")


def test_a_run_without_its_optimizer_file_cannot_be_resumed(run_training):
    run = run_training("--epochs=1", *SMALL)
    (run / "Optimizer_1_3.pth").unlink()
    with pytest.raises(DataError, match=r"Optimizer_1_3.pth: missing\. .*without --resume_dir"):
        run_training("--epochs=2", f"--resume_dir={run}", backbone="")


def test_nan_loss_stops_the_run_and_saves_nothing(run_training, tmp_path):
    run = run_training("--epochs=1", *SMALL)
    with pytest.raises(
        RunError, match=rf"(no longer finite|became).*last good checkpoint is .*{run.name}/Backbone_1_3"
    ):
        run_training("--epochs=3", "--lr=1e30", f"--resume_dir={run}", backbone="")
    assert sorted(path.name for path in run.glob("*.pth")) == [f"{part}_1_3.pth" for part in io.CHECKPOINT_FILES]
    assert len((run / "Evaluation.txt").read_text().splitlines()) == 1


def test_best_is_the_newest_without_verification_sets(run_training, make_people, tmp_path, capsys):
    make_people(tmp_path / "data" / "imgs", people=2, images=4)
    run = run_training("--epochs=2", *SMALL, data=tmp_path / "data")
    assert "the best checkpoint is the newest" in capsys.readouterr().out
    best = torch.load(tmp_path / "a_best" / run.name / "Backbone_Best.pth", weights_only=True)
    assert_equal_states([best], states(run, "2_4")[:1])
    assert not (run / "Evaluation.txt").exists()


@pytest.mark.parametrize(("flags", "processes"), [([], 2), (["--num_workers=0"], 0), (["--num_workers=5"], 5)])
def test_num_workers_follows_the_cores_unless_given(tiny_data, monkeypatch, flags, processes):
    class Reached(Exception):
        pass

    def spy(*_, num_workers: int, **__):
        raise Reached(num_workers)

    monkeypatch.setattr("util.training.trainer.num_cpus", lambda: 8)
    monkeypatch.setattr("util.training.trainer.TrainLoader", spy)
    config = parse_train([f"--data_dir={tiny_data}", "--batch_size=4", *flags])
    with pytest.raises(Reached) as reached:
        Trainer(config, [torch.device("cpu")], DistEnv())
    assert reached.value.args == (processes,)


def test_fewer_images_than_a_batch_are_a_usage_error(run_training):
    with pytest.raises(UsageError, match=r"--batch_size=64: .*imgs has only 12 images"):
        run_training("--epochs=1")


def test_a_broken_image_is_named(run_training, make_people, tmp_path):
    make_people(tmp_path / "data" / "imgs", people=2, images=4)
    broken = tmp_path / "data" / "imgs" / "person_0" / "image_0.jpg"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(DataError, match=rf"{re.escape(str(broken))}: not an image"):
        run_training("--epochs=5", *SMALL, "--max_bad=0", data=tmp_path / "data")


def test_all_trainable_parameters_move_in_a_run(run_training, monkeypatch):
    before = []
    train_all = Trainer.train

    def spy(trainer: Trainer) -> None:
        before.extend(
            [deepcopy(module.state_dict()), dict(module.named_parameters())]
            for module in (trainer.backbone, trainer.head)
        )
        train_all(trainer)

    monkeypatch.setattr(Trainer, "train", spy)
    folder = run_training("--epochs=1", "--weight_decay=0", *SMALL)
    for (state, parameters), after in zip(before, states(folder, "1_3"), strict=True):
        trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
        assert trainable
        for name in trainable:
            assert not torch.equal(state[name], after[name]), name


def test_resume_continues_in_a_moved_folder(run_training, tmp_path):
    run = run_training("--epochs=1", *SMALL)
    moved = tmp_path / "elsewhere" / run.name
    moved.parent.mkdir()
    run.rename(moved)
    (run.parent / run.name).mkdir()  # newest_run looks for a Backbone file, and there is none here
    with pytest.raises(DataError, match="no run with a Backbone file"):
        run_training("--epochs=2", f"--resume_dir={moved}", backbone="")
    assert (moved / "Backbone_2_6.pth").is_file()


def test_resume_of_an_earlier_epoch_restores_best_files(run_training, tmp_path):
    run = run_training("--epochs=2", *SMALL)
    best = tmp_path / "a_best" / run.name
    for part in io.CHECKPOINT_FILES:
        (best / f"{part}_Best.pth").unlink()
        shutil.copy(run / f"{part}_2_6.pth", best / f"{part}_Best.pth")
    run_training("--epochs=1", f"--resume_dir={run / 'Backbone_1_3.pth'}", backbone="")
    assert torch.load(best / "Optimizer_Best.pth", weights_only=True)["epoch"] == 1
    assert_equal_states([torch.load(best / "Backbone_Best.pth", weights_only=True)], states(run, "1_3")[:1])


@pytest.mark.parametrize("script", ["train.py", "validation.py"])
def test_help_answers_without_importing_torch(script):
    code = (
        f"import sys, runpy; sys.argv = ['{script}', '--help']\ntry: runpy.run_path('{script}', run_name='__main__')\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code or 0)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--resume_dir" in out and out.endswith("False 0\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--no_such_flag"], 2, "--no_such_flag: unknown flag"),
        (["--gpu_num=cpu", "--data_dir=no/such/place"], 3, "no training folder (imgs_casia, ms1m_align_112"),
        (["--gpu_num=cpu", "--train_data=missing"], 3, "--train_data=missing: no such folder"),
        (["--gpu_num=cpu", "--resume_dir=no/such/run"], 3, "no/such/run: no such file or folder"),
        (["--batch_size=1"], 2, "--batch_size"),
        (
            ["--gpu_num=cpu", "--data_dir={data}", "--batch_size=4", "--log_dir=README.md/log"],
            2,
            "--log_dir=README.md/log",
        ),
    ],
)
def test_a_bad_command_line_ends_in_one_line_and_its_exit_code(arguments, code, message, tiny_data, end_of):
    ended, printed = end_of(train.main, [argument.format(data=tiny_data) for argument in arguments])
    assert ended == code
    assert printed.count("\n") == 1 and printed.startswith("error: ") and message in printed


def test_loss_of_a_new_head_is_what_chance_gives(run_training, tmp_path):
    run = run_training("--epochs=1", "--loss=cross_entropy", "--m=0", "--lr=1e-6", "--s=0.01", *SMALL[:2])
    record = json.loads((tmp_path / "a_log" / run.name / "metrics.jsonl").read_text())
    assert record["loss"] == pytest.approx(math.log(3), abs=0.01)


def start_training(tiny_data: Path, folder: Path, *flags: str) -> subprocess.Popen:
    folders = [f"--{flag}={folder / flag}" for flag in ("checkpoint_dir", "best_checkpoint_dir", "log_dir")]
    machine = ["--gpu_num=cpu", "--num_workers=2", "--backbone=MobileFaceNet_025", "--batch_size=4"]
    command = [sys.executable, "train.py", f"--data_dir={tiny_data}", *folders, *machine, *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.slow
def test_a_run_with_loader_processes_ends_by_itself(tiny_data, tmp_path):
    process = start_training(tiny_data, tmp_path, "--epochs=2")
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert "epoch 2/2  3/3  loss" in out and "done: " in out


@pytest.mark.slow
def test_a_signal_ends_the_run_and_its_loader_processes(tiny_data, tmp_path):
    process = start_training(tiny_data, tmp_path, "--epochs=1000")
    while not process.stdout.readline().startswith("epoch 1/1000  1/3"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*partial*"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of its session is left
