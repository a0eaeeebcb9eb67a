"""Define every flag of the accuracy curve: its default, its rule and its help. Imports no torch."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from util.cli.options import GROUPS, EvaluationSettings, ReportSettings
from util.cli.parser import PATHS, flag, option, parse
from util.cli.types import different_integers, to_path
from util.face import FACE_SIZE
from util.files import check_report_paths


def _to_checkpoints(value: object) -> tuple[str, ...]:
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
        raise ValueError(f"a list of runs or Backbone files with different names ({twice[0]!r:.100} is there twice)")
    return tuple(named)


def _own_name(path: Path) -> str:
    """Return the name of the run that the path is, or that its file belongs to."""
    return (path.absolute().parent if path.suffix == ".pth" else path.absolute()).name.replace("=", "_")


@dataclass(frozen=True, kw_only=True)
class CurveSettings(ReportSettings, EvaluationSettings):
    """The settings of applications/resolution_curve. UsageError where a value breaks its rule."""

    checkpoints: tuple[str, ...] = option(
        PATHS,
        default=(),
        type=_to_checkpoints,
        metavar="NAME=PATH ...",
        help="recognition networks to compare: runs (their best or newest epoch) or Backbone files; NAME: legend",
        required=True,
        split_words=True,
    )
    sizes: tuple[int, ...] = option(
        "Resolution",
        default=(112, 56, 28, 21, 16, 14, 8),
        type=different_integers(4, FACE_SIZE, "112 56 28"),
        metavar="N ...",
        help=f"pixels a side that faces are shrunk to; {FACE_SIZE}, the full face, is always included",
    )
    SR_eval: bool = flag("Resolution", help="also enlarge by super resolution, at the scales that have a network")

    @property
    def paths(self) -> dict[str, Path]:
        """Return {name: path} of `checkpoints`."""
        return {name: Path(path) for name, path in (item.split("=", 1) for item in self.checkpoints)}


def parse_curve(argv: list[str]) -> CurveSettings:
    """Return the settings from the arguments. Raise as parse() does."""

    def check(settings: CurveSettings) -> None:
        check_report_paths(settings.json, settings.plot)

    return parse(CurveSettings, "-m applications.resolution_curve", argv, groups=GROUPS, check=check)
