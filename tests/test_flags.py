"""Command lines and files of settings, good and bad: most of them with the settings of train.py as the example."""

import re
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from functools import partial
from pathlib import Path

import pytest

from applications.resolution_curve.__main__ import CurveSettings, parse_curve
from applications.super_resolution.settings import TrainSettings, UpscaleSettings
from config import TrainConfig, ValidationConfig, parse_train, parse_validation
from util.cli import parser as flags
from util.cli.options import GROUPS
from util.cli.types import integer, to_gpus, to_path
from util.errors import UsageError


def write_settings(folder: Path, text: str) -> list[str]:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


@pytest.fixture
def write(tmp_path: Path):
    """Writes text to a YAML file and gives the arguments that read it."""
    return partial(write_settings, tmp_path)


def error_of(parse, argv: list[str]) -> str:
    """The message of the usage error that parse(argv) raises; it must be one line."""
    with pytest.raises(UsageError) as caught:
        parse(argv)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


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
    assert (parsed.LR_train, parsed.LR_scale, parsed.LR_eval) == (True, (8,), True)


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


def test_value_may_hold_an_equals_sign_a_space_or_a_leading_dash():
    assert parse_train(["--data_dir=a=b"]).data_dir == "a=b"
    assert parse_train(["--data_dir", "my faces"]).data_dir == "my faces"
    assert parse_train(["--data_dir=-x"]).data_dir == "-x"


def test_a_home_directory_is_expanded_after_an_equals_sign_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_train(["--data_dir=~/faces"]).data_dir == "/home/someone/faces"


def test_numbers_become_the_type_of_their_field():
    parsed = parse_train(["--lr=1e-3", "--epochs=3", "--s=16", "--warmup_epochs=0.5", "--margin_warmup_epochs=2.5"])
    assert (parsed.lr, parsed.epochs, parsed.s) == (1e-3, 3, 16.0)
    assert (parsed.warmup_epochs, parsed.margin_warmup_epochs) == (0.5, 2.5)
    assert type(parsed.epochs) is int and type(parsed.s) is float


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


def test_command_line_overrides_file_and_file_overrides_default(write):
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
        assert message.endswith(f"{nearest}.")


@pytest.mark.parametrize(
    "text", ["lr: [1", "lr: 1\n  x: 2", "a: b: c", "\tlr: 1", "day: 2024-13-41", "lr: !!python/x y"]
)
def test_malformed_yaml_names_the_file(write, text):
    argv = write(text)
    assert error_of(parse_train, argv).startswith(f"{argv[1]}: not valid YAML")


BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
MERGES = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"a0: &a0 [1]\n{BOMB}lr: *a9", "an alias of a list or mapping"),
        (f"a0: &a0 [1]\n{BOMB}compile: *a9", "an alias of a list or mapping"),
        (f"a0: &a0 {{lr: 1}}\n{MERGES}lr: *a9", "an alias of a list or mapping"),
        ("lr: &lr [*lr]", "an alias of a list or mapping"),
        ("lr: " + "[" * 20_000 + "]" * 20_000, "recursion"),
        ("lr: " + "{a: " * 10_000 + "}" * 10_000, "recursion"),
        ("lr: " + "9" * 5_000, "digits"),
    ],
)
def test_yaml_that_expands_without_end_is_one_line(write, text, problem):
    argv = write(text)
    message = error_of(parse_train, argv)
    assert message.startswith(f"{argv[1]}: not valid YAML") and problem in message and len(message) < 500


def test_an_alias_of_one_value_is_read(write):
    parsed = parse_train(write("lr: &lr 0.5\nmomentum: *lr"))
    assert (parsed.lr, parsed.momentum) == (0.5, 0.5)


@pytest.mark.parametrize("key", ["data_dir", "lr", "epochs", "compile", "LR_scale", "stages", "val_data", "backbone"])
@pytest.mark.parametrize(
    "value",
    [
        "[" * 200 + "]" * 200,
        "[[1, 2], [3, 4]]",
        "[" + "[1], " * 1_000 + "]",
        "{1: {2: {3: 4}}}",
        "0x" + "f" * 10_000,
        "[0x" + "f" * 10_000 + "]",
        ".inf",
        '"' + "x" * 90_000 + '="',
        '"a\\0b\\0=c"',
        "!!binary aGVsbG8=",
        "2024-01-01",
    ],
)
def test_a_strange_value_in_a_file_gives_a_short_message(write, key, value):
    argv = write(f"{key}: {value}")
    message = error_of(parse_train, argv)
    assert message.startswith(f"{argv[1]}: {key}: ") and len(message) < 1000


@pytest.mark.parametrize("key", ["[a, b]", "{a: b}", "1", "null", "1.5", "true", "2024-01-01", '"a\\nb"', "x" * 1000])
def test_a_key_that_is_no_flag_gives_a_short_message(write, key):
    argv = write(f"? {key}\n: 1")
    message = error_of(parse_train, argv)
    assert message.startswith(f"{argv[1]}: ") and len(message) < 500


def test_a_file_without_end_is_refused(tmp_path):
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    message = error_of(parse_train, [f"--config={tmp_path / 'endless.yaml'}"])
    assert message.endswith("(longer than 100,000 characters). Write lines like `lr: 0.025`.")


