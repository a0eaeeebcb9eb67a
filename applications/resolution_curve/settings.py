"""Define every flag of the accuracy curve: its default, its rule and its help. Imports no torch."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from util.cli.parser import Settings, choice, flag, option, parse
from util.cli.types import (
    EVAL_BATCH_DEFAULTS,
    PRECISIONS,
    integer,
    integers,
    pair_set_paths,
    to_gpus,
    to_pair_sets,
    to_path,
)
from util.errors import UsageError
from util.face import FACE_SIZE
from util.files import check_report_paths

PATHS, RESOLUTION, MACHINE, OUTPUT = "Where things are", "Resolution", "Machine", "Output"
GROUPS = (PATHS, RESOLUTION, MACHINE, OUTPUT)
# NAME=PATH, of which NAME= may be left out; there may be an = in a folder's name, after a slash.
_NAMED = re.compile(r"(?:([^=/\\]+)=)?(.*)", re.DOTALL)


def _to_checkpoints(value: object) -> tuple[str, ...]:
    """Return a tuple of `NAME=PATH` for one or several of them; without NAME it is the name of the run."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError("a list of runs or Backbone files, like HR=checkpoints_best/HRTRAIN_… LR=…")
    named = []
    for item in items:
        name, path = _NAMED.fullmatch(item).groups()
        path = to_path(path)
        named.append(f"{name or _own_name(Path(path))}={path}")
    twice = [name for name, count in Counter(item.partition("=")[0] for item in named).items() if count > 1]
    if twice:
        raise ValueError(f"a list of runs or Backbone files with different names ({twice[0]!r} is there twice)")
    return tuple(named)


def _own_name(path: Path) -> str:
    """Return the name of the run that the path is, or that its file belongs to."""
    return (path.absolute().parent if path.suffix == ".pth" else path.absolute()).name.replace("=", "_")


@dataclass(frozen=True, kw_only=True)
class CurveSettings(Settings):
    """The settings of applications/resolution_curve. UsageError where a value breaks its rule."""

    checkpoints: tuple[str, ...] = option(
        default=(),
        type=_to_checkpoints,
        metavar="NAME=PATH ...",
        help="recognition networks to compare: runs (their best or newest epoch) or Backbone files; NAME: legend",
        default_help="required",
        split_words=True,
        group=PATHS,
    )
    data_dir: str = option(default="./data", type=to_path, metavar="DIR", help="verification sets", group=PATHS)
    val_data: tuple[str, ...] = option(
        default=(),
        type=to_pair_sets,
        metavar="SET ...",
        help="further verification sets, as in validation.py",
        split_words=True,
        group=PATHS,
    )
    sizes: tuple[int, ...] = option(
        default=(112, 56, 28, 21, 16, 14, 8),
        type=integers(
            None,
            f"different whole numbers from 4 to {FACE_SIZE}, like 112 56 28",
            lambda sizes: len(set(sizes)) == len(sizes) > 0 and all(4 <= size <= FACE_SIZE for size in sizes),
        ),
        metavar="N ...",
        help=f"pixels a side that faces are shrunk to; {FACE_SIZE}, the full face, is always included",
        group=RESOLUTION,
    )
    SR_eval: bool = flag(help="also enlarge by super resolution, at the scales that have a network", group=RESOLUTION)
    sr_checkpoint_dir: str | None = option(
        type=to_path,
        metavar="PATH",
        help="super resolution: an SR file, a run, or a folder of runs",
        default_help="./checkpoints_best",
        group=PATHS,
    )
    LR_oneside: bool = flag(help="low resolution in the first image of each pair only", group=RESOLUTION)
    gpu_num: tuple[int, ...] = option(
        default=(0,), type=to_gpus, metavar="LIST", help="GPUs, as 0 or 0,1 or [0,1]; or cpu", group=MACHINE
    )
    precision: str = choice(PRECISIONS, default="auto", help="number format of the backbones", group=MACHINE)
    batch_size: int | None = option(
        type=integer(1),
        metavar="N",
        help="images per batch, over all GPUs",
        default_help=EVAL_BATCH_DEFAULTS,
        group=MACHINE,
    )
    plot: str | None = option(
        type=to_path,
        metavar="FILE",
        help="draw the curve, as .png, .pdf or .svg",
        default_help="not drawn",
        group=OUTPUT,
    )
    json: str | None = option(
        type=to_path, metavar="FILE", help="write all numbers", default_help="not written", group=OUTPUT
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoints:
            raise UsageError("--checkpoints: missing; name runs or Backbone files, NAME=PATH each")
        if self.sr_checkpoint_dir and not self.SR_eval:
            raise UsageError("--sr_checkpoint_dir: is used with --SR_eval alone; add it, or leave this out")

    @property
    def paths(self) -> dict[str, Path]:
        """Return {name: path} of `checkpoints`."""
        return {name: Path(path) for name, path in (item.split("=", 1) for item in self.checkpoints)}

    @property
    def sr_path(self) -> str:
        """Return where to look for super resolution networks."""
        return self.sr_checkpoint_dir or "./checkpoints_best"

    @property
    def pair_set_paths(self) -> dict[str, tuple[str, str | None]]:
        """Return `val_data` as {name: (path, folder of the images or None)} for find_pair_sets."""
        return pair_set_paths(self.val_data)


def parse_curve(argv: list[str]) -> CurveSettings:
    """Return the settings from the arguments. UsageError for a mistake; SystemExit(0) after --help has printed."""

    def check(settings: CurveSettings) -> None:
        check_report_paths(settings.json, settings.plot)

    return parse(CurveSettings, "-m applications.resolution_curve", argv, groups=GROUPS, check=check)
