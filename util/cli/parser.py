"""Read settings from a command line and a YAML file into a frozen dataclass.

A setting is a field of a dataclass derived from Settings. Its value comes from the command line, else from the file
given with --config, else from the default. The field's `type` converts and checks it, wherever it comes from:

    @dataclass(frozen=True, kw_only=True)
    class Drawing(Settings):
        size: int = option(default=112, type=integer(1), metavar="N", help="pixels a side")
        mirror: bool = flag(help="flip the image")

    parse(Drawing, "draw.py", ["--size=64", "--mirror"])        # Drawing(size=64, mirror=True)

argparse reads the flags and prints --help. A mistake raises UsageError with one line: the flag, or the file and key;
what is wrong; what to do.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from util.cli.types import Convert, integer, is_boolean_word, one_of, to_boolean, to_path
from util.errors import UsageError

Explicit = Mapping[str, object]  # {name of a setting: value}: what the command line and the file say

CLI_ONLY = "Command line only"
_FLAG = re.compile(r"--?[A-Za-z]")


def option(
    *,
    default: object = None,
    type: Convert,
    help: str,
    metavar: str,
    group: str = "Settings",
    default_help: str = "none",
    aliases: tuple[str, ...] = (),
    required: bool = False,
    positional: bool = False,
    single_dash: bool = False,
    split_words: bool = False,
) -> Any:
    """Return a dataclass field that knows its flag.

    Args:
        default: value if the setting is not given; a tuple makes the flag take several words.
        type: converts a word of the command line, or a YAML value; raises ValueError with its rule.
        help: what the value is.
        metavar: the value's name in --help.
        group: section of --help.
        default_help: meaning of a default of None or (), for --help.
        aliases: further names of the flag.
        required: None is refused.
        positional: the command line gives the value without a flag.
        single_dash: -name is understood as well as --name.
        split_words: `type` gets the words as a list, because one of them may contain spaces.
    """
    metadata = {"type": type, "help": help, "metavar": metavar, "group": group, "aliases": aliases}
    metadata |= {"default_help": "required" if required else default_help, "required": required}
    metadata |= {"positional": positional, "single_dash": single_dash, "split_words": split_words}
    return dataclasses.field(default=default, metadata=metadata)


def flag(*, help: str, group: str = "Settings") -> Any:
    """Return a field that is False unless its flag is given."""
    return option(default=False, type=to_boolean, metavar="True|False", help=help, group=group)


def choice(names: Sequence[str], *, default: str | None, help: str = "", **more: Any) -> Any:
    """Return a field that is one of `names`; its help lists them unless there is a `help`."""
    return option(default=default, type=one_of(names), metavar="NAME", help=help or ", ".join(names), **more)


def processes() -> Any:
    """Return the field of --processes."""
    return option(
        type=integer(0, 256),
        metavar="N",
        help="processes that share the work; 0: the main process alone",
        default_help="one per CPU core",
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the dataclasses whose fields are settings. UsageError where a value breaks its rule."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _convert(field, getattr(self, field.name), _flag_of(field))
            if value is None and field.metadata["required"]:
                raise UsageError(f"{_flag_of(field)}: missing; {field.metadata['help']}")
            object.__setattr__(self, field.name, value)  # a frozen dataclass has no other way

    def as_dict(self) -> dict[str, str | int | float | bool | list[int] | list[str] | None]:
        """Return plain values that torch.load(weights_only=True) and YAML read back; tuples become lists."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def as_yaml(self) -> str:
        """Return the text of a file for --config that gives the same settings again."""
        return yaml.safe_dump(
            self.as_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=math.inf
        )


@dataclass(frozen=True, kw_only=True)
class _CommandLineOnly:
    """Flags that are no settings of a run: a file for --config cannot give them."""

    config: str | None = option(
        type=to_path,
        metavar="FILE",
        help="YAML file of settings, named like the flags; the command line overrides it",
        group=CLI_ONLY,
    )
    print_config: bool = flag(help="print the settings as a file for --config, and exit", group=CLI_ONLY)
    debug: bool = flag(help="show the traceback of an error", group=CLI_ONLY)  # util.errors.run_script reads it


S = TypeVar("S", bound=Settings)