@pytest.mark.parametrize(
    "flag", ["--lr", "--stages", "--gpu_num", "--data_dir", "--compile", "--backbone", "--val_data"]
)
@pytest.mark.parametrize("value", ["x", "=", "9", "[", " ", "\n", "[ ", "a:", "\0", "얼"])
def test_a_value_of_a_megabyte_gives_a_short_message(flag, value):
    assert len(error_of(parse_train, [flag, value * 1_000_000])) < 1000
    assert len(error_of(parse_train, ["--lr", "1", value * 1_000_000])) < 1000


@pytest.mark.parametrize("flag", ["--" + "x" * 1_000_000, "-" + "y" * 1_000_000, "--lr" + "r" * 1_000_000 + "=1"])
def test_a_flag_of_a_megabyte_gives_a_short_message(flag):
    message = error_of(parse_train, [flag, "1"])
    assert "unknown flag" in message and len(message) < 500


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


def test_print_config_prints_the_resolved_settings(write, capsys):
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
        assert re.search(rf"--{name}[ ,]", text)
    assert "Where things are:" in text and "Machine:" in text and "(default: ./data)" in text
    assert max(map(len, text.splitlines())) <= 110


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


@dataclass(frozen=True, kw_only=True)
class Drawing(flags.Settings):
    """Settings of another program than those in config.py, which the flags have to know nothing of."""

    size: int = flags.option(
        default=112,
        type=integer(1),
        metavar="N",
        help="pixels a side, 100% of them",
        group="Paper",
        aliases=("side", "width"),
    )
    mirror: bool = flags.flag(help="flip it", group="Pen")
    words: tuple[str, ...] = flags.option(
        default=(),
        type=tuple,
        metavar="WORD ...",
        help="what to write",
        group="Pen",
        default_help="nothing",
        split_words=True,
    )
    file: str | None = flags.option(
        type=to_path, metavar="FILE", help="where to", group="Paper", default_help="the screen"
    )
    pen: str = flags.choice(("thin", "thick"), default="thin", group="Pen")
    gpus: tuple[int, ...] = flags.option(
        default=(), type=to_gpus, metavar="LIST", help="who draws", group="Unused", default_help="cpu"
    )


def draw(argv: list[str], **more: object) -> Drawing:
    return flags.parse(Drawing, "draw.py", argv, groups=("Pen", "Nothing", "Paper", "Unused"), **more)


def test_another_program_may_have_settings_too(tmp_path):
    assert draw([]) == Drawing() and draw([]).as_dict()["words"] == []
    drawn = draw(["--words", "two words", "--mirror", "--width=7", "--mirror", *write_settings(tmp_path, "pen: thick")])
    assert drawn == Drawing(words=("two words",), mirror=True, size=7, pen="thick")
    assert error_of(draw, ["--side", "1", "--size=2"]).startswith("--size: side and size are one setting")
    message = error_of(draw, ["--pen", "blunt"])
    assert message == "--pen: 'blunt' is not one of thin, thick. Leave it out for the default (thin)."
    assert error_of(draw, ["--lr", "1"]).startswith("--lr: unknown flag")


def test_help_sections_keep_their_order_and_omit_empty_ones(capsys):
    with pytest.raises(SystemExit):
        draw(["--help"])
    text = capsys.readouterr().out
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Pen:", "Paper:", "Unused:", "Command line only:"]
    assert text.startswith("usage: python draw.py [--flag value | --flag=value] ...\n")
    assert re.search("--size( N)?, --side( N)?, --width N", text)  # Python 3.13 writes the value once
    for part in ("100% of them", "(default: the screen)", "(default: nothing)"):
        assert part in text
    assert "thin, thick (default: thin)" in text


def test_inherited_values_give_way_to_given_ones_and_are_checked(tmp_path):
    told = []

    def inherit(given: dict) -> dict:
        told.append(dict(given))
        return {"size": 5, "pen": "thick", "mirror": True, "of_an_older_version": 1}

    argv = ["--mirror=no", *write_settings(tmp_path, "width: 9")]
    assert draw(argv, inherit=inherit) == Drawing(size=9, pen="thick")
    assert told == [{"size": 9, "mirror": False}]
    with pytest.raises(UsageError, match="--size: 0 is not a whole number, 1 or more"):
        draw([], inherit=lambda given: {"size": 0})


def test_required_options_come_first_in_a_section(capsys):
    with pytest.raises(SystemExit):
        parse_curve(["--help"])
    text = capsys.readouterr().out
    assert text.index("--checkpoints NAME=PATH") < text.index("--data_dir DIR")


@pytest.mark.parametrize("kind", [TrainConfig, ValidationConfig, CurveSettings, TrainSettings, UpscaleSettings])
def test_every_option_is_in_a_known_section(kind):
    assert {field.metadata["option"].group for field in fields(kind)} <= set(GROUPS)


@pytest.mark.parametrize("value", [None, ()])
def test_a_required_setting_that_is_missing_is_named(value):
    @dataclass(frozen=True, kw_only=True)
    class Reading(flags.Settings):
        files: object = flags.option(default=value, type=lambda x: x, metavar="FILE ...", help="to read", required=True)

    message = error_of(lambda argv: flags.parse(Reading, "read.py", argv), [])
    assert message == "--files: missing. Give FILE: to read."
