"""train.py --init: a network of a file with a new head, frozen at first, and how such a run resumes."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train
import validation
from model.backbone import BACKBONES, RescaledInput, build_backbone
from model.head import build_head, shard_range
from tests.multiprocess import main_as_ranks
from tests.test_interrupt import optimizer, signal_in
from tests.test_torchrun import common_flags
from tests.test_train import assert_equal_states, run_training, states  # noqa: F401
from util.checkpoint import run_dir
from util.data.image_folder import ImageFolder
from util.errors import DataError, Interrupted, UsageError
from util.evaluate import embed
from util.public_networks import read_public_network
from util.training import engine
from util.training.centers import IMAGES_OF_A_CENTER, set_centers_to_means
from util.transform import eval_crop, full_crop

pytestmark = pytest.mark.usefixtures("no_plots")

Run = Callable[..., Path]
FLAGS = ("--batch_size=4", "--s=16", "--lr=0.01", "--warmup_epochs=0")
CPU = torch.device("cpu")


class TinyMobile(nn.Module):
    """A network with the keys by which the first layer and the family of MobileFaceNet are told, and dropout."""

    def __init__(self, embedding_size: int = 16):
        super().__init__()
        first = nn.Module()
        first.layers = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.BatchNorm2d(4))
        last = nn.Module()
        last.layers = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * 49, embedding_size), nn.BatchNorm1d(embedding_size)
        )
        self.layers = nn.Sequential(first)
        self.features = last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features.layers(self.layers[0].layers(images))


@pytest.fixture(autouse=True)
def tiny_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a tiny network under the name of a real one, but in the slow tests."""
    if "slow" not in request.keywords:
        monkeypatch.setitem(BACKBONES, "MobileFaceNet_scale1", TinyMobile)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Write the file of another project: random weights, and statistics as after a training."""
    return write_network(tmp_path / "public.pth")


def write_network(file: Path, name: str = "MobileFaceNet_scale1") -> Path:
    torch.manual_seed(4)
    network = build_backbone(name, embedding_size=16).train()
    network(torch.rand(8, 3, 112, 112) * 2 - 1)
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture
def tune(run_training: Run, public: Path) -> Run:  # noqa: F811
    """Return a function of flags that trains from the public file and returns the run."""
    return partial(run_training, f"--init={public}", *FLAGS, backbone="")


@pytest.fixture(scope="module")
def finished() -> dict[tuple[str, ...], Path]:
    """Return the runs without an interruption, by their flags: tests share them."""
    return {}


def load(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


# What a run starts from.


def test_init_tells_backbone_size_and_crop(tune, public, capsys):
    run = tune("--epochs=1", "--lr=1e-30", "--freeze_epochs=1")
    assert (
        f"starting from {public}: MobileFaceNet_scale1 (InsightFace): embedding size 16, takes RGB in -1..1, is shown "
        "whole 112x112 crops\n"
    ) in capsys.readouterr().out
    settings = load(run / "Optimizer_1_3.pth")["settings"]
    assert [settings[name] for name in ("backbone", "embedding_size", "train_crop")] == [
        "MobileFaceNet_scale1",
        16,
        "whole",
    ]
    backbone, head = states(run, "1_3")
    assert_equal_states([backbone], [load(public)])
    torch.manual_seed(1337)
    assert head["weight"].shape == (3, 16) and head["weight"].std() > 0.1


def test_init_takes_the_crop_that_is_given(tune, capsys):
    run = tune("--epochs=1", "--train_crop=128")
    assert load(run / "Optimizer_1_3.pth")["settings"]["train_crop"] == "128"
    assert "warning: --train_crop=128: this network was trained otherwise" in capsys.readouterr().out


def test_init_takes_a_run_of_this_toolkit(tune, run_training, capsys):  # noqa: F811
    first = tune("--epochs=1", "--train_crop=128")
    second = run_training("--epochs=1", *FLAGS, f"--init={first}", "--freeze_epochs=1", name="b", backbone="")
    assert "MobileFaceNet_scale1 (this toolkit)" in capsys.readouterr().out
    assert_equal_states(states(first, "1_3")[:1], states(second, "1_3")[:1])
    assert load(second / "Optimizer_1_3.pth")["settings"]["train_crop"] == "128"


def test_init_of_another_scale_of_pixels_is_kept_and_resumed(tune, public, tmp_path):
    whole = tune("--epochs=2", "--input_scale=0..255", "--channel_order=BGR", name="whole")
    part = tune("--epochs=1", "--input_scale=0..255", "--channel_order=BGR")
    state = load(part / "Backbone_1_3.pth")
    assert state["input_scale"] == 127.5
    found = read_public_network(part / "Backbone_1_3.pth")
    assert (found.input_scale, found.channel_order, found.family) == ("0..255", "RGB", "this toolkit")
    assert isinstance(found.network, RescaledInput)
    train.main([*common_flags_of(part, tmp_path), "--epochs=2", f"--resume_dir={part}"])
    assert_equal_states(states(part, "2_6"), states(whole, "2_6"))


def common_flags_of(run: Path, folder: Path) -> list[str]:
    """Return the flags that continue a run where it is."""
    settings = load(next(run.glob("Optimizer_*.pth")))["settings"]
    places = ("data_dir", "checkpoint_dir", "best_checkpoint_dir", "log_dir", "num_workers")
    return [f"--{name}={settings[name]}" for name in places] + ["--gpu_num=cpu"]


# Frozen at first.


@pytest.mark.parametrize("flags", [(), ("--accumulate=2",), ("--sample_rate=0.5",)])
def test_frozen_epochs_train_the_head_alone(tune, public, flags):
    run = tune("--epochs=3", "--freeze_epochs=2", *flags)
    start = load(public)
    first, second, third = (states(run, name) for name in ("1_3", "2_6", "3_9"))
    assert not changed(start, first[0]) and not changed(start, second[0])
    assert changed(first[1], second[1]) == {"weight"}
    assert changed(start, third[0]) == set(start)
    assert len(load(run / "Optimizer_2_6.pth")["optimizer"]["state"]) == 1  # no momentum of the backbone


def test_frozen_backbone_has_no_dropout(tune, monkeypatch):
    modes = []
    forward = TinyMobile.forward

    def spy(self: TinyMobile, images: torch.Tensor) -> torch.Tensor:
        modes.append((self.training, torch.is_grad_enabled()))
        return forward(self, images)

    monkeypatch.setattr(TinyMobile, "forward", spy)
    tune("--epochs=2", "--freeze_epochs=1", "--val_data=none")
    steps = [mode for mode in modes if mode in ((True, True), (False, False))]
    assert steps.count((True, True)) == 3 and (True, True) not in modes[:3] and (False, True) not in modes


@pytest.mark.parametrize("more", [("--accumulate=2",), ("--optimizer=adamw", "--clip_grad_norm=1", "--ema=0.9")])
@pytest.mark.parametrize("step", [2, 5, 8])
def test_interrupted_fine_tuning_equals_a_whole_one(tune, tmp_path, run_training, finished, step, more):  # noqa: F811
    flags = ("--epochs=3", "--freeze_epochs=1", "--backbone_lr=0.1", "--init_head=mean", *more)
    if more not in finished:
        finished[more] = tune(*flags, name="whole")
    whole = finished[more]
    with signal_in(engine.TrainingStep, "backward", step), pytest.raises(Interrupted):
        tune(*flags)
    run = run_dir.newest_run(tmp_path / "a")
    (tmp_path / "public.pth").unlink()  # is not needed any more
    run_training(f"--resume_dir={run}", backbone="")
    assert_equal_states(states(run, "3_9"), states(whole, "3_9"))
    assert_equal_states([optimizer(run, "3_9")], [optimizer(whole, "3_9")])
    assert (run / "Evaluation.txt").read_text() == (whole / "Evaluation.txt").read_text()
    for file in run.glob("EMA_*.pth"):
        assert_equal_states([load(file)], [load(whole / file.name)])
        assert read_public_network(file).family == "this toolkit"


def test_resume_dir_auto_initializes_new_runs_only(tune, tmp_path, capsys):
    flags = ("--epochs=2", "--resume_dir=auto")
    with signal_in(engine.TrainingStep, "backward", 5), pytest.raises(Interrupted):
        tune(*flags)
    run = tune(*flags)
    printed = capsys.readouterr().out
    assert printed.count("starting from") == 1 and printed.count("resuming") == 1
    assert_equal_states(states(run, "2_6"), states(tune("--epochs=2", name="whole"), "2_6"))


# The learning rate of the backbone.


def test_backbone_lr_multiplies_the_step_of_the_backbone(tune, public):
    start = load(public)
    flags = ("--epochs=1", "--batch_size=12", "--weight_decay=0", "--train_crop=whole")
    moved, heads = [], []
    for name, factor in (("one", 1), ("tenth", 0.1), ("zero", 1e-30)):
        backbone, head = states(tune(*flags, f"--backbone_lr={factor}", name=name), "1_1")
        moved.append({key: backbone[key] - start[key] for key in start if key.endswith("weight")})
        heads.append(head["weight"])
    for key, step in moved[0].items():
        assert step.any()
        torch.testing.assert_close(moved[1][key], step / 10, rtol=0.01, atol=1e-6)
        assert not moved[2][key].any()
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


# Class centers.


def mean_center(backbone: nn.Module, images: ImageFolder, label: int, crop: Callable) -> torch.Tensor:
    """Return the direction of the mean embedding of the first images of a class, in float64."""
    chosen = np.flatnonzero(images.labels == label)[:IMAGES_OF_A_CENTER]
    faces = [crop(images.image(int(index))) for index in chosen]
    vectors = [embed(backbone.eval(), face[None])[0].double() for face in faces]
    return F.normalize(torch.stack(vectors).mean(0), dim=0)


@pytest.mark.parametrize(("name", "crop"), [("whole", full_crop), ("128", eval_crop)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_centers_start_as_mean_embeddings(write_image_folder, public, name, crop, world_size):
    images = ImageFolder(write_image_folder(Ann=2, Bob=IMAGES_OF_A_CENTER + 3, Cid=1))
    backbone = read_public_network(public).network.eval()
    for rank in range(world_size):
        rows = shard_range(3, rank, world_size)
        head = build_head("ArcFace", 16, 3, rows=rows)
        lengths = head.weight.norm(dim=1)
        set_centers_to_means(head, backbone, images, crop=name, device=CPU, batch_size=4, skip_bad=False)
        expected = torch.stack([mean_center(backbone, images, label, crop) for label in rows])
        torch.testing.assert_close(F.normalize(head.weight).double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(head.weight.norm(dim=1), lengths)


def test_centers_leave_bad_images_out(write_image_folder, public, capsys):
    folder = write_image_folder(Ann=2, Bob=2)
    for bad in ("Ann/Ann_0000.jpg", "Bob/Bob_0000.jpg", "Bob/Bob_0001.jpg"):
        (folder / bad).write_bytes(b"no image")
    images = ImageFolder(folder)
    backbone = read_public_network(public).network.eval()
    head = build_head("CosFace", 16, 2)
    before = head.weight.clone()
    means = partial(set_centers_to_means, head, backbone, images, crop="128", device=CPU, batch_size=3)
    means(skip_bad=True)
    good = embed(backbone, eval_crop(images.image(1))[None])[0]
    torch.testing.assert_close(F.normalize(head.weight[0], dim=0), good, rtol=0, atol=1e-5)
    assert torch.equal(head.weight[1], before[1])
    assert "1 classes keep random centers" in capsys.readouterr().out
    with pytest.raises(DataError, match="Ann_0000"):
        means(skip_bad=False)


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--init={public}", "--resume_dir=checkpoints/x"], 2, "--init: starts a new run, and --resume_dir=checkpoi"),
        (["--init={public}", "--backbone=iresnet18"], 2, "--backbone=iresnet18: --init={public} has MobileFaceNet_sca"),
        (["--init={public}", "--embedding_size=512"], 2, "--embedding_size=512: --init={public} has 16. Leave"),
        (["--init=no/such.pth"], 3, "--init=no/such.pth: no such file or folder"),
        (["--init=README.md"], 3, "README.md: not a checkpoint of PyTorch"),
        (["--freeze_epochs=1"], 2, "--freeze_epochs: is used with --init alone"),
        (["--init_head=mean"], 2, "--init_head: is used with --init alone"),
        (["--backbone_lr=0.5"], 2, "--backbone_lr: is used with --init alone"),
        (["--channel_order=BGR"], 2, "--channel_order: is used with --init alone"),
        (["--init={public}", "--init_head=mean", "--head=SubCenterArcFace"], 2, "--init_head=mean: SubCenterArcFace"),
        (["--init={public}", "--freeze_epochs=-1"], 2, "--freeze_epochs: "),
        (["--init={public}", "--backbone_lr=0"], 2, "--backbone_lr: "),
        (["--train_crop=64"], 2, "--train_crop: '64' is not one of 128, whole"),
    ],
)
def test_wrong_combinations_are_one_line(public, end_of, flags, code, message):
    ended, printed = end_of(train.main, ["--gpu_num=cpu", *(flag.format(public=public) for flag in flags)])
    assert ended == code
    assert printed.count("\n") == 1 and printed.startswith("error: ") and message.format(public=public) in printed


def test_an_onnx_network_is_not_trained(monkeypatch, tmp_path, end_of):
    (tmp_path / "net.onnx").touch()
    monkeypatch.setattr("util.public_networks.OnnxNetwork", OnnxStandIn)
    ended, printed = end_of(train.main, ["--gpu_num=cpu", f"--init={tmp_path}/net.onnx"])
    assert ended == 3 and "net.onnx: an ONNX network cannot be trained further. Give a PyTorch file" in printed


class OnnxStandIn(nn.Module):
    embedding_size = 4
    metadata: ClassVar[dict[str, str]] = {}
    takes_bytes = False

    def __init__(self, path: Path):
        super().__init__()


def test_resume_refuses_another_backbone_lr(tune, run_training):  # noqa: F811
    run = tune("--epochs=1", "--backbone_lr=0.1")
    with pytest.raises(UsageError, match=r"--backbone_lr=1.0: the run to resume has 0\.1\. Leave --backbone_lr out"):
        run_training("--epochs=2", f"--resume_dir={run}", "--backbone_lr=1", backbone="")


# Validation of what was trained.


def test_validation_shows_the_crop_of_the_training(tune, tiny_data, tmp_path, capsys):
    accuracies = {}
    run = tune("--epochs=1", "--lr=1e-30", "--LR_eval")
    file = run / "Backbone_1_3.pth"
    for name, flags in (("own", ()), ("whole", ("--eval_crop=whole",)), ("128", ("--eval_crop=128",))):
        output = tmp_path / f"{name}.json"
        validation.main(
            [f"--load_dir={file}", f"--data_dir={tiny_data}", "--gpu_num=cpu", "--LR_eval", f"--json={output}", *flags]
        )
        accuracies[name] = re.sub(r'"images_per_second": [\d.]+', "", output.read_text())
    printed = capsys.readouterr().out
    assert "(this toolkit): embedding size 16, takes RGB in -1..1, is shown whole 112x112 crops" in printed
    assert "is shown the central 112 of 128 pixels" in printed
    assert '"eval_crop": "whole"' in accuracies["own"] and '"channel_order": "RGB"' in accuracies["own"]
    assert accuracies["own"] == accuracies["whole"] != accuracies["128"]


@pytest.mark.slow
def test_two_processes_freeze_and_continue_alike(make_people, tmp_path):
    data = tmp_path / "data"
    make_people(data / "imgs", people=3, images=4)
    public = write_network(tmp_path / "public.pth", "MobileFaceNet_025")
    flags = [f"--init={public}", "--freeze_epochs=1", "--backbone_lr=0.5", "--init_head=mean", *FLAGS]
    flags += ["--batch_size=2"]
    runs = []
    for name, starts in (("whole", (3,)), ("part", (1, 3))):
        for epochs in starts:
            more = [] if epochs == starts[0] else [f"--resume_dir={runs[-1]}"]
            given = flags if epochs == starts[0] else []
            arguments = [*common_flags(tmp_path, data, name), *given, *more, f"--epochs={epochs}"]
            main_as_ranks(2, train.main, arguments, tmp_path / "output.txt")
            runs.append(run_dir.newest_run(tmp_path / name))
    whole, part = runs[0], runs[-1]
    assert not changed(load(public), load(whole / "Backbone_1_3.pth"))
    assert changed(load(public), load(whole / "Backbone_2_6.pth"))
    assert_equal_states(states(whole, "3_9"), states(part, "3_9"))