def parse(
    kind: type[S],
    script: str,
    argv: list[str],
    *,
    groups: Sequence[str] = (),
    description: str | None = None,
    inherit: Callable[[Explicit], Explicit] | None = None,
    check: Callable[[S], None] | None = None,
) -> S:
    """Return the settings that the arguments of a program give.

    Args:
        kind: dataclass of the settings.
        script: what follows `python` in the command: "train.py", "-m applications.demo".
        argv: arguments without the program's name.
        groups: sections of --help in their order; without them, the order of the fields.
        description: text of --help above the flags.
        inherit: gets the explicit settings and returns values that replace the defaults; unknown names are ignored.
        check: raises UsageError if the settings do not fit this process.

    Raises:
        UsageError: a mistake.
        SystemExit: code 0 after --help or --print_config has printed.
    """
    fields = [*dataclasses.fields(kind), *dataclasses.fields(_CommandLineOnly)]
    parser = _build_parser(fields, script, groups, description)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(0)
    names = _by_name(fields)
    explicit = _merge_aliases(vars(parser.parse_args(normalize_argv(argv, names))), names, prefix="--")
    cli_only = {field.name: explicit.pop(field.name, None) for field in dataclasses.fields(_CommandLineOnly)}
    if cli_only["config"] is not None:
        explicit = _read_file(str(cli_only["config"]), _by_name(dataclasses.fields(kind))) | explicit
    own = {field.name for field in dataclasses.fields(kind)}
    inherited = {} if inherit is None else inherit(explicit)
    settings = kind(**{name: value for name, value in inherited.items() if name in own} | explicit)
    if check is not None:
        check(settings)
    if cli_only["print_config"]:
        print(settings.as_yaml(), end="")
        raise SystemExit(0)
    return settings


def inherit_from_run(inherit: Callable[[str], Explicit] | None) -> Callable[[Explicit], Explicit]:
    """Return an `inherit` for parse() that takes the settings of the run that --resume_dir names, if it is given."""

    def inherited(explicit: Explicit) -> Explicit:
        resume_dir = explicit.get("resume_dir")
        return {} if inherit is None or resume_dir is None else inherit(str(resume_dir))

    return inherited


def normalize_argv(argv: Sequence[str], names: Mapping[str, Field]) -> list[str]:
    """Rewrite arguments for argparse: words without a flag first, then each flag as `--flag=value`.

    `--f v`, `--f=v`, `--f = v`, `--f= v` and `--f =v` are the same; so are `[0, 1]` as one word and as two; a boolean
    flag alone is True.
    """
    groups: list[list[str]] = [[]]  # the first one has the words before any flag
    for token in argv:
        if _FLAG.match(token):
            groups.append([])
        groups[-1].append(token)
    takes_words = any(field.metadata["positional"] for field in names.values())
    words = groups[0]
    if words and not takes_words:
        raise UsageError(f"{words[0]!r}: unexpected; every value follows its flag, as in --name value")
    normalized = []
    for first, *values in groups[1:]:
        name, equals, value = first.partition("=")
        field = names.get(name.lstrip("-"))
        if field is None or not (name.startswith("--") or field.metadata["single_dash"]):
            nearest = _nearest(name.lstrip("-"), names)
            raise UsageError(f"{name}: unknown flag; the nearest one is --{nearest} (--help lists them all)")
        if equals:
            values.insert(0, value)
        elif values and values[0].startswith("="):
            equals, values[0] = "=", values[0][1:]
        if equals and not values[0]:
            del values[0]
            if not values:
                raise UsageError(f"{name}=: a value is missing after the equals sign; write {name}=VALUE")
        is_boolean = field.metadata["type"] is to_boolean
        if is_boolean and (not values or (takes_words and not equals and not is_boolean_word(values[0]))):
            values.insert(0, "True")
        if not values:
            raise UsageError(f"{name}: a value is missing; write {name} {field.metadata['metavar']}")
        if not isinstance(field.default, tuple):
            rest = values[1:]
            if rest and not takes_words:
                raise UsageError(
                    f"{rest[0]!r}: unexpected after {name} {values[0]}, which takes one value; leave it out"
                )
            words += rest
            del values[1:]
        normalized += [name, *values] if field.metadata["split_words"] else [f"{name}={' '.join(values)}"]
    return words + normalized


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")


