"""The settings of train.py and validation.py: what they are, and which values they refuse."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import config
from applications.super_resolution.settings import parse_train as parse_super_resolution
from config import parse_train, parse_validation
from model import names
from model.names import HEAD_PAPERS, HEAD_PARAMETERS
from tests.test_flags import error_of, write_settings
from util.cli.types import Interval
from util.errors import UsageError


@pytest.fixture
def write(tmp_path: Path):
    """Writes text to a YAML file and gives the arguments that read it."""
    return partial(write_settings, tmp_path)


def test_defaults_of_training_are_the_documented_ones():
    assert parse_train([]).as_dict() == {
        "data_dir": "./data",
        "val_data": [],
        "checkpoint_dir": "./checkpoints",
        "best_checkpoint_dir": "./checkpoints_best",
        "log_dir": "./log",
        "resume_dir": None,
        "init": None,
        "train_data": None,
        "train_crop": "128",
        "augment": "standard",
        "channel_order": None,
        "input_scale": None,
        "init_head": "random",
        "backbone_lr": 1.0,
        "freeze_epochs": 0,
        "backbone": "IR_SE_50",
        "head": "ArcFace",
        "loss": "focal",
        "embedding_size": 512,
        "s": None,
        "m": None,
        "head_options": [],
        "margin_warmup_epochs": 0.0,
        "sample_rate": 1.0,
        "batch_size": 64,
        "scale_lr": False,
        "accumulate": 1,
        "epochs": 50,
        "lr": 0.025,
        "schedule": "step",
        "stages": [15, 23, 30],
        "warmup_epochs": 5.0,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "clip_grad_norm": 0.0,
        "ema": 0.0,
        "momentum": 0.9,
        "LR_train": False,
        "LR_prob": 0.5,
        "LR_scale": [4],
        "LR_eval": False,
        "SR_eval": False,
        "sr_checkpoint_dir": None,
        "gpu_num": [0],
        "precision": "auto",
        "val_batch_size": None,
        "num_workers": None,
        "grad_checkpoint": False,
        "compile": False,
        "seed": 1337,
        "save_every": "15m",
        "keep_last": None,
        "max_bad": 0.001,
        "deterministic": False,
    }


def test_defaults_of_validation_are_the_documented_ones():
    parsed = parse_validation([])
    assert (parsed.data_dir, parsed.best_checkpoint_dir) == ("./data", "./checkpoints_best")
    assert (parsed.resume_dir, parsed.backbone, parsed.json, parsed.plot) == (None, None, None, None)
    assert (parsed.batch_size, parsed.gpu_num, parsed.LR_scale, parsed.LR_eval) == (None, (0,), (4,), False)
    assert parsed.LR_oneside is False and parsed.views == ("HR",)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--stages", "15", "23", "30"], (15, 23, 30)),
        (["--stages=[15,23,30]"], (15, 23, 30)),
        (["--stages", "15,23,30"], (15, 23, 30)),
        (["--stages", "3"], (3,)),
        (["--stages", "none"], ()),
        (["--stages", "[]"], ()),
    ],
)
def test_stages_are_read_in_every_form(argv, expected):
    assert parse_train(argv).stages == expected


@pytest.mark.parametrize("value", ["30,15", "15,15", "0,3", "-1", "a", "1.5", ""])
def test_stages_that_do_not_ascend_from_one_are_usage_errors(value):
    message = error_of(parse_train, ["--stages", value])
    assert "--stages" in message and "ascending" in message and "none" in message


@pytest.mark.parametrize(
    "argument",
    [
        *("--lr=0", "--lr=-1", "--lr=-1e-3", "--lr=nan", "--lr=inf", "--lr=1e999", "--lr=fast", "--lr="),
        *("--momentum=1", "--momentum=-0.1", "--weight_decay=-1", "--s=0", "--m=-0.1", "--head_options=h=x"),
        *("--warmup_epochs=-1", "--margin_warmup_epochs=nan", "--epochs=0", "--epochs=2.5", "--epochs=1e1"),
        *("--batch_size=1", "--embedding_size=0", "--num_workers=-1", "--seed=-1", "--seed=4294967296"),
        *("--LR_scale=1", "--LR_scale=15", "--LR_scale=x", "--LR_scale=4,4", "--LR_scale=[]", "--LR_prob=1.1"),
        *("--backbone=ResNet", "--backbone=ir_se_50", "--head=Softmax", "--loss=l2", "--augment=none"),
    ],
)
def test_values_out_of_range_name_flag_and_remedy(argument):
    message = error_of(parse_train, [argument])
    flag, _, value = argument.partition("=")
    assert message.startswith(flag) and value in message
    assert "default" in message or "Write" in message


@pytest.mark.parametrize(
    "argument",
    [
        *("--momentum=0", "--momentum=0.999", "--weight_decay=0", "--m=0", "--m=1", "--warmup_epochs=0"),
        *("--epochs=1", "--batch_size=2", "--embedding_size=1", "--num_workers=0", "--seed=0", "--seed=4294967295"),
        *("--LR_prob=0", "--LR_prob=1"),
    ],
)
def test_values_at_the_end_of_their_range_are_good(argument):
    name, _, value = argument[2:].partition("=")
    assert getattr(parse_train([argument]), name) == float(value)


def test_an_unknown_name_is_answered_with_the_known_ones():
    assert all(name in error_of(parse_train, ["--backbone", "R50"]) for name in names.BACKBONE_NAMES)


@pytest.mark.parametrize(
    ("gpus", "batch_size", "good"),
    [("0,1", 4, True), ("0,1", 3, False), ("0,1,2,3", 6, False), ("0,1,2,3", 10, False), ("0,1,2,3", 12, True)],
)
def test_every_gpu_gets_two_images_or_more(gpus, batch_size, good):
    argv = ["--gpu_num", gpus, "--batch_size", str(batch_size)]
    if good:
        assert parse_train(argv).batch_size == batch_size
    else:
        assert "--batch_size" in error_of(parse_train, argv)


def test_validation_takes_single_images():
    assert parse_validation(["--batch_size", "1", "--gpu_num", "0,1"]).batch_size == 1


@pytest.mark.parametrize(
    ("argv", "scales"),
    [
        (["--LR_scale", "2"], (2,)),
        (["--LR_scale=14"], (14,)),
        (["--LR_scale", "2", "4", "8"], (2, 4, 8)),
        (["--LR_scale=[8,3]"], (8, 3)),
    ],
)
@pytest.mark.parametrize("parse", [parse_train, parse_validation])
def test_one_scale_or_several(parse, argv, scales):
    assert parse(argv).LR_scale == scales


def test_a_scale_of_an_older_run_or_a_file_is_one_number(tmp_path):
    (tmp_path / "run.yaml").write_text("LR_scale: 8\n")
    assert parse_train([f"--config={tmp_path / 'run.yaml'}"]).LR_scale == (8,)
    assert parse_train(["--resume_dir=x"], inherit=lambda path: {"LR_scale": 2}).LR_scale == (2,)


@pytest.mark.parametrize(
    ("argv", "views"),
    [
        ([], ("HR",)),
        (["--LR_eval"], ("HR", "LR")),
        (["--SR_eval"], ("HR", "LR", "SR")),
        (["--LR_eval", "--SR_eval", "--sr_checkpoint_dir", "x"], ("HR", "LR", "SR")),
    ],
)
def test_what_is_evaluated(argv, views):
    assert parse_validation(argv).views == parse_train(argv).views == views


@pytest.mark.parametrize("parse", [parse_train, parse_validation])
def test_super_resolution_has_own_scales_and_must_be_asked_for(parse):
    message = error_of(parse, ["--SR_eval", "--LR_scale", "2", "3"])
    assert message.startswith("--LR_scale=3: super resolution enlarges 2, 4, 8 times only")
    assert "--sr_checkpoint_dir: is used with --SR_eval alone" in error_of(parse, ["--sr_checkpoint_dir", "x"])


def test_super_resolution_evaluation_may_be_declined():
    assert parse_train(["--SR_eval", "False"]).SR_eval is False


def test_load_dir_is_another_name_of_resume_dir_in_validation():
    assert parse_validation(["--load_dir", "/a"]).resume_dir == "/a"
    assert parse_validation(["--load_dir", "/a", "--resume_dir=/a"]).resume_dir == "/a"
    message = error_of(parse_validation, ["--load_dir", "/a", "--resume_dir", "/b"])
    assert "load_dir" in message and "resume_dir" in message
    assert "--load_dir" in error_of(parse_train, ["--load_dir", "/a"])


def test_flags_of_the_other_script_are_unknown():
    assert "--epochs" in error_of(parse_validation, ["--epochs", "3"])
    assert "--json" in error_of(parse_train, ["--json", "x.json"])


def test_load_dir_in_a_file_of_validation(write):
    assert parse_validation(write("load_dir: /a")).resume_dir == "/a"
    assert parse_validation([*write("load_dir: /a"), "--resume_dir", "/b"]).resume_dir == "/b"
    message = error_of(parse_validation, write("load_dir: /a\nresume_dir: /b"))
    assert "load_dir" in message and "settings.yaml" in message


def test_help_and_reading_flags_import_neither_torch_nor_numpy():
    code = (
        "import sys, config; config.parse_train(['--lr', '1']);"
        "print([m for m in ('torch', 'numpy', 'cv2') if m in sys.modules])"
    )
    root = Path(config.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_names_are_those_of_the_registries():
    from model.backbone import BACKBONES
    from model.head import HEADS
    from model.loss import LOSSES

    assert set(names.BACKBONE_NAMES) == set(BACKBONES)
    assert set(names.HEAD_NAMES) == set(HEADS)
    assert set(names.LOSS_NAMES) == set(LOSSES)


def test_a_resumed_run_keeps_its_settings_but_for_what_is_given(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 0.3\n")
    saved = config.parse_train(["--lr=0.1", "--s=16", "--gpu_num=cpu", "--momentum=0.5"]).as_dict() | {"unknown": 1}
    asked = []

    def inherit(resume_dir: str) -> dict:
        asked.append(resume_dir)
        return saved

    parsed = config.parse_train(["--resume_dir=x/run", "--config", str(file), "--momentum=0.7"], inherit=inherit)
    assert asked == ["x/run"]
    assert (parsed.lr, parsed.s, parsed.gpu_num, parsed.momentum, parsed.resume_dir) == (0.3, 16, (), 0.7, "x/run")


def test_resume_dir_auto_inherits_nothing(capsys):
    """The run that is resumed is not known yet: the settings of the command line decide."""

    def inherit(resume_dir: str) -> dict:
        raise AssertionError(f"settings of {resume_dir} were read")

    parsed = parse_train(["--resume_dir=auto", "--lr=0.5"], inherit=inherit)
    assert (parsed.resume_dir, parsed.lr, parsed.seed) == ("auto", 0.5, 1337)


def test_resumed_run_keeps_how_often_it_is_saved():
    saved = parse_train(["--save_every=500", "--keep_last=3", "--max_bad=0", "--deterministic"]).as_dict()
    assert saved["save_every"] == "500"
    resumed = parse_train(["--resume_dir=x"], inherit=lambda path: saved)
    assert resumed.save_every == Interval("500", steps=500)
    assert (resumed.keep_last, resumed.max_bad, resumed.deterministic) == (3, 0.0, True)
    older = {name: value for name, value in saved.items() if name not in ("save_every", "keep_last", "max_bad")}
    resumed = parse_train(["--resume_dir=x"], inherit=lambda path: older)
    assert (resumed.save_every, resumed.keep_last) == (Interval("15m", seconds=900), None)


def test_programs_that_train_share_the_flags_of_a_run():
    argv = ["--save_every=2h", "--keep_last=3", "--max_bad=0.5", "--deterministic", "--resume_dir=auto"]
    recognition = parse_train(argv)
    super_resolution = parse_super_resolution([*argv, "--data=x"], inherit=lambda path: {})
    for settings in (recognition, super_resolution):
        assert settings.save_every == Interval("2h", seconds=7200)
        assert (settings.keep_last, settings.max_bad, settings.deterministic) == (3, 0.5, True)
        assert settings.resume_dir == "auto"


@pytest.mark.parametrize(
    "argument", ["--keep_last=0", "--keep_last=all", "--max_bad=-0.1", "--max_bad=1.1", "--max_bad=2"]
)
def test_limits_of_checkpoints_and_bad_images(argument):
    assert error_of(parse_train, [argument]).startswith(f"{argument.partition('=')[0]}: ")


@pytest.mark.parametrize(
    ("flags", "processes", "warns"), [(["--scale_lr"], 1, True), (["--scale_lr"], 2, False), ([], 1, False)]
)
def test_scale_lr_without_torchrun_is_reported(flags, processes, warns, monkeypatch, capsys):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}.items():
        monkeypatch.setenv(name, str(value))
    parse_train(flags)
    assert ("--scale_lr: has no effect" in capsys.readouterr().out) == warns


def test_a_new_run_inherits_nothing():
    assert config.parse_train([], inherit=lambda path: {"lr": 9.0}).lr == 0.025


def test_recomputing_and_compiling_exclude_each_other():
    with pytest.raises(UsageError, match=r"^--grad_checkpoint: does not work with --compile\. Leave"):
        parse_train(["--grad_checkpoint", "--compile"])


def test_compiling_for_several_gpus_is_refused():
    with pytest.raises(UsageError, match=r"--compile: works on one GPU, and --gpu_num names 2\. Leave it out"):
        config.parse_train(["--compile", "--gpu_num=0,1"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lfw=/sets/lfw.bin"], {"lfw": ("/sets/lfw.bin", None)}),
        (["/sets/cplfw.bin"], {"cplfw": ("/sets/cplfw.bin", None)}),
        (["/sets/a=b/cplfw"], {"cplfw": ("/sets/a=b/cplfw", None)}),
        (["x.y-z_1=a=b.bin"], {"x.y-z_1": ("a=b.bin", None)}),
        (["own=pairs.txt:/sets/faces"], {"own": ("pairs.txt", "/sets/faces")}),
        (["../pairs.txt:../faces"], {"pairs": ("../pairs.txt", "../faces")}),
        (["own=C:/sets/pairs.txt:D:/faces"], {"own": ("C:/sets/pairs.txt", "D:/faces")}),
        (["z=1", "a=my sets/2", "m=3"], {"z": ("1", None), "a": ("my sets/2", None), "m": ("3", None)}),
        (["own=~/pairs.txt:~/faces"], {"own": ("/home/someone/pairs.txt", "/home/someone/faces")}),
        (["none"], {}),
    ],
)
@pytest.mark.parametrize("parse", [parse_train, parse_validation])
def test_verification_sets_are_named_in_every_form(parse, words, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for argv in (["--val_data", *words], ["--val_data", "=", *words], [f"--val_data={words[0]}", *words[1:]]):
        parsed = parse([*argv, "--LR_eval"])
        assert parsed.pair_set_paths == expected and list(parsed.pair_set_paths) == list(expected)
        assert parsed.LR_eval


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("val_data: {lfw: /sets/lfw.bin, own: 'pairs.txt:/sets/faces'}", {"lfw": "/sets/lfw.bin", "own": "pairs.txt"}),
        ("val_data: [lfw=/sets/lfw.bin, /sets/own]", {"lfw": "/sets/lfw.bin", "own": "/sets/own"}),
        ("val_data: /sets/own", {"own": "/sets/own"}),
        ("val_data: none", {}),
        ("val_data: []", {}),
        ("val_data: {}", {}),
    ],
)
def test_verification_sets_in_a_file_are_a_mapping_or_a_list(write, line, expected):
    assert {name: path for name, (path, _) in parse_train(write(line)).pair_set_paths.items()} == expected


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["lfw="], "'lfw=' has no path"),
        (["a=y", "=x"], "'' is not made of letters, digits, _, - and ., or is Avg; write NAME=x"),
        (["my set.bin"], "'my set' is not made of letters, digits, _, - and ."),
        (["my,set=x"], "'my,set' is not made of"),
        (["얼굴.bin"], "'얼굴' is not made of"),
        (["avg=x"], "or is Avg"),
        (["a=x", "lfw=y", "LFW=z"], "'LFW' is there twice; name one of them, NAME=z"),
        (["/a/lfw.bin", "/b/lfw.bin"], "'lfw' is there twice; name one of them, NAME=/b/lfw.bin"),
        (["none", "a=x", "none"], "'none' is there twice"),
        ([""], "'' has no path"),
        (["own:"], "'own:' has no path"),
    ],
)
def test_verification_set_without_usable_name_is_a_usage_error(words, problem):
    message = error_of(parse_train, ["--val_data", *words])
    assert message.startswith("--val_data: ") and problem in message


@pytest.mark.parametrize("line", ["{lfw: 3}", "{lfw: {path: x}}", "3", "[3]", "true", "null", "{lfw: null}", "{1: ''}"])
def test_verification_sets_of_another_form_in_a_file_are_refused(write, line):
    argv = write(f"val_data: {line}")
    assert error_of(parse_train, argv).startswith(f"{argv[1]}: val_data: ")


def test_resumed_run_keeps_its_sets_unless_others_are_named():
    saved = parse_train(["--val_data", "own=my pairs.txt:/sets/faces", "/sets/lfw.bin"]).as_dict()
    assert saved["val_data"] == ["own=my pairs.txt:/sets/faces", "lfw=/sets/lfw.bin"]
    resumed = parse_train(["--resume_dir=x"], inherit=lambda path: saved)
    assert resumed.pair_set_paths == {"own": ("my pairs.txt", "/sets/faces"), "lfw": ("/sets/lfw.bin", None)}
    for words, expected in ((["none"], []), (["b=x"], ["b"])):
        again = parse_train(["--resume_dir=x", "--val_data", *words], inherit=lambda path: saved)
        assert list(again.pair_set_paths) == expected


def test_a_batch_is_cut_into_equal_parts():
    assert parse_train(["--batch_size=64", "--accumulate=4"]).accumulate == 4
    with pytest.raises(UsageError, match=r"^--accumulate=3: does not divide --batch_size=64\. Choose a divisor\.$"):
        parse_train(["--batch_size=64", "--accumulate=3"])


def test_each_part_of_a_batch_has_two_images_for_each_gpu():
    assert parse_train(["--batch_size=16", "--accumulate=4", "--gpu_num=0,1"]).batch_size == 16
    with pytest.raises(
        UsageError, match=r"^--batch_size: 8 in 4 micro-batches leaves one of 2 GPUs .* multiple of 8, 16 or"
    ):
        parse_train(["--batch_size=8", "--accumulate=4", "--gpu_num=0,1"])


@pytest.mark.parametrize("parse", [parse_train, parse_validation])
def test_the_precision_is_one_of_four(parse):
    assert parse([]).precision == "auto"
    with pytest.raises(UsageError, match="--precision"):
        parse(["--precision=half"])


def test_head_settings_are_those_given_and_known_to_the_head():
    assert parse_train([]).head_settings == {}
    config = parse_train(
        ["--head=SubCenterArcFace", "--s=32", "--head_options", "k=2", "interclass_filtering_threshold=0.4"]
    )
    assert config.head_settings == {"s": 32.0, "k": 2, "interclass_filtering_threshold": 0.4}
    assert parse_train(["--head=ArcFace", "--head_options", "easy_margin=True"]).head_settings == {"easy_margin": True}
    for words, message in (
        (["--head=MagFace", "--m=0.3"], "--m: MagFace has no parameter m"),
        (["--head_options", "h=0.3"], "--head_options: ArcFace has no parameter h"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_train(words)


def test_help_lists_the_heads_with_their_papers(capsys):
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    printed = capsys.readouterr().out
    for name, parameters in HEAD_PARAMETERS.items():
        assert f"  {name} " in printed and HEAD_PAPERS[name] in printed
        assert all(f"{parameter}=" in printed for parameter in parameters)
