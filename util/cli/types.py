"""Value types of settings.

A value type gets a word of a command line or a YAML value, and returns the value that the program uses. It raises
ValueError with its rule, in words that follow "… is not". It returns a converted value unchanged. number, integer,
integers and one_of make value types; the functions to_… are value types.
"""

import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Convert = Callable[[object], Any]


@dataclass(frozen=True)
class ValueType:
    """A value type with the name that its values have in --help."""

    metavar: str
    convert: Convert

    def __call__(self, value: object) -> Any:
        return self.convert(value)


@dataclass(frozen=True)
class Interval:
    """An interval of time or of steps. Both are 0 for `none`: never. `text` is what the user gave."""

    text: str
    seconds: float = 0.0
    steps: int = 0

    def __str__(self) -> str:
        return self.text


EMBEDDING_SUFFIXES = (".npz", ".parquet")  # of files of util.embedding_table
PRECISIONS = ("auto", "bf16", "fp16", "fp32")  # util.device.resolve_dtype knows what they mean
SELECT = ("largest", "central", "best")  # which of several faces to align
EVAL_BATCH_CPU = 64  # images per batch of an evaluation, unless it is given
EVAL_BATCH_GPU = 128  # on each GPU
EVAL_BATCH_DEFAULTS = f"{EVAL_BATCH_CPU} on the CPU, {EVAL_BATCH_GPU} on each GPU"
SET_NAMES = "letters, digits, _, - and ."
PATH_LIMIT = 4096  # characters; Linux has the same limit
INTEGER_LIMIT = 2**63 - 1  # what torch and numpy can hold
_SET_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# NAME=PATH:ROOT, of which NAME= and :ROOT may be left out. A name has no slash, and C:/sets is one path, not two.
_PAIR_SET = re.compile(r"(?:([^=/\\]*)=)?((?:[A-Za-z]:(?=[/\\]))?[^:]*)(?::(.+))?")
_INTERVAL = re.compile(r"([0-9]{1,9})(?: ?steps?)?|([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([smh])")
_REPR = reprlib.Repr()
_REPR.maxstring = 100
_REPR.maxlevel = 2
_SECONDS = {"s": 1, "m": 60, "h": 3600}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def short_repr(value: object) -> str:
    """Return a value for a message, cut if it is long."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return "the number"


def to_path(value: object) -> str:
    """Return a path with a leading ~ replaced by the home directory."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value).strip():
        raise ValueError("a path (in a file, put text that looks like a number or a date in quotes)")
    path = os.path.expanduser(value)
    if len(path) > PATH_LIMIT or "\0" in path:
        raise ValueError(f"a path of {PATH_LIMIT} characters at most, without a null character")
    return path


def to_file(value: object) -> Path:
    """Return the same as a Path."""
    return Path(to_path(value))


def to_interval(value: object) -> Interval:
    """Return the interval that `15m`, `90s`, `2h`, `500`, `500steps` or `none` stand for."""
    if isinstance(value, Interval):
        return value
    text = str(value).strip() if type(value) in (str, int) else ""
    if text.lower() == "none":
        return Interval(text)
    match = _INTERVAL.fullmatch(text)
    if match is None:
        raise ValueError("a time like 15m, 90s or 2h, a number of steps like 500, nor the word none")
    steps, time, unit = match.groups()
    return Interval(text, steps=int(steps)) if steps else Interval(text, seconds=float(time) * _SECONDS[unit])


def to_png(value: object) -> Path:
    """Return the path of a PNG file to write."""
    path = to_file(value)
    if path.suffix.lower() != ".png":
        raise ValueError("a PNG file, whose name ends in .png")
    return path


def to_boolean(value: object) -> bool:
    """Return True or False for the words and numbers that mean them."""
    word = str(value).lower() if isinstance(value, str) or value in (0, 1) else ""  # True equals 1
    if word not in BOOLEANS:
        raise ValueError("True or False (yes, no, 1 and 0 are understood too)")
    return BOOLEANS[word]


def number(rule: str, accept: Callable[[float], bool], kind: type = float) -> ValueType:
    """Return a type of finite numbers, of `kind` float or int, that accept() accepts; `rule` is its rule in words."""

    def convert(value: object) -> float:
        try:
            converted = kind(value)
            truncated = kind is int and not isinstance(value, str) and converted != value
            if isinstance(value, bool) or truncated or not math.isfinite(converted) or not accept(converted):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise ValueError(rule) from None
        return converted

    return ValueType("N" if kind is int else "X", convert)


