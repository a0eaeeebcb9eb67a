"""Every flag of train.py and validation.py: its default, its rule and its help, each written once.

A setting is a field of a frozen dataclass. Its value comes from the command line, else from the file given with
--config, else from the default, and passes through the field's one conversion whichever way it came:

    config = parse_train(["--gpu_num=[0,1]", "--LR_train", "--stages", "10", "20"])
    config.gpu_num, config.LR_train, config.stages        # (0, 1), True, (10, 20)

A mistake raises UsageError with one line: the flag (or file and key), the rule, the remedy. argparse lays out --help;
the flags themselves are read here, because it cannot read `--resume_dir = /a/b` or an unquoted `[0, 1]`.
"""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

from util.errors import UsageError

# The registries of model/ know the same names; they are repeated here because importing them would import torch.
_IR_NAMES = ("IR_50", "IR_101", "IR_152", "IR_SE_50", "IR_SE_101", "IR_SE_152")
_MOBILE_NAMES = ("MobileFaceNet", "MobileFaceNet_050", "MobileFaceNet_025")
BACKBONE_NAMES = _IR_NAMES + _MOBILE_NAMES + ("iresnet18", "iresnet34", "iresnet50", "iresnet100")
HEAD_NAMES = ("ArcFace", "CosFace")
LOSS_NAMES = ("focal", "cross_entropy")
AUGMENTATIONS = ("standard", "strong")

# The sections of --help, in their order.
WHERE, DATA, MODEL, OPTIMISATION = "Where things are", "Data", "Model", "Optimisation"
RESOLUTION, MACHINE, OUTPUT, OTHER = "Low and super resolution", "Machine", "Output", "Command line only"
GROUPS = (WHERE, DATA, MODEL, OPTIMISATION, RESOLUTION, MACHINE, OUTPUT, OTHER)

Convert = Callable[[object], Any]
Inherit = Callable[[str], Mapping[str, object]]

_FLAG = re.compile(r"--?[A-Za-z]")
SET_NAMES = "letters, digits, _, - and ."
_SET_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# NAME=PATH:ROOT, of which NAME= and :ROOT may be left out. A name has no slash, and C:/sets is one path, not two.
_PAIR_SET = re.compile(r"(?:([^=/\\]*)=)?((?:[A-Za-z]:(?=[/\\]))?[^:]*)(?::(.+))?")
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


# --- Conversions: from a string of the command line, or what YAML made of a value, to the value of the field. They
# --- raise ValueError with the rule, worded so that it follows "… is not", and leave a converted value as it is.


def _path(value: object) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value).strip():
        raise ValueError("a path (in a file, put text that looks like a number or a date in quotes)")
    return os.path.expanduser(value)


def _boolean(value: object) -> bool:
    if str(value).lower() not in _BOOLEANS:
        raise ValueError("True or False (yes, no, 1 and 0 are understood too)")
    return _BOOLEANS[str(value).lower()]


def _number(rule: str, accept: Callable[[float], bool], kind: type = float) -> Convert:
    """A conversion to a finite float or int for which accept() holds; `rule` says the same in words."""

    def convert(value: object) -> float:
        try:
            number = kind(value)
            truncated = kind is int and not isinstance(value, str) and number != value
            if isinstance(value, bool) or truncated or not math.isfinite(number) or not accept(number):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise ValueError(rule) from None
        return number

    return convert


def _whole(low: int, high: int | None = None) -> Convert:
    rule = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"
    return _number(rule, lambda number: low <= number <= (number if high is None else high), int)


def _list(word: str, rule: str, accept: Callable[[tuple[int, ...]], bool]) -> Convert:
    """A conversion to a tuple of integers: `[0, 1]`, `0,1`, `0 1`, a list of YAML, or `word` for an empty one."""

    def convert(value: object) -> tuple[int, ...]:
        if isinstance(value, str):
            if value.strip().lower() in (word, "[]"):
                return ()
            items = re.split(r"\s*,\s*|\s+", re.sub(r"^\[\s*(.*?)\s*\]$", r"\1", value.strip()))
            value = [int(item) if re.fullmatch("[0-9]{1,9}", item) else item for item in items]
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value) or not accept(value):
            raise ValueError(f"a list of {rule}, nor the word {word}")
        return tuple(value)

    return convert


