"""Read settings from a command line and a YAML file into a frozen dataclass.

A setting is a field of a dataclass derived from Settings. Its value comes from the command line, else from the file
given with --config, else from the default. The field's `type` converts and checks it, wherever it comes from:

    @dataclass(frozen=True, kw_only=True)
    class Drawing(Settings):
        size: int = option(default=112, type=integer(1), help="pixels a side")
        mirror: bool = flag(help="flip the image")

    parse(Drawing, "draw.py", ["--size=64", "--mirror"])        # Drawing(size=64, mirror=True)

A mistake raises UsageError with one line: the flag, or the file and key; what is wrong; what to do.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

from util.cli.types import BOOLEANS, Convert, Interval, integer, one_of, short_repr, to_boolean, to_path
from util.errors import UsageError

Explicit = Mapping[str, object]  # {name of a setting: value}: what the command line and the file say

PATHS = "Where things are"  # sections of --help
CLI_ONLY = "Command line only"
CONFIG_LIMIT = 100_000  # characters of a file for --config
NAME_LIMIT = 60  # characters of an unknown flag in a message
_FLAG = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True, kw_only=True)
class Option:
    """A setting and its flag."""

    name: str = ""  # of the field
    default: object = None  # a tuple makes the flag take several words
    type: Convert  # converts a word of the command line, or a YAML value; raises ValueError with its rule
    help: str  # what the value is
    group: str  # section of --help
    metavar: str  # the value's name in --help
    default_help: str = "none"  # meaning of a default of None or (), for --help
    aliases: tuple[str, ...] = ()  # further names of the flag
    required: bool = False  # None and () are refused
    positional: bool = False  # the command line gives the value without a flag
    single_dash: bool = False  # -name is understood as well as --name
    split_words: bool = False  # `type` gets the words as a list, because one of them may contain spaces

    @property
    def takes_many(self) -> bool:
        return isinstance(self.default, tuple)

    @property
    def flag(self) -> str:
        return self.metavar if self.positional else f"--{self.name}"

    @property
    def default_text(self) -> str:
        """Return the default, or what it means, for --help."""
        if self.required or self.default in (None, ()):
            return "required" if self.required else self.default_help
        if isinstance(self.default, tuple):
            return " ".join(map(str, self.default))
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def convert(self, value: object, where: str) -> object:
        """Return `value` as the type has it. UsageError starts with `where`: the flag, or the file and key."""
        if value is None and self.default is None:
            return None
        try:
            return self.type(value)
        except ValueError as rule:
            advice = f"Give {self.metavar}" if self.required else f"Leave it out for the default ({self.default_text})"
            raise UsageError(f"{where}: {short_repr(value)} is not {rule}. {advice}.") from None


def option(group: str = "Settings", *, type: Convert, default: Any = None, metavar: str = "", **more: Any) -> Any:
    """Return a dataclass field with an Option in its metadata; without `metavar`, the type's own is used.

    See Option for the arguments.
    """
    metavar = metavar or getattr(type, "metavar", "PATH")
    return dataclasses.field(
        default=default, metadata={"option": Option(type=type, group=group, metavar=metavar, **more)}
    )


def options_of(kind: type) -> list[Option]:
    """Return the options of a dataclass of settings."""
    return [
        dataclasses.replace(field.metadata["option"], name=field.name, default=field.default)
        for field in dataclasses.fields(kind)
    ]


def flag(group: str = "Settings", *, help: str) -> Any:
    """Return a field that is False unless its flag is given."""
    return option(group, default=False, type=to_boolean, metavar="True|False", help=help)


def choice(names: Sequence[str], *, default: str | None, group: str = "Settings", help: str = "", **more: Any) -> Any:
    """Return a field that is one of `names`; its help lists them unless there is a `help`."""
    return option(group, default=default, type=one_of(names), help=help or ", ".join(names), **more)


def folder(group: str = PATHS, *, help: str, **more: Any) -> Any:
    """Return a field that is the path of a folder, as text."""
    return option(group, type=to_path, metavar="DIR", help=help, **more)


def processes() -> Any:
    """Return the field of --processes."""
    text = "processes that share the work; 0: the main process alone"
    return option(type=integer(0, 256), help=text, default_help="one per CPU core")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the dataclasses whose fields are settings. UsageError where a value breaks its rule."""

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            value = option.convert(getattr(self, option.name), option.flag)
            if option.required and value in (None, ()):
                raise UsageError(f"{option.flag}: missing. Give {option.metavar.removesuffix(' ...')}: {option.help}.")
            object.__setattr__(self, option.name, value)  # a frozen dataclass has no other way

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
        CLI_ONLY,
        type=to_path,
        metavar="FILE",
        help="YAML file of settings, named like the flags; the command line overrides it",
    )
    print_config: bool = flag(CLI_ONLY, help="print the settings as a file for --config, and exit")
    debug: bool = flag(CLI_ONLY, help="show the traceback of an error")  # util.errors.run_script reads it


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
    epilog: str | None = None,
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
        epilog: text of --help below the flags.

    Raises:
        UsageError: a mistake.
        SystemExit: code 0 after --help or --print_config has printed.
    """
    own = _by_name(options_of(kind))
    cli_only = _by_name(options_of(_CommandLineOnly))
    names = own | cli_only
    if "--help" in argv or "-h" in argv:
        _print_help(list(dict.fromkeys(names.values())), script, groups, description, epilog)
        raise SystemExit(0)
    explicit = _convert_all(_read_words(argv, names), names, prefix="--")
    only = {name: explicit.pop(name, None) for name in cli_only}
    if only["config"] is not None:
        explicit = _read_file(str(only["config"]), own) | explicit
    inherited = {} if inherit is None else inherit(explicit)
    settings = kind(**{name: value for name, value in inherited.items() if name in own} | explicit)
    if check is not None:
        check(settings)
    if only["print_config"]:
        print(settings.as_yaml(), end="")
        raise SystemExit(0)
    return settings


def _print_help(
    options: Sequence[Option], script: str, groups: Sequence[str], description: str | None, epilog: str | None
) -> None:
    words = "".join(f" {option.metavar}" for option in options if option.positional)
    hint = "A flag that takes True or False means True when it stands alone."
    parser = argparse.ArgumentParser(
        prog=script,
        usage=f"python {script}{words} [--flag value | --flag=value] ...".replace("%", "%%"),
        description=f"{description.strip()}\n\n{hint}" if description else hint,
        epilog=epilog,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        add_help=False,
    )
    titles = dict.fromkeys([*groups, *(option.group for option in options)])
    sections = {title: parser.add_argument_group(title) for title in titles}
    for option in sorted(options, key=lambda option: not option.required):  # the required ones first
        flags = [option.name] if option.positional else [f"--{name}" for name in (option.name, *option.aliases)]
        sections[option.group].add_argument(
            *flags,
            *([f"-{option.name}"] if option.single_dash else []),
            nargs="+" if option.split_words else None,
            metavar=option.metavar.removesuffix(" ...") if option.split_words else option.metavar,
            help=f"{option.help} (default: {option.default_text})".replace("%", "%%"),
        )
    sections[CLI_ONLY].add_argument("-h", "--help", action="store_true", help="show this and exit")
    parser.print_help()


def _read_words(argv: Sequence[str], names: Mapping[str, Option]) -> dict[str, object]:
    """Return {name of a flag as it was typed: its word, or its words}.

    argparse does not read all the forms that users type: `--f v`, `--f=v`, `--f = v`, `--f= v` and `--f =v` are the
    same; so are `[0, 1]` as one word and as two; a boolean flag alone is True. Words of a positional setting may stand
    anywhere.
    """
    positional = next((option for option in names.values() if option.positional), None)
    starts = [index for index, word in enumerate(argv) if _FLAG.match(word)]
    words = list(argv[: starts[0]] if starts else argv)
    given: dict[str, object] = {}
    for start, end in pairwise([*starts, len(argv)]):
        first, *values = argv[start:end]
        if values and values[0].startswith("=") and "=" not in first:
            first += values.pop(0)
        typed, equals, value = first.partition("=")
        name = typed.lstrip("-")
        option = names.get(name)
        if option is None or option is positional or not (typed.startswith("--") or option.single_dash):
            nearest = _nearest(name, names)
            raise UsageError(
                f"{typed:.{NAME_LIMIT}}: unknown flag. The nearest one is --{nearest} (--help lists them all)."
            )
        if value:
            values.insert(0, value)
        elif equals and not values:
            raise UsageError(f"{typed}=: a value is missing after the equals sign. Write {typed}=VALUE.")
        is_boolean = option.type is to_boolean
        if is_boolean and (not values or (positional and not equals and values[0].lower() not in BOOLEANS)):
            values.insert(0, "True")
        if not values:
            raise UsageError(f"{typed}: a value is missing. Write {typed} {option.metavar}.")
        if not option.takes_many:
            if values[1:] and not positional:
                raise UsageError(
                    f"{short_repr(values[1])}: unexpected after {typed} {values[0]:.{NAME_LIMIT}}, which takes one "
                    "value. Leave it out."
                )
            words += values[1:]
            del values[1:]
        given[name] = values if option.split_words else " ".join(values)
    if words and positional is None:
        raise UsageError(f"{short_repr(words[0])}: unexpected. Every value follows its flag, as in --name value.")
    if words and positional:
        if words[1:] and not positional.takes_many:
            raise UsageError(f"{short_repr(words[1])}: unexpected after {short_repr(words[0])}. Leave it out.")
        given[positional.name] = words if positional.takes_many else words[0]
    return given


class _Loader(yaml.SafeLoader):
    """Refuse aliases of lists and mappings: in a few lines they stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="an alias of a list or mapping", problem_mark=node.start_mark)
        return node