POSITIVE = number("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
FROM_0_TO_1 = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def integer(low: int, high: int | None = None) -> ValueType:
    """Return a type of integers from `low` to `high`, both included."""
    rule = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"
    return number(rule, lambda value: low <= value <= (INTEGER_LIMIT if high is None else high), int)


def integers(word: str | None, rule: str, accept: Callable[[tuple[int, ...]], bool], scalar: bool = False) -> ValueType:
    """Return a type of tuples of integers: `[0, 1]`, `0,1`, `0 1`, `0`, or a list of YAML.

    Args:
        word: what a user writes for an empty tuple; None if it must not be empty.
        rule: rule of accept() in words.
        accept: tells whether the integers are accepted.
        scalar: a YAML file may give one integer instead of a list.
    """

    def convert(value: object) -> tuple[int, ...]:
        if scalar and type(value) is int:
            value = [value]
        if isinstance(value, str):
            text = value.strip()
            if word and text.lower() in (word, "[]"):
                return ()
            if text.startswith("[") and text.endswith("]"):
                text = text[1:-1]
            items = [item for part in text.split(",") for item in (part.split() or [""])]
            value = [int(item) if re.fullmatch("[0-9]{1,9}", item) else item for item in items]
        if (
            not isinstance(value, list | tuple)
            or not all(type(item) is int and item <= INTEGER_LIMIT for item in value)
            or not accept(tuple(value))
        ):
            raise ValueError(f"a list of {rule}" + (f", nor the word {word}" if word else ""))
        return tuple(value)

    return ValueType("LIST", convert)


def different_integers(low: int, high: int, example: str) -> ValueType:
    """Return a type of tuples of one or several different integers from `low` to `high`."""
    return integers(
        None,
        f"different whole numbers from {low} to {high}, like {example}",
        lambda items: len(set(items)) == len(items) > 0 and low <= min(items) <= max(items) <= high,
        scalar=True,
    )


def one_of(names: Sequence[str]) -> ValueType:
    """Return a type of the given names."""

    def convert(value: object) -> str:
        name = str(value) if type(value) is int else value  # YAML reads 128 as a number
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return name

    return ValueType("NAME", convert)


to_gpus = integers(
    "cpu",
    "different GPU numbers, like 0 or 0,1 or [0,1]",
    lambda numbers: min(numbers, default=0) >= 0 and len(set(numbers)) == len(numbers),
    scalar=True,
)


def to_assignments(value: object) -> tuple[str, ...]:
    """Return a tuple of `NAME=NUMBER` for one or several of them, or a mapping of YAML; True is 1, and False 0."""
    items: Any = value
    if isinstance(value, Mapping):
        items = [f"{name}={number}" for name, number in value.items()]
    elif isinstance(value, str):
        items = value.split()
    assignments = {}
    for item in items if isinstance(items, list | tuple) else ("",):
        name, _, text = str(item).partition("=")
        text = str(float(BOOLEANS[text.lower()])) if text.lower() in BOOLEANS else text
        try:
            assignments[name] = f"{float(text):g}"
        except ValueError:
            raise ValueError("a list like h=0.3 t_alpha=0.01") from None
    return tuple(f"{name}={number}" for name, number in assignments.items())


def to_pair_sets(value: object) -> tuple[str, ...]:
    """Return a tuple of `NAME=PATH` or `NAME=PATH:ROOT` for one or several of them, or a mapping of YAML."""
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
            raise ValueError(f"{rule} ({short_repr(item)} has no path)")
        if not _SET_NAME.fullmatch(name) or name.lower() == "avg":
            raise ValueError(
                f"{rule} ({short_repr(name)} is not made of {SET_NAMES}, or is Avg; write NAME={path:.100})"
            )
        if name.lower() in seen:
            raise ValueError(f"{rule} ({short_repr(name)} is there twice; name one of them, NAME={path:.100})")
        seen.add(name.lower())
        for place in (path, root):
            to_path(place or ".")
        sets.append(f"{name}={path}" + (f":{root}" if root else ""))
    return tuple(sets)


def pair_set_paths(sets: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Return {name: (path, folder of the images or None)} of the tuple of to_pair_sets, in its order."""
    return {name: (path, root) for name, path, root in map(split_pair_set, sets)}


def split_pair_set(text: str) -> tuple[str, str, str | None]:
    """Return name, path and root of `NAME=PATH:ROOT`; without NAME, the file's or folder's name without its suffix."""
    match = _PAIR_SET.fullmatch(text.strip())
    if match is None:
        return "", "", None
    name, path, root = match.groups()
    path, root = os.path.expanduser(path), os.path.expanduser(root) if root else None
    return Path(path).stem if name is None else name, path, root


def to_checkpoints(value: object) -> tuple[str, ...]:
    """Return a tuple of `NAME=PATH` for one or several of them; without NAME it is the name of the run."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError("a list of runs or Backbone files, like HR=checkpoints_best/HRTRAIN_… LR=…")
    named = []
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not name or "/" in name or "\\" in name:  # an = in a folder's name stands after a slash
            name, path = "", item
        path = to_path(path)
        named.append(f"{name or _own_name(Path(path))}={path}")
    twice = [name for name, count in Counter(item.partition("=")[0] for item in named).items() if count > 1]
    if twice:
        raise ValueError(
            f"a list of runs or Backbone files with different names ({twice[0]!r:.100} is there twice; write NAME=PATH)"
        )
    return tuple(named)


def _own_name(path: Path) -> str:
    """Return the name of the run that the path is, or that its file belongs to. Files of others have their own name."""
    path = path.absolute()
    if path.suffix == ".pth":
        name = path.parent.name if path.name.startswith(("Backbone_", "EMA_")) else path.stem
    else:
        name = path.name
    return name.replace("=", "_")


def checkpoint_paths(checkpoints: Sequence[str]) -> dict[str, Path]:
    """Return {name: path} of the tuple of to_checkpoints, in its order."""
    return {name: Path(path) for name, path in (item.split("=", 1) for item in checkpoints)}