_stages = _list(
    "none",
    "ascending epochs from 1 on, like 15 23 30 or [15,23,30]",
    lambda epochs: all(first < second for first, second in pairwise([0, *epochs])),
)
_gpu_list = _list(
    "cpu",
    "different GPU numbers, like 0 or 0,1 or [0,1]",
    lambda numbers: min(numbers, default=0) >= 0 and len(set(numbers)) == len(numbers),
)


def _gpus(value: object) -> tuple[int, ...]:
    return _gpu_list([value] if type(value) is int else value)  # `gpu_num: 0` in a file


def _pair_sets(value: object) -> tuple[str, ...]:
    """A conversion to a tuple of `NAME=PATH` or `NAME=PATH:ROOT`: from one or more of those, or a mapping of YAML."""
    rule = "a list like lfw=/sets/lfw.bin cplfw=/sets/pairs.txt:/sets/cplfw, nor the word none"
    if isinstance(value, Mapping):
        value = [f"{name}={path}" if isinstance(path, str) else path for name, path in value.items()]
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError(rule)
    if [item.strip().lower() for item in items] == ["none"]:
        return ()
    sets, seen = [], set()
    for item in items:
        name, path, root = split_pair_set(item)
        if not path:
            raise ValueError(f"{rule} ({item!r} has no path)")
        if not _SET_NAME.fullmatch(name) or name.lower() == "avg":
            raise ValueError(f"{rule} ({name!r} is not made of {SET_NAMES}, or is Avg; write NAME={path})")
        if name.lower() in seen:
            raise ValueError(f"{rule} ({name!r} is there twice; name one of them, NAME={path})")
        seen.add(name.lower())
        sets.append(f"{name}={path}" + (f":{root}" if root else ""))
    return tuple(sets)


def split_pair_set(text: str) -> tuple[str, str, str | None]:
    """The name, path and root of `NAME=PATH:ROOT`. Without NAME, that of the file or folder without its suffix."""
    match = _PAIR_SET.fullmatch(text.strip())
    if match is None:
        return "", "", None
    name, path, root = match.groups()
    path, root = os.path.expanduser(path), os.path.expanduser(root) if root else None
    return Path(path).stem if name is None else name, path, root


# --- The settings.


def _setting(
    default: object,
    group: str,
    convert: Convert,
    metavar: str,
    text: str,
    unset: str = "none",
    aliases: tuple[str, ...] = (),
    apart: bool = False,
) -> Any:
    """A dataclass field that knows its flag. `unset` says in the help what a default of None or () means.

    `apart`: the words after the flag are a list as they are, because there may be spaces in one.
    """
    about = {"group": group, "convert": convert, "metavar": metavar, "text": text, "unset": unset, "aliases": aliases}
    return field(default=default, metadata=about | {"apart": apart})


def _switch(group: str, text: str) -> Any:
    return _setting(False, group, _boolean, "True|False", text)


def _named(default: str | None, group: str, names: tuple[str, ...], unset: str = "none", text: str = "") -> Any:
    def convert(value: object) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return _setting(default, group, convert, "NAME", text or ", ".join(names), unset)