def _read_file(file: str, names: Mapping[str, Option]) -> dict[str, object]:
    """Return {field name: converted value} of the settings in a YAML file."""
    advice = "Write lines like `lr: 0.025`."
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read(CONFIG_LIMIT + 1)
        if len(text) > CONFIG_LIMIT:
            raise ValueError(f"longer than {CONFIG_LIMIT:,} characters")
        content = yaml.load(text, _Loader)
    except OSError as error:
        raise UsageError(f"--config={file}: cannot be read ({error.strerror}). Give an existing file.") from None
    # ValueError: not UTF-8, or a date like 2024-13-01. LookupError, AttributeError: tags like !!int with another text.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{file}: not valid YAML{line} ({reason:.200}). {advice}") from None
    if not isinstance(content, dict | None):
        raise UsageError(f"{file}: not a mapping of settings to values. {advice}")
    for key in content or {}:
        if key not in names:
            raise UsageError(
                f"{file}: {short_repr(key)}: unknown key. The nearest one is {_nearest(short_repr(key), names)}."
            )
    return _convert_all(content or {}, names, prefix=f"{file}: ")  # None: a file of comments only


def _convert_all(given: Explicit, names: Mapping[str, Option], prefix: str) -> dict[str, object]:
    """Return converted values under the names of their fields. UsageError if two names of one setting differ."""
    converted: dict[str, object] = {}
    for name, value in given.items():
        option = names[name]
        where = option.flag if option.positional and prefix == "--" else f"{prefix}{name}"
        value = option.convert(value, where)
        if converted.setdefault(option.name, value) != value:
            both = " and ".join(other for other in given if names[other].name == option.name)
            raise UsageError(f"{where}: {both} are one setting and differ here. Give one of them.")
    return converted


def _by_name(options: Iterable[Option]) -> dict[str, Option]:
    return {name: option for option in options for name in (option.name, *option.aliases)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path | Interval) else value


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {candidate.lower(): candidate for candidate in known}
    return lower[difflib.get_close_matches(name[:NAME_LIMIT].lower(), lower, n=1, cutoff=0.0)[0]]
