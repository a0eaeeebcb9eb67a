"""Command lines and configuration files, good and bad."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

import config
from config import TrainConfig, ValidationConfig, parse_train, parse_validation
from util.errors import UsageError


@pytest.fixture
def write(tmp_path: Path):
    """Writes text to a YAML file and gives the arguments that read it."""

    def write_file(text: str) -> list[str]:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write_file


def error_of(parse, argv: list[str]) -> str:
    """The message of the usage error that parse(argv) raises; it must be one line."""
    with pytest.raises(UsageError) as caught:
        parse(argv)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_defaults_of_training_are_the_documented_ones():
    assert parse_train([]).as_dict() == {
        "data_dir": "./data",
        "val_data": [],
        "checkpoint_dir": "./checkpoints",
        "best_checkpoint_dir": "./checkpoints_best",
        "log_dir": "./log",
        "resume_dir": None,
        "train_data": None,
        "augment": "standard",
        "backbone": "IR_SE_50",
        "head": "ArcFace",
        "loss": "focal",
        "embedding_size": 512,
        "s": 64.0,
        "m": 0.5,
        "margin_warmup_epochs": 0.0,
        "batch_size": 64,
        "epochs": 50,
        "lr": 0.025,
        "stages": [15, 23, 30],
        "warmup_epochs": 5.0,
        "weight_decay": 5e-4,
        "momentum": 0.9,
        "LR_train": False,
        "LR_scale": 4,
        "LR_eval": False,
        "SR_eval": False,
        "sr_checkpoint_dir": None,
        "gpu_num": [0],
        "num_workers": None,
        "compile": False,
        "seed": 1337,
    }


def test_defaults_of_validation_are_the_documented_ones():
    parsed = parse_validation([])
    assert (parsed.data_dir, parsed.best_checkpoint_dir) == ("./data", "./checkpoints_best")
    assert (parsed.resume_dir, parsed.backbone, parsed.json, parsed.plot) == (None, None, None, None)
    assert (parsed.batch_size, parsed.gpu_num, parsed.LR_scale, parsed.LR_eval) == (64, (0,), 4, False)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--gpu_num=[0,1]"], (0, 1)),
        (["--gpu_num", "[0,1]"], (0, 1)),
        (["--gpu_num=[0, 1]"], (0, 1)),
        (["--gpu_num", "[0,", "1]"], (0, 1)),
        (["--gpu_num=[0,", "1]"], (0, 1)),
        (["--gpu_num", "=", "[0,", "1]"], (0, 1)),
        (["--gpu_num", "0,1"], (0, 1)),
        (["--gpu_num", "1", "0"], (1, 0)),
        (["--gpu_num", "3"], (3,)),
        (["--gpu_num=[ 3 ]"], (3,)),
        (["--gpu_num", "cpu"], ()),
        (["--gpu_num=CPU"], ()),
    ],
)
@pytest.mark.parametrize("parse", [parse_train, parse_validation])
def test_gpu_num_is_read_in_every_form(parse, argv, expected):
    assert parse(argv).gpu_num == expected


@pytest.mark.parametrize(
    "value", ["0,0", "[0, 0]", "-1", "[-1]", "x", "0,,1", "[0", "0]", "0,", "1.0", "0x1", "[cpu]", "[[0]]", ""]
)
def test_gpu_num_that_is_no_list_of_gpus_is_a_usage_error(value):
    message = error_of(parse_train, ["--gpu_num", value])
    assert "--gpu_num" in message and "0,1" in message and "cpu" in message


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "yes", "Yes", "1"])
def test_words_for_true(text):
    assert parse_train(["--LR_train", text]).LR_train is True


@pytest.mark.parametrize("text", ["False", "false", "no", "NO", "0"])
def test_words_for_false(text):
    assert parse_train([f"--LR_train={text}"]).LR_train is False


def test_a_boolean_alone_is_true_wherever_it_stands():
    parsed = parse_train(["--LR_train", "--LR_scale", "8", "--LR_eval"])
    assert (parsed.LR_train, parsed.LR_scale, parsed.LR_eval) == (True, 8, True)


@pytest.mark.parametrize("text", ["maybe", "2", "on", "t", "", "None"])
def test_other_words_for_a_boolean_are_usage_errors(text):
    message = error_of(parse_train, ["--LR_train", text])
    assert "--LR_train" in message and "True or False" in message


@pytest.mark.parametrize(
    "argv",
    [
        ["--resume_dir", "/a/b"],
        ["--resume_dir=/a/b"],
        ["--resume_dir", "=", "/a/b"],
        ["--resume_dir=", "/a/b"],
        ["--resume_dir", "=/a/b"],
    ],
)
@pytest.mark.parametrize("rest", [[], ["--LR_eval", "=", "True"]])
def test_spaces_around_the_equals_sign_make_no_difference(argv, rest):
    for parsed in (parse_train(argv + rest), parse_validation(argv + rest), parse_train(rest + argv)):
        assert parsed.resume_dir == "/a/b"
        assert parsed.LR_eval is bool(rest)


def test_several_values_after_a_spaced_equals_sign():
    assert parse_train(["--stages", "=", "10", "20", "--lr", "=", "0.1"]).stages == (10, 20)


@pytest.mark.parametrize("argv", [["--lr="], ["--lr", "="], ["--LR_train="], ["--LR_train", "=", "--lr", "1"]])
def test_nothing_after_an_equals_sign_is_a_usage_error(argv):
    message = error_of(parse_train, argv)
    assert argv[0].rstrip("=") in message and "missing" in message


def test_a_value_may_hold_an_equals_sign_a_space_or_a_leading_dash():
    assert parse_train(["--data_dir=a=b"]).data_dir == "a=b"
    assert parse_train(["--data_dir", "my faces"]).data_dir == "my faces"
    assert parse_train(["--data_dir=-x"]).data_dir == "-x"


def test_a_home_directory_is_expanded_after_an_equals_sign_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_train(["--data_dir=~/faces"]).data_dir == "/home/someone/faces"


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


def test_numbers_become_the_type_of_their_field():
    parsed = parse_train(["--lr=1e-3", "--epochs=3", "--s=16", "--warmup_epochs=0.5", "--margin_warmup_epochs=2.5"])
    assert (parsed.lr, parsed.epochs, parsed.s) == (1e-3, 3, 16.0)
    assert (parsed.warmup_epochs, parsed.margin_warmup_epochs) == (0.5, 2.5)
    assert type(parsed.epochs) is int and type(parsed.s) is float


@pytest.mark.parametrize(
    "argument",
    [
        *("--lr=0", "--lr=-1", "--lr=-1e-3", "--lr=nan", "--lr=inf", "--lr=1e999", "--lr=fast", "--lr="),
        *("--momentum=1", "--momentum=-0.1", "--weight_decay=-1", "--s=0", "--m=-0.1", "--m=1.5"),
        *("--warmup_epochs=-1", "--margin_warmup_epochs=nan", "--epochs=0", "--epochs=2.5", "--epochs=1e1"),
        *("--batch_size=1", "--embedding_size=0", "--num_workers=-1", "--seed=-1", "--seed=4294967296"),
        *("--LR_scale=1", "--LR_scale=15", "--LR_scale=x"),
        *("--backbone=ResNet", "--backbone=ir_se_50", "--head=Softmax", "--loss=l2", "--augment=none"),
    ],
)
def test_values_out_of_range_are_usage_errors_that_name_flag_and_remedy(argument):
    message = error_of(parse_train, [argument])
    flag, _, value = argument.partition("=")
    assert message.startswith(flag) and value in message
    assert "default" in message or "write" in message


@pytest.mark.parametrize(
    "argument",
    [
        *("--momentum=0", "--momentum=0.999", "--weight_decay=0", "--m=0", "--m=1", "--warmup_epochs=0"),
        *("--epochs=1", "--batch_size=2", "--embedding_size=1", "--num_workers=0", "--seed=0", "--seed=4294967295"),
        *("--LR_scale=2", "--LR_scale=14"),
    ],
)
def test_values_at_the_end_of_their_range_are_good(argument):
    name, _, value = argument[2:].partition("=")
    assert getattr(parse_train([argument]), name) == float(value)


def test_an_unknown_name_is_answered_with_the_known_ones():
    assert all(name in error_of(parse_train, ["--backbone", "R50"]) for name in config.BACKBONE_NAMES)


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


@pytest.mark.parametrize("argv", [["--SR_eval"], ["--SR_eval", "True"], ["--sr_checkpoint_dir", "x"]])
@pytest.mark.parametrize("parse", [parse_train, parse_validation])
def test_super_resolution_evaluation_is_said_to_be_unavailable(parse, argv):
    message = error_of(parse, argv)
    assert argv[0] in message and "not available in this version" in message and "leave it out" in message


def test_super_resolution_evaluation_may_be_declined():
    assert parse_train(["--SR_eval", "False"]).SR_eval is False


def test_load_dir_is_another_name_of_resume_dir_in_validation():
    assert parse_validation(["--load_dir", "/a"]).resume_dir == "/a"
    assert parse_validation(["--load_dir", "/a", "--resume_dir=/a"]).resume_dir == "/a"
    message = error_of(parse_validation, ["--load_dir", "/a", "--resume_dir", "/b"])
    assert "load_dir" in message and "resume_dir" in message
    assert "--load_dir" in error_of(parse_train, ["--load_dir", "/a"])


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--lr_train", "--LR_train"),
        ("--epoch", "--epochs"),
        ("--gpu_nums", "--gpu_num"),
        ("-seed", "--seed"),
        ("-xlr", "--lr"),
        ("--LR", "--lr"),
    ],
)
def test_an_unknown_flag_names_the_nearest_known_one(flag, nearest):
    message = error_of(parse_train, [flag, "1"])
    assert message.startswith(f"{flag}:") and f"{nearest} " in message


def test_flags_are_not_abbreviated():
    assert "--batch" in error_of(parse_train, ["--batch", "8"])
    assert "--moment" in error_of(parse_train, ["--moment=0.5"])


def test_flags_of_the_other_script_are_unknown():
    assert "--epochs" in error_of(parse_validation, ["--epochs", "3"])
    assert "--json" in error_of(parse_train, ["--json", "x.json"])


@pytest.mark.parametrize("argv", [["junk"], ["junk", "--lr", "1"], ["--lr", "1", "junk"], ["--LR_eval", "yes", "junk"]])
def test_a_stray_argument_is_named(argv):
    assert "'junk'" in error_of(parse_train, argv)


@pytest.mark.parametrize("argv", [["--lr"], ["--gpu_num", "--lr", "1"], ["--stages"], ["--data_dir", "--LR_eval"]])
def test_a_flag_without_its_value_is_named(argv):
    message = error_of(parse_train, argv)
    assert message.startswith(argv[0]) and "missing" in message


def test_an_empty_path_is_a_usage_error():
    assert "--data_dir" in error_of(parse_train, ["--data_dir", ""])


def test_a_flag_given_twice_counts_the_last_time():
    assert parse_train(["--lr", "1", "--lr=2"]).lr == 2.0


def test_the_command_line_overrides_the_file_and_the_file_the_default(write):
    parsed = parse_train([*write("lr: 0.5\nepochs: 7\n"), "--lr", "0.25"])
    assert (parsed.lr, parsed.epochs, parsed.momentum) == (0.25, 7, 0.9)
    parsed = parse_train(["--LR_train=no", "--stages", "none", *write("LR_train: yes\nstages: [1, 2]\n")])
    assert (parsed.LR_train, parsed.stages) == (False, ())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gpu_num: [0, 1]", (0, 1)),
        ("gpu_num: 1", (1,)),
        ("gpu_num: 0,1", (0, 1)),
        ("gpu_num: '[0,1]'", (0, 1)),
        ("gpu_num: cpu", ()),
        ("gpu_num: []", ()),
        ("stages: [1, 2]", (1, 2)),
        ("stages: 1, 2", (1, 2)),
        ("stages: none", ()),
        ("LR_train: yes", True),
        ("LR_train: 'True'", True),
        ("LR_train: 1", True),
        ("lr: 1e-3", 1e-3),  # YAML 1.1 reads this as text
        ("s: 16", 16.0),
        ("num_workers: null", None),
        ("data_dir: 사진", "사진"),
    ],
)
def test_values_in_a_file_are_converted_as_on_the_command_line(write, line, expected):
    value = getattr(parse_train(write(line)), line.partition(":")[0])
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "line",
    [
        *("lr: fast", "lr: [1]", "lr: true", "lr: null", "lr: .nan", "epochs: 2.5", "epochs: yes", "epochs: .inf"),
        *("stages: 3", "stages: [2, 1]", "stages: [1, a]", "stages: {1: 2}", "gpu_num: [0, 0]", "gpu_num: [-1]"),
        *(
            "gpu_num: yes",
            "gpu_num: [true]",
            "LR_train: maybe",
            "LR_train: null",
            "data_dir: 2024-01-01",
            "data_dir: 7",
        ),
        *("data_dir: ''", "backbone: 50", "backbone: [IR_50]", "num_workers: many"),
    ],
)
def test_a_wrong_value_in_a_file_names_file_and_key(write, line):
    argv = write(line)
    assert error_of(parse_train, argv).startswith(f"{argv[1]}: {line.partition(':')[0]}: ")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lr_train", "LR_train"),
        ("epoch", "epochs"),
        ("learning_rate", "lr"),
        ("print_config", ""),
        ("1", ""),
        ("~", ""),
    ],
)
def test_an_unknown_key_names_the_file_and_the_nearest_known_key(write, key, nearest):
    argv = write(f"{key}: 1")
    message = error_of(parse_train, argv)
    assert message.startswith(argv[1]) and "unknown key" in message and "nearest" in message
    if key != "learning_rate":
        assert message.endswith(nearest)


@pytest.mark.parametrize(
    "text", ["lr: [1", "lr: 1\n  x: 2", "a: b: c", "\tlr: 1", "day: 2024-13-41", "lr: !!python/x y"]
)
def test_malformed_yaml_names_the_file(write, text):
    argv = write(text)
    assert error_of(parse_train, argv).startswith(f"{argv[1]}: not valid YAML")


@pytest.mark.parametrize("text", ["- lr", "lr", "3", "false", "[]"])
def test_a_file_that_is_no_mapping_is_a_usage_error(write, text):
    argv = write(text)
    assert "not a mapping" in error_of(parse_train, argv)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_a_file_without_settings_changes_nothing(write, text):
    assert parse_train(write(text)) == TrainConfig()


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path):
    assert "nowhere.yaml" in error_of(parse_train, ["--config", str(tmp_path / "nowhere.yaml")])
    assert str(tmp_path) in error_of(parse_train, ["--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes(b"data_dir: caf\xe9")
    assert "latin.yaml" in error_of(parse_train, ["--config", str(tmp_path / "latin.yaml")])


def test_load_dir_in_a_file_of_validation(write):
    assert parse_validation(write("load_dir: /a")).resume_dir == "/a"
    assert parse_validation([*write("load_dir: /a"), "--resume_dir", "/b"]).resume_dir == "/b"
    message = error_of(parse_validation, write("load_dir: /a\nresume_dir: /b"))
    assert "load_dir" in message and "settings.yaml" in message


@pytest.mark.parametrize(
    ("parse", "argv"),
    [
        (parse_train, []),
        (parse_train, ["--gpu_num=cpu", "--stages=none", "--lr=1e-5", "--LR_train", "--resume_dir=a: b # 사진"]),
        (parse_train, ["--gpu_num=[0,1]", "--stages", "1", "2", "--data_dir", "yes", "--train_data", "007", "--m=0"]),
        (parse_train, ["--val_data", "a=my sets/a: b.txt", "/sets/b.bin"]),
        (parse_validation, ["--val_data", "none", "--gpu_num", "1"]),
        (parse_validation, ["--load_dir", "= x", "--json", "out.json", "--backbone", "iresnet18", "--batch_size=3"]),
    ],
)
def test_printed_configuration_gives_the_same_configuration(parse, argv, write, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([*argv, "--print_config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert parse(write(printed)) == parse(argv)
    assert "사진" in printed or "사진" not in str(argv)


def test_print_config_prints_what_file_and_command_line_resolve_to(write, capsys):
    with pytest.raises(SystemExit):
        parse_train([*write("lr: 0.5\nseed: 3"), "--seed", "4", "--print_config"])
    printed = capsys.readouterr().out.splitlines()
    assert "lr: 0.5" in printed and "seed: 4" in printed and "gpu_num: [0]" in printed


def test_print_config_does_not_hide_a_mistake():
    assert "--lr" in error_of(parse_train, ["--print_config", "--lr", "0"])


def test_debug_is_taken_and_is_no_setting_of_a_run():
    assert parse_train(["--debug", "--lr", "1"]) == parse_train(["--lr", "1"])


@pytest.mark.parametrize(("parse", "kind"), [(parse_train, TrainConfig), (parse_validation, ValidationConfig)])
@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--nonsense", "--help"]])
def test_help_lists_every_flag_with_its_default_in_groups(parse, kind, argv, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in [setting.name for setting in fields(kind)] + ["config", "print_config", "debug"]:
        assert f"--{name} " in text
    assert "Where things are:" in text and "Machine:" in text and "(default: ./data)" in text
    assert max(map(len, text.splitlines())) <= 110


def test_help_and_reading_flags_import_neither_torch_nor_numpy():
    code = (
        "import sys, config; config.parse_train(['--lr', '1']);"
        "print([m for m in ('torch', 'numpy', 'cv2') if m in sys.modules])"
    )
    root = Path(config.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_configuration_made_in_code_is_checked_too(tmp_path):
    made = TrainConfig(data_dir=tmp_path, stages=[1, 2], s=16)
    assert (made.data_dir, made.stages, made.s) == (str(tmp_path), (1, 2), 16.0)
    with pytest.raises(UsageError, match="--lr"):
        TrainConfig(lr=-1)
    with pytest.raises(UsageError, match="--epochs"):
        replace(made, epochs=0)
    with pytest.raises(FrozenInstanceError):
        made.lr = 1.0


def test_as_dict_holds_nothing_but_plain_values():
    for value in parse_train(["--gpu_num=[0,1]", "--val_data", "a.bin", "b.bin"]).as_dict().values():
        assert type(value) in (str, int, float, bool, list, type(None))
        assert not isinstance(value, list) or all(type(item) in (int, str) for item in value)


def test_names_are_those_of_the_registries():
    from model.backbone import BACKBONES
    from model.head import HEADS
    from model.loss import LOSSES

    assert set(config.BACKBONE_NAMES) == set(BACKBONES)
    assert set(config.HEAD_NAMES) == set(HEADS)
    assert set(config.LOSS_NAMES) == set(LOSSES)


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


def test_a_new_run_inherits_nothing():
    assert config.parse_train([], inherit=lambda path: {"lr": 9.0}).lr == 0.025


def test_compiling_for_several_gpus_is_refused():
    with pytest.raises(UsageError, match="--compile: works on one GPU, and --gpu_num names 2; leave it out"):
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
        assert parsed.named_pair_sets == expected and list(parsed.named_pair_sets) == list(expected)
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
    assert {name: path for name, (path, _) in parse_train(write(line)).named_pair_sets.items()} == expected


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
def test_a_verification_set_that_cannot_be_named_is_a_usage_error(words, problem):
    message = error_of(parse_train, ["--val_data", *words])
    assert message.startswith("--val_data: ") and problem in message


@pytest.mark.parametrize("line", ["{lfw: 3}", "{lfw: {path: x}}", "3", "[3]", "true", "null", "{lfw: null}", "{1: ''}"])
def test_verification_sets_of_another_form_in_a_file_are_usage_errors(write, line):
    argv = write(f"val_data: {line}")
    assert error_of(parse_train, argv).startswith(f"{argv[1]}: val_data: ")


def test_a_resumed_run_keeps_its_verification_sets_unless_others_or_none_are_named():
    saved = parse_train(["--val_data", "own=my pairs.txt:/sets/faces", "/sets/lfw.bin"]).as_dict()
    assert saved["val_data"] == ["own=my pairs.txt:/sets/faces", "lfw=/sets/lfw.bin"]
    resumed = parse_train(["--resume_dir=x"], inherit=lambda path: saved)
    assert resumed.named_pair_sets == {"own": ("my pairs.txt", "/sets/faces"), "lfw": ("/sets/lfw.bin", None)}
    for words, names in ((["none"], []), (["b=x"], ["b"])):
        again = parse_train(["--resume_dir=x", "--val_data", *words], inherit=lambda path: saved)
        assert list(again.named_pair_sets) == names
