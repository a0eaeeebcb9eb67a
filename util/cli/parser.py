"""Reads settings from a command line and a YAML file into a frozen dataclass, and lays out the --help that lists them.

A setting is a field of a dataclass derived from Settings. Its value comes from the command line, else from the file
given with --config, else from the default, and passes through the field's one conversion whichever way it came:

    @dataclass(frozen=True, kw_only=True)
    class Options(Settings):
        size: int = setting(112, "Pictures", whole(1), "N", "pixels a side")
        mirror: bool = switch("Pictures", "flip them")

    parse(Options, "draw.py", ("Pictures",), ["--size=64", "--mirror"])        # Options(size=64, mirror=True)

A mistake raises UsageError with one line: the flag (or file and key), the rule, the remedy. argparse lays out --help;
the flags themselves are read here, because it cannot read `--resume_dir = /a/b` or an unquoted `[0, 1]`.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from util.cli.types import Convert, one_of, to_boolean, to_path
from util.errors import UsageError

Given = Mapping[str, object]  # {name of a setting: value}

ON_COMMAND_LINE = "Command line only"
_FLAG = re.compile(r"--?[A-Za-z]")


def option(
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
    return dataclasses.field(default=default, metadata=about | {"apart": apart})


def flag(group: str, text: str) -> Any:
    return option(False, group, to_boolean, "True|False", text)


def named(default: str | None, group: str, names: Sequence[str], unset: str = "none", text: str = "") -> Any:
    """A setting that is one of `names`; its help lists them unless there is a `text`."""
    return option(default, group, one_of(names), "NAME", text or ", ".join(names), unset)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the dataclasses whose fields are settings. UsageError where a value breaks its rule."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _convert(field, getattr(self, field.name), f"--{field.name}")
            object.__setattr__(self, field.name, value)  # a frozen dataclass has no other way

    def as_dict(self) -> dict[str, str | int | float | bool | list[int] | list[str] | None]:
        """The settings as plain values that torch.load(weights_only=True) and YAML read back; tuples become lists."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def as_yaml(self) -> str:
        """The settings as a file for --config that gives the same configuration again."""
        return yaml.safe_dump(
            self.as_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=math.inf
        )


@dataclass(frozen=True, kw_only=True)
class _CommandLineOnly:
    """Flags that are no settings of a run: a file for --config cannot give them."""

    config: str | None = option(
        None,
        ON_COMMAND_LINE,
        to_path,
        "FILE",
        "YAML file of settings, named like the flags; the command line overrides it",
    )
    print_config: bool = flag(ON_COMMAND_LINE, "print the settings as a file for --config, and exit")
    debug: bool = flag(ON_COMMAND_LINE, "show the traceback of an error")


S = TypeVar("S", bound=Settings)


def parse(
    kind: type[S],
    script: str,
    groups: Sequence[str],
    argv: list[str],
    inherit: Callable[[Given], Given] = lambda given: {},
) -> S:
    """The settings from the arguments of `script` (without its name). `groups` are the sections of --help, in order.

    `inherit(given)` is told what the command line and the file say, and gives values to take, instead of the defaults,
    for what they leave out. Names in it that are no settings are passed over.
    Raises UsageError for a mistake; SystemExit(0) after --help and --print_config have printed.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(kind, script, groups), end="")
        raise SystemExit(0)
    settings = _by_name(dataclasses.fields(kind))
    others = _by_name(dataclasses.fields(_CommandLineOnly))
    given = _read_flags(argv, settings | others)
    request = _CommandLineOnly(**{name: given.pop(name) for name in list(given) if name in others})
    from_file = _read_file(request.config, settings) if request.config is not None else {}
    given = from_file | given
    inherited = inherit(given)
    parsed = kind(**{name: inherited[name] for name in inherited.keys() & settings.keys()} | given)
    if request.print_config:
        print(parsed.as_yaml(), end="")
        raise SystemExit(0)
    return parsed


def _by_name(settings: Iterable[Field]) -> dict[str, Field]:
    return {name: field for field in settings for name in (field.name, *field.metadata["aliases"])}


def _read_flags(argv: list[str], settings: Mapping[str, Field]) -> dict[str, object]:
    """{field name: converted value} of the flags in argv; a flag given twice counts once, the last time."""
    given = {}
    for flag, values in _split_flags(argv):
        field = settings.get(flag[2:]) if flag.startswith("--") else None
        if field is None:
            nearest = _nearest(flag.lstrip("-"), settings)
            raise UsageError(f"{flag}: unknown flag; the nearest one is --{nearest} (--help lists them all)")
        if len(values) > 1 and not isinstance(field.default, tuple):
            raise UsageError(f"{values[1]!r}: unexpected after {flag} {values[0]}, which takes one value; leave it out")
        if not values and field.metadata["convert"] is not to_boolean:
            raise UsageError(f"{flag}: a value is missing; write {flag} {field.metadata['metavar']}")
        value = values if field.metadata["apart"] else " ".join(values)
        given[flag[2:]] = _convert(field, value if values else True, flag)
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


def _convert(field: Field, value: object, where: str) -> object:
    """`value` as the field wants it, or a UsageError that opens with `where`, the flag or the file and key."""
    if value is None and field.default is None:
        return None
    try:
        return field.metadata["convert"](value)
    except ValueError as rule:
        remedy = f"leave it out for the default ({_default_text(field)})"
        raise UsageError(f"{where}: {value!r} is not {rule}; {remedy}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {candidate.lower(): candidate for candidate in known}
    return lower[difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)[0]]


def _default_text(field: Field) -> str:
    if field.default is None:
        return field.metadata["unset"]
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default)) or field.metadata["unset"]
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def _help(kind: type[Settings], script: str, titles: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(
        prog=script,
        usage=f"python {script} [--flag value | --flag=value] ...",
        description="A flag that takes True or False means True when it stands alone.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        add_help=False,
    )
    groups = {title: parser.add_argument_group(title) for title in (*titles, ON_COMMAND_LINE)}
    for field in dataclasses.fields(kind) + dataclasses.fields(_CommandLineOnly):
        about = field.metadata
        names = [f"--{name}" for name in (field.name, *about["aliases"])]
        text = f"{about['text']} (default: {_default_text(field)})".replace("%", "%%")
        groups[about["group"]].add_argument(*names, metavar=about["metavar"], help=text)
    groups[ON_COMMAND_LINE].add_argument("-h", "--help", action="store_true", help="show this and exit")
    return parser.format_help()