_POSITIVE = _number("a number above 0", lambda number: number > 0)
_NOT_NEGATIVE = _number("a number, 0 or more", lambda number: number >= 0)
_FROM_0_TO_1 = _number("a number from 0 to 1", lambda number: 0 <= number <= 1)
_BELOW_1 = _number("a number from 0 to less than 1", lambda number: 0 <= number < 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings that train.py and validation.py share. UsageError where a value breaks its rule."""

    data_dir: str = _setting("./data", WHERE, _path, "DIR", "training and verification sets")
    best_checkpoint_dir: str = _setting("./checkpoints_best", WHERE, _path, "DIR", "runs with their best epoch")
    val_data: tuple[str, ...] = _setting(
        (),
        DATA,
        _pair_sets,
        "SET ...",
        "verification sets besides those in data_dir, each NAME=PATH: a bcolz folder, a .bin of InsightFace, or a list "
        "of pairs in text, whose images are beside it, or in ROOT with NAME=PATH:ROOT. A name is made of "
        f"{SET_NAMES}; without NAME= it is the file's. LFW, CFP_FF, CFP_FP and AgeDB, in capitals or not, take the "
        "place of those in data_dir. none: no such sets",
        "none",
        apart=True,
    )
    resume_dir: str | None = _setting(
        None, WHERE, _path, "DIR", "the run to continue (its newest epoch), or one .pth file of it", "a new run"
    )
    LR_scale: int = _setting(4, RESOLUTION, _whole(2, 14), "N", "low resolution is 112 // N pixels a side")
    LR_eval: bool = _switch(RESOLUTION, "evaluate at low resolution too")
    SR_eval: bool = _switch(RESOLUTION, "not available in this version")
    sr_checkpoint_dir: str | None = _setting(None, RESOLUTION, _path, "DIR", "not available in this version")
    gpu_num: tuple[int, ...] = _setting((0,), MACHINE, _gpus, "LIST", "GPUs, as 0 or 0,1 or [0,1]; or cpu")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = _convert(setting, getattr(self, setting.name), f"--{setting.name}")
            object.__setattr__(self, setting.name, value)  # a frozen dataclass has no other way
        reason = "super resolution evaluation is not available in this version; leave it out"
        for name in ("SR_eval", "sr_checkpoint_dir"):
            if getattr(self, name):
                raise UsageError(f"--{name}: {reason}")

    @property
    def views(self) -> tuple[str, ...]:
        """What evaluation looks at: full resolution, and low resolution where it is wanted."""
        return ("HR", "LR") if self.LR_eval else ("HR",)

    @property
    def named_pair_sets(self) -> dict[str, tuple[str, str | None]]:
        """{name: (path, folder of the images or None)} of `val_data`, in its order."""
        return {name: (path, root) for name, path, root in map(split_pair_set, self.val_data)}

    def as_dict(self) -> dict[str, str | int | float | bool | list[int] | list[str] | None]:
        """The settings as plain values that torch.load(weights_only=True) and YAML read back; tuples become lists."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def as_yaml(self) -> str:
        """The settings as a file for --config that gives the same configuration again."""
        return yaml.safe_dump(
            self.as_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=math.inf
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """The settings of train.py. Epochs of warm-up may be fractions; those of `stages` are counted from 1."""

    checkpoint_dir: str = _setting("./checkpoints", WHERE, _path, "DIR", "runs with the files of each epoch")
    log_dir: str = _setting("./log", WHERE, _path, "DIR", "TensorBoard files")
    train_data: str | None = _setting(
        None,
        DATA,
        _path,
        "DIR",
        "a folder of people under data_dir, or a path; or a train.rec, InsightFace's RecordIO",
        "imgs_casia, ms1m_align_112, imgs_train or imgs",
    )
    augment: str = _named(
        "standard", DATA, AUGMENTATIONS, text="standard: crop, flip; strong: rotation, scale, colour, erasing too"
    )
    backbone: str = _named("IR_SE_50", MODEL, BACKBONE_NAMES)
    embedding_size: int = _setting(512, MODEL, _whole(1), "N", "numbers in the embedding of a face")
    head: str = _named("ArcFace", MODEL, HEAD_NAMES)
    loss: str = _named("focal", MODEL, LOSS_NAMES)
    s: float = _setting(64.0, MODEL, _POSITIVE, "X", "scale of the head's cosines")
    m: float = _setting(0.5, MODEL, _FROM_0_TO_1, "X", "margin: radians for ArcFace, cosine for CosFace")
    margin_warmup_epochs: float = _setting(0.0, MODEL, _NOT_NEGATIVE, "X", "epochs in which m grows from 0")
    batch_size: int = _setting(64, OPTIMISATION, _whole(2), "N", "images in a step, over all GPUs")
    epochs: int = _setting(50, OPTIMISATION, _whole(1), "N", "epochs in all, those before a resume included")
    lr: float = _setting(0.025, OPTIMISATION, _POSITIVE, "X", "learning rate after the warm-up")
    stages: tuple[int, ...] = _setting(
        (15, 23, 30), OPTIMISATION, _stages, "LIST", "epochs that divide lr by 10, or none"
    )
    warmup_epochs: float = _setting(5.0, OPTIMISATION, _NOT_NEGATIVE, "X", "epochs of linear warm-up of the rate")
    weight_decay: float = _setting(5e-4, OPTIMISATION, _NOT_NEGATIVE, "X", "on all weights but batch norm's")
    momentum: float = _setting(0.9, OPTIMISATION, _BELOW_1, "X", "momentum of SGD")
    LR_train: bool = _switch(RESOLUTION, "train on low resolution in half of the samples")
    compile: bool = _switch(MACHINE, "torch.compile the backbone: a slow first step, then faster ones")
    num_workers: int | None = _setting(
        None, MACHINE, _whole(0), "N", "processes that read images; 0: the main process", "from the number of CPU cores"
    )
    seed: int = _setting(1337, MACHINE, _whole(0, 2**32 - 1), "N", "seed of every random number")

    def __post_init__(self) -> None:
        super().__post_init__()
        gpus = max(len(self.gpu_num), 1)
        if self.compile and gpus > 1:
            raise UsageError(f"--compile: works on one GPU, and --gpu_num names {gpus}; leave it out, or name one GPU")
        share = -(-self.batch_size // gpus)  # images on each GPU but the last, which gets what is left
        if self.batch_size < 2 * gpus or self.batch_size % share == 1:
            raise UsageError(
                f"--batch_size: {self.batch_size} leaves one of {gpus} GPUs with less than two images, and batch "
                f"normalisation needs two; choose a multiple of {gpus}, {2 * gpus} or more"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Config):
    """The settings of validation.py."""

    resume_dir: str | None = _setting(
        None, WHERE, _path, "DIR", "a run, or a .pth file", "the newest run in best_checkpoint_dir", ("load_dir",)
    )
    backbone: str | None = _named(None, MODEL, BACKBONE_NAMES, "recognised from the checkpoint; must agree with it")
    batch_size: int = _setting(64, MACHINE, _whole(1), "N", "images in a batch")
    json: str | None = _setting(None, OUTPUT, _path, "FILE", "write the results as JSON", "not written")
    plot: str | None = _setting(None, OUTPUT, _path, "FILE", "draw the ROC curves as PNG", "not drawn")


@dataclass(frozen=True, kw_only=True)
class _CommandLineOnly:
    """Flags that are no settings of a run: a file for --config cannot give them."""

    config: str | None = _setting(
        None, OTHER, _path, "FILE", "YAML file of settings, named like the flags; the command line overrides it"
    )
    print_config: bool = _switch(OTHER, "print the settings as a file for --config, and exit")
    debug: bool = _switch(OTHER, "show the traceback of an error")


# --- Reading them.

C = TypeVar("C", bound=Config)


def parse_train(argv: list[str], inherit: Inherit | None = None) -> TrainConfig:
    """The settings of train.py from its arguments (without the script's name).

    `inherit(resume_dir)` gives the settings of the run that --resume_dir continues: what neither the command line nor
    the file says stays as it was there.
    Raises UsageError for a mistake; SystemExit(0) after --help and --print_config have printed.
    """
    return _parse(TrainConfig, "train.py", argv, inherit)


def parse_validation(argv: list[str]) -> ValidationConfig:
    """The settings of validation.py; as parse_train."""
    return _parse(ValidationConfig, "validation.py", argv)


def _parse(kind: type[C], script: str, argv: list[str], inherit: Inherit | None = None) -> C:
    if "--help" in argv or "-h" in argv:
        print(_help(kind, script), end="")
        raise SystemExit(0)
    settings = _by_name(fields(kind))
    others = _by_name(fields(_CommandLineOnly))
    given = _read_flags(argv, settings | others)
    request = _CommandLineOnly(**{name: given.pop(name) for name in list(given) if name in others})
    from_file = _read_file(request.config, settings) if request.config is not None else {}
    given = from_file | given
    if inherit is not None and given.get("resume_dir") is not None:
        saved = inherit(given["resume_dir"])
        given = {name: saved[name] for name in saved.keys() & settings.keys()} | given
    config = kind(**given)
    if request.print_config:
        print(config.as_yaml(), end="")
        raise SystemExit(0)
    return config


def _by_name(settings: Iterable[Field]) -> dict[str, Field]:
    return {name: setting for setting in settings for name in (setting.name, *setting.metadata["aliases"])}


def _read_flags(argv: list[str], settings: Mapping[str, Field]) -> dict[str, object]:
    """{field name: converted value} of the flags in argv; a flag given twice counts once, the last time."""
    given = {}
    for flag, values in _split_flags(argv):
        setting = settings.get(flag[2:]) if flag.startswith("--") else None
        if setting is None:
            nearest = _nearest(flag.lstrip("-"), settings)
            raise UsageError(f"{flag}: unknown flag; the nearest one is --{nearest} (--help lists them all)")
        if len(values) > 1 and not isinstance(setting.default, tuple):
            raise UsageError(f"{values[1]!r}: unexpected after {flag} {values[0]}, which takes one value; leave it out")
        if not values and setting.type is not bool:
            raise UsageError(f"{flag}: a value is missing; write {flag} {setting.metadata['metavar']}")
        value = values if setting.metadata["apart"] else " ".join(values)
        given[flag[2:]] = _convert(setting, value if values else True, flag)
    return _merge_aliases(given, settings, prefix="--")


def _split_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """(flag, values) for each flag: `--f v`, `--f=v`, `--f = v`, `--f= v` and `--f =v` are the same."""
    groups: list[list[str]] = []
    for token in argv:
        if _FLAG.match(token):
            groups.append([token])
        elif groups:
            groups[-1].append(token)
        else:
            raise UsageError(f"{token!r}: unexpected; every value follows its flag, as in --batch_size 64")
    split = []
    for first, *values in groups:
        flag, equals, value = first.partition("=")
        if equals:
            values.insert(0, value)
        elif values and values[0].startswith("="):
            equals, values[0] = "=", values[0][1:]
        if equals and not values[0]:
            del values[0]
            if not values:
                raise UsageError(f"{flag}=: a value is missing after the equals sign; write {flag}=VALUE")
        split.append((flag, values))
    return split


def _read_file(file: str, settings: Mapping[str, Field]) -> dict[str, object]:
    """{field name: converted value} of the settings in a YAML file."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {file}: cannot be read ({error.strerror}); give an existing file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date like 2024-13-01
        line = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{file}: not valid YAML{line} ({reason}); write lines like `lr: 0.025`") from None
    if not isinstance(content, dict | None):
        raise UsageError(f"{file}: not a mapping of settings to values; write lines like `lr: 0.025`")
    content = content or {}  # a file of comments only
    for key in content:
        if key not in settings:
            raise UsageError(f"{file}: {key}: unknown key; the nearest one is {_nearest(str(key), settings)}")
    given = {key: _convert(settings[key], value, f"{file}: {key}") for key, value in content.items()}
    return _merge_aliases(given, settings, prefix=f"{file}: ")


def _merge_aliases(given: dict[str, object], settings: Mapping[str, Field], prefix: str) -> dict[str, object]:
    """The same values under the names of their fields; two names of one field must not contradict each other."""
    merged = {}
    for name, value in given.items():
        own_name = settings[name].name
        if merged.setdefault(own_name, value) != value:
            names = " and ".join(other for other in given if settings[other].name == own_name)
            raise UsageError(f"{prefix}{name}: {names} are one setting and differ here; give one of them")
    return merged


def _convert(setting: Field, value: object, where: str) -> object:
    """`value` as the field wants it, or a UsageError that opens with `where`, the flag or the file and key."""
    if value is None and setting.default is None:
        return None
    try:
        return setting.metadata["convert"](value)
    except ValueError as rule:
        remedy = f"leave it out for the default ({_default_text(setting)})"
        raise UsageError(f"{where}: {value!r} is not {rule}; {remedy}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {candidate.lower(): candidate for candidate in known}
    return lower[difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)[0]]


def _default_text(setting: Field) -> str:
    if setting.default is None:
        return setting.metadata["unset"]
    if isinstance(setting.default, tuple):
        return " ".join(map(str, setting.default)) or setting.metadata["unset"]
    return f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default)


def _help(kind: type[Config], script: str) -> str:
    parser = argparse.ArgumentParser(
        prog=script,
        usage=f"python {script} [--flag value | --flag=value] ...",
        description="A flag that takes True or False means True when it stands alone.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        add_help=False,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for setting in fields(kind) + fields(_CommandLineOnly):
        about = setting.metadata
        names = [f"--{name}" for name in (setting.name, *about["aliases"])]
        text = f"{about['text']} (default: {_default_text(setting)})".replace("%", "%%")
        groups[about["group"]].add_argument(*names, metavar=about["metavar"], help=text)
    groups[OTHER].add_argument("-h", "--help", action="store_true", help="show this and exit")
    return parser.format_help()