class _Record(argparse.Action):
    """Convert a value and keep it under the name that was typed; aliases are merged later."""

    def __init__(self, *, field: Field, **more: Any):
        super().__init__(**more)
        self.field = field

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        where = option_string or str(self.metavar)
        setattr(namespace, (option_string or self.dest).lstrip("-"), _convert(self.field, values, where))


def _build_parser(
    fields: Iterable[Field], script: str, groups: Sequence[str], description: str | None
) -> argparse.ArgumentParser:
    words = "".join(f" {field.metadata['metavar']}" for field in fields if field.metadata["positional"])
    hint = "A flag that takes True or False means True when it stands alone."
    parser = _Parser(
        prog=script,
        usage=f"python {script}{words} [--flag value | --flag=value] ...".replace("%", "%%"),
        description=f"{description.strip()}\n\n{hint}" if description else hint,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    titles = dict.fromkeys([*groups, *(field.metadata["group"] for field in fields)])
    sections = {title: parser.add_argument_group(title) for title in titles}
    for field in fields:
        about = field.metadata
        text = f"{about['help']} (default: {_default_text(field)})".replace("%", "%%")
        several = isinstance(field.default, tuple)
        if about["positional"]:
            flags = [field.name]
            nargs: str | None = "*" if several else "?"
        else:
            flags = [f"--{name}" for name in (field.name, *about["aliases"])]
            flags += [f"-{field.name}"] if about["single_dash"] else []
            nargs = "+" if about["split_words"] else None
        metavar = about["metavar"].removesuffix(" ...") if nargs == "+" else about["metavar"]
        sections[about["group"]].add_argument(
            *flags, action=_Record, field=field, nargs=nargs, metavar=metavar, help=text
        )
    sections[CLI_ONLY].add_argument("-h", "--help", action="store_true", help="show this and exit")
    return parser


def _by_name(fields: Iterable[Field]) -> dict[str, Field]:
    return {name: field for field in fields for name in (field.name, *field.metadata["aliases"])}


def _read_file(file: str, names: Mapping[str, Field]) -> dict[str, object]:
    """Return {field name: converted value} of the settings in a YAML file."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {file}: cannot be read ({error.strerror}); give an existing file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date like 2024-13-01
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{file}: not valid YAML{line} ({reason}); write lines like `lr: 0.025`") from None
    if not isinstance(content, dict | None):
        raise UsageError(f"{file}: not a mapping of settings to values; write lines like `lr: 0.025`")
    explicit = {}
    for key, value in (content or {}).items():  # None: a file of comments only
        if key not in names:
            raise UsageError(f"{file}: {key}: unknown key; the nearest one is {_nearest(str(key), names)}")
        explicit[key] = _convert(names[key], value, f"{file}: {key}")
    return _merge_aliases(explicit, names, prefix=f"{file}: ")


def _merge_aliases(explicit: Explicit, names: Mapping[str, Field], prefix: str) -> dict[str, object]:
    """Return the values under the names of their fields. UsageError if two names of one field differ."""
    merged: dict[str, object] = {}
    for name, value in explicit.items():
        own_name = names[name].name
        if merged.setdefault(own_name, value) != value:
            both = " and ".join(other for other in explicit if names[other].name == own_name)
            raise UsageError(f"{prefix}{name}: {both} are one setting and differ here; give one of them")
    return merged


def _convert(field: Field, value: object, where: str) -> object:
    """Return `value` as the field's type has it. UsageError starts with `where`: the flag, or the file and key."""
    if value is None and field.default is None:
        return None
    try:
        return field.metadata["type"](value)
    except ValueError as rule:
        about = field.metadata
        remedy = (
            f"give {about['metavar']}"
            if about["required"]
            else f"leave it out for the default ({_default_text(field)})"
        )
        raise UsageError(f"{where}: {value!r} is not {rule}; {remedy}") from None


def _flag_of(field: Field) -> str:
    return field.metadata["metavar"] if field.metadata["positional"] else f"--{field.name}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {candidate.lower(): candidate for candidate in known}
    return lower[difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)[0]]


def _default_text(field: Field) -> str:
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default)) or field.metadata["default_help"]
    if field.default is None:
        return field.metadata["default_help"]
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
