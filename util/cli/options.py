"""The options and rules that several programs share. Each is declared here, once.

A program's settings derive from the dataclasses below and add their own options; a field that is declared again
replaces the shared one. Fields of the base classes come first in a section of --help, the last base class before the
others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.cli.parser import PATHS, Explicit, Settings, choice, flag, folder, option
from util.cli.types import (
    EVAL_BATCH_DEFAULTS,
    FROM_0_TO_1,
    PRECISIONS,
    SELECT,
    SET_NAMES,
    Interval,
    integer,
    pair_set_paths,
    to_file,
    to_gpus,
    to_interval,
    to_pair_sets,
    to_path,
)
from util.errors import UsageError
from util.face import CHANNEL_ORDERS, CROPS, INPUT_SCALES

# The sections of --help, in their order; a program shows those that it has options in.
GROUPS = (PATHS, "Data", "Model", "Optimization", "Identity", "Resolution", "Machine", "Output")
AUTO = "auto"  # --resume_dir=auto


def gpus() -> Any:
    """Return the field of --gpu_num."""
    return option("Machine", default=(0,), type=to_gpus, help="GPUs, as 0 or 0,1 or [0,1]; or cpu")


def eval_batch_size() -> Any:
    """Return the field of the batch size of an evaluation."""
    return option(
        "Machine",
        type=integer(1),
        help="images per batch of the evaluation, over all GPUs",
        default_help=EVAL_BATCH_DEFAULTS,
    )


def precision() -> Any:
    """Return the field of --precision."""
    return choice(
        PRECISIONS,
        default="auto",
        group="Machine",
        help="what the backbone computes in; auto: bf16 on a GPU that has it, else fp32",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """The settings of programs that evaluate on verification sets."""

    data_dir: str = folder(default="./data", help="training and verification sets")
    val_data: tuple[str, ...] = option(
        "Data",
        default=(),
        type=to_pair_sets,
        metavar="SET ...",
        help=(
            "further verification sets, each NAME=PATH: a bcolz folder, an InsightFace .bin file, a folder of RFW's "
            "layout, or a text list of pairs with its images in the same folder, or in ROOT with NAME=PATH:ROOT. A "
            f"name has {SET_NAMES}; without NAME= it is the file's name. A name of a set in data_dir, such as LFW or "
            "AgeDB (in any case), replaces it. none: no further sets"
        ),
        split_words=True,
    )
    SR_eval: bool = flag(
        "Resolution", help="also evaluate at low resolution, and after super resolution of the same small images"
    )
    sr_checkpoint_dir: str | None = option(
        "Resolution",
        type=to_path,
        help="super resolution network: an SR file, a run, or a folder of runs (the newest for each scale)",
        default_help="the folder of the best checkpoints",
    )
    gpu_num: tuple[int, ...] = gpus()
    precision: str = precision()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sr_checkpoint_dir and not self.SR_eval:
            raise UsageError("--sr_checkpoint_dir: is used with --SR_eval alone. Add --SR_eval, or leave this out.")

    @property
    def sr_path(self) -> str:
        """Return where to look for the super resolution networks."""
        return self.sr_checkpoint_dir or "./checkpoints_best"

    @property
    def pair_set_paths(self) -> dict[str, tuple[str, str | None]]:
        """Return `val_data` as {name: (path, folder of the images or None)} for find_pair_sets."""
        return pair_set_paths(self.val_data)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """The settings of programs that read recognition networks of other projects."""

    channel_order: str | None = choice(
        CHANNEL_ORDERS,
        default=None,
        group="Model",
        help="channels that a network of another project takes: RGB or BGR",
        default_help="its project's",
    )
    input_scale: str | None = choice(
        INPUT_SCALES,
        default=None,
        group="Model",
        help=f"pixel values that a network of another project takes: {', '.join(INPUT_SCALES)}",
        default_help="its project's",
    )


def eval_crop() -> Any:
    """Return the field of --eval_crop."""
    return choice(
        CROPS,
        default=None,
        group="Model",
        help="what networks see: 128: the center of the face resized to 128 pixels; whole: the complete face",
        default_help="as they were trained",
    )


@dataclass(frozen=True, kw_only=True)
class TrainedNetworkSettings(NetworkSettings):
    """The settings of programs that use one trained network."""

    network: str = option(
        PATHS,
        default="",
        type=to_path,
        metavar="FILE",
        help="network: a Backbone file, the folder of a run, a network of another project, or .onnx",
        required=True,
    )
    eval_crop: str | None = eval_crop()
    gpu_num: tuple[int, ...] = gpus()


@dataclass(frozen=True, kw_only=True)
class PhotographSettings(TrainedNetworkSettings):
    """The settings of programs that find faces in photographs and compare them."""

    calibration: Path | None = option(
        PATHS,
        type=to_file,
        metavar="FILE",
        help="how alike the network finds strangers, from applications.calibrate",
        default_help="the one in an exported network, if any",
    )
    select: str = choice(
        SELECT, default="largest", group="Data", help="which of several faces: largest, central or best"
    )
    aligned: bool = flag("Data", help="the images are aligned faces already: do not search for a face")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(NetworkSettings):
    """The settings of programs that report an evaluation."""

    eval_crop: str | None = eval_crop()
    LR_oneside: bool = flag("Resolution", help="low resolution in the first image of each pair only")
    batch_size: int | None = eval_batch_size()
    json: str | None = option(
        "Output", type=to_path, metavar="FILE", help="write the results as JSON", default_help="not written"
    )
    plot: str | None = option(
        "Output", type=to_path, metavar="FILE", help="draw the curves, as .png, .pdf or .svg", default_help="not drawn"
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """The settings of programs that train: where a run is, when it is saved, and what it runs on."""

    checkpoint_dir: str = folder(default="./checkpoints", help="runs, one folder each")
    best_checkpoint_dir: str = folder(default="./checkpoints_best", help="runs with their best epoch")
    log_dir: str = folder(default="./log", help="TensorBoard files")
    resume_dir: str | None = folder(
        help="run to continue from its newest checkpoint, or one .pth file of it; "
        f"{AUTO}: the newest run of the same settings in checkpoint_dir, or a new one",
        default_help="a new run",
    )
    max_bad: float = option(
        "Data",
        default=0.001,
        type=FROM_0_TO_1,
        help="fraction of the training images that may be unreadable, and are replaced; 0: each is an error",
    )
    save_every: Interval = option(
        "Output",
        default="15m",
        type=to_interval,
        metavar="TIME|STEPS",
        help="save within an epoch too, this often: a time like 15m, 90s or 2h, or steps like 500; none: never",
    )
    keep_last: int | None = option(
        "Output", type=integer(1), help="keep the newest N checkpoints of the run, and the best", default_help="all"
    )
    gpu_num: tuple[int, ...] = gpus()
    num_workers: int | None = option(
        "Machine",
        type=integer(0),
        help="processes that read images; 0: the main process",
        default_help="from the number of CPU cores",
    )
    seed: int = option("Machine", default=1337, type=integer(0, 2**32 - 1), help="seed of all random numbers")
    deterministic: bool = flag(
        "Machine", help="use deterministic algorithms alone: the same numbers again on the same machine, but slower"
    )


def inherit_from_run(inherit: Callable[[str], Explicit] | None) -> Callable[[Explicit], Explicit]:
    """Return an `inherit` for parse() that takes the settings of the run that --resume_dir names, if it names one.

    With --resume_dir=auto the run is not known yet, and the settings are those of the command line.
    """

    def inherited(explicit: Explicit) -> Explicit:
        resume_dir = explicit.get("resume_dir")
        return {} if inherit is None or resume_dir in (None, AUTO) else inherit(str(resume_dir))

    return inherited
