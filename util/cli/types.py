"""From what a user wrote to the value that is meant: a word of a command line, or what YAML made of one in a file.

A conversion raises ValueError with its rule, worded so that it follows "… is not", and leaves a converted value as it
is. number, whole, integers and one_of make conversions; the others are some.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Convert = Callable[[object], Any]

PRECISIONS = ("auto", "bf16", "fp16", "fp32")  # what util/precision.py makes types of
EVAL_BATCH_CPU, EVAL_BATCH_GPU = 64, 128  # images in a batch of a validation, which keeps no gradients, if not given
EVAL_BATCH_DEFAULTS = f"{EVAL_BATCH_CPU} on the CPU, {EVAL_BATCH_GPU} on each GPU"
SET_NAMES = "letters, digits, _, - and ."
_SET_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# NAME=PATH:ROOT, of which NAME= and :ROOT may be left out. A name has no slash, and C:/sets is one path, not two.
_PAIR_SET = re.compile(r"(?:([^=/\\]*)=)?((?:[A-Za-z]:(?=[/\\]))?[^:]*)(?::(.+))?")
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def to_path(value: object) -> str:
    """A path, in which a leading ~ has become the home directory."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value).strip():
        raise ValueError("a path (in a file, put text that looks like a number or a date in quotes)")
    return os.path.expanduser(value)


def to_boolean(value: object) -> bool:
    if str(value).lower() not in _BOOLEANS:
        raise ValueError("True or False (yes, no, 1 and 0 are understood too)")
    return _BOOLEANS[str(value).lower()]


def number(rule: str, accept: Callable[[float], bool], kind: type = float) -> Convert:
    """A conversion to a finite float or int for which accept() holds; `rule` says the same in words."""

    def convert(value: object) -> float:
        try:
            converted = kind(value)
            truncated = kind is int and not isinstance(value, str) and converted != value
            if isinstance(value, bool) or truncated or not math.isfinite(converted) or not accept(converted):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise ValueError(rule) from None
        return converted

    return convert


def integer(low: int, high: int | None = None) -> Convert:
    """A conversion to an int from `low` to `high`, both included."""
    rule = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"
    return number(rule, lambda value: low <= value <= (value if high is None else high), int)


def integers(word: str | None, rule: str, accept: Callable[[tuple[int, ...]], bool]) -> Convert:
    """A conversion to a tuple of integers: `[0, 1]`, `0,1`, `0 1`, `0`, a list of YAML, or `word`, if there is one, for
    an empty one."""

    def convert(value: object) -> tuple[int, ...]:
        if isinstance(value, str):
            if word and value.strip().lower() in (word, "[]"):
                return ()
            items = re.split(r"\s*,\s*|\s+", re.sub(r"^\[\s*(.*?)\s*\]$", r"\1", value.strip()))
            value = [int(item) if re.fullmatch("[0-9]{1,9}", item) else item for item in items]
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value) or not accept(value):
            raise ValueError(f"a list of {rule}" + (f", nor the word {word}" if word else ""))
        return tuple(value)

    return convert


def one_of(names: Sequence[str]) -> Convert:
    def convert(value: object) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return convert


_gpu_numbers = integers(
    "cpu",
    "different GPU numbers, like 0 or 0,1 or [0,1]",
    lambda numbers: min(numbers, default=0) >= 0 and len(set(numbers)) == len(numbers),
)


def to_gpus(value: object) -> tuple[int, ...]:
    """The numbers in `0`, `0,1` or `[0, 1]`; none for `cpu`."""
    return _gpu_numbers([value] if type(value) is int else value)  # `gpu_num: 0` in a file


def to_pair_sets(value: object) -> tuple[str, ...]:
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


def named_pair_sets(sets: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """{name: (path, folder of the images or None)} of what to_pair_sets gives, in its order."""
    return {name: (path, root) for name, path, root in map(split_pair_set, sets)}


def split_pair_set(text: str) -> tuple[str, str, str | None]:
    """The name, path and root of `NAME=PATH:ROOT`. Without NAME, that of the file or folder without its suffix."""
    match = _PAIR_SET.fullmatch(text.strip())
    if match is None:
        return "", "", None
    name, path, root = match.groups()
    path, root = os.path.expanduser(path), os.path.expanduser(root) if root else None
    return Path(path).stem if name is None else name, path, root
