"""Every flag of train.py and validation.py: its default, its rule and its help.

    config = parse_train(["--gpu_num=[0,1]", "--LR_train", "--stages", "10", "20"])
    config.gpu_num, config.LR_train, config.stages        # (0, 1), True, (10, 20)

util/cli/parser.py reads the command line and the file given with --config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from model.names import BACKBONE_NAMES, HEAD_NAMES, HEAD_PAPERS, HEAD_PARAMETERS, LOSS_NAMES, SR_SCALES
from util.cli.options import (
    AUTO,
    GROUPS,
    EvaluationSettings,
    NetworkSettings,
    ReportSettings,
    RunSettings,
    eval_batch_size,
    inherit_from_run,
)
from util.cli.parser import PATHS, Explicit, choice, flag, folder, option, parse
from util.cli.types import (
    FROM_0_TO_1,
    NOT_NEGATIVE,
    POSITIVE,
    different_integers,
    integer,
    integers,
    number,
    to_assignments,
    to_checkpoints,
    to_path,
)
from util.console import logger
from util.distributed import DistEnv, local_gpu_ids
from util.errors import UsageError
from util.face import CROPS

AUGMENTATIONS = ("standard", "strong")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "poly", "cosine")
FILTERING = "interclass_filtering_threshold"  # a parameter of every head

_FRACTION = number("a number above 0, and 1 at most", lambda value: 0 < value <= 1)
_BELOW_1 = number("a number from 0 to less than 1", lambda value: 0 <= value < 1)
_STAGES = integers(
    "none",
    "ascending epochs from 1 on, like 15 23 30 or [15,23,30]",
    lambda epochs: all(first < second for first, second in pairwise([0, *epochs])),
)


@dataclass(frozen=True, kw_only=True)
class Config(EvaluationSettings):
    """The settings that train.py and validation.py share. UsageError where a value breaks its rule."""

    best_checkpoint_dir: str = folder(default="./checkpoints_best", help="runs with their best epoch")
    LR_scale: tuple[int, ...] = option(
        "Resolution",
        default=(4,),
        type=different_integers(2, 14, "4 or 2,4,8"),
        metavar="N ...",
        help="low resolution is 112 // N pixels a side; several N: each is used",
    )
    LR_eval: bool = flag("Resolution", help="also evaluate at low resolution: bicubic down and up again")

    def __post_init__(self) -> None:
        super().__post_init__()
        unfit = [scale for scale in self.LR_scale if scale not in SR_SCALES]
        if self.SR_eval and unfit:
            raise UsageError(
                f"--LR_scale={unfit[0]}: super resolution enlarges {', '.join(map(str, SR_SCALES))} times only. Choose "
                f"of these, or leave --SR_eval out."
            )

    @property
    def views(self) -> tuple[str, ...]:
        """Return the names of the evaluated views: HR, and LR and SR if they are asked for."""
        if self.SR_eval:
            return ("HR", "LR", "SR")
        return ("HR", "LR") if self.LR_eval else ("HR",)

    @property
    def sr_scales(self) -> tuple[int, ...]:
        """Return the scales that are evaluated after super resolution."""
        return self.LR_scale if self.SR_eval else ()

    @property
    def sr_path(self) -> str:
        """Return where to look for the super resolution networks."""
        return self.sr_checkpoint_dir or self.best_checkpoint_dir


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunSettings, NetworkSettings, Config):
    """The settings of train.py. Epochs of warm-up may be fractions; epochs in `stages` count from 1."""

    init: str | None = option(
        PATHS,
        type=to_path,
        help="network to start from, with a new head: a run, a Backbone file, or a file of face.evoLVe, InsightFace, "
        "AdaFace, MagFace or CVLface; it tells backbone, embedding_size and train_crop",
        default_help="random weights",
    )
    train_data: str | None = folder(
        "Data",
        help="folder with one folder per identity, under data_dir or a path; or a RecordIO file train.rec",
        default_help="imgs_casia, ms1m_align_112, imgs_train or imgs",
    )
    augment: str = choice(
        AUGMENTATIONS,
        default="standard",
        group="Data",
        help="standard: crop and flip; strong: also rotation, scale, color, erasing",
    )
    train_crop: str = choice(
        CROPS,
        default="128",
        group="Data",
        help="128: resize to 128 pixels and cut a random window of 112 out; whole: the complete face. The evaluation "
        "shows the center, or the complete face",
    )
    backbone: str = choice(BACKBONE_NAMES, default="IR_SE_50", group="Model")
    embedding_size: int = option("Model", default=512, type=integer(1), help="dimensions of the embedding")
    head: str = choice(HEAD_NAMES, default="ArcFace", group="Model")
    loss: str = choice(LOSS_NAMES, default="focal", group="Model")
    # torchrun takes --s and --m for abbreviations of flags of its own, and stops; the long names reach the program.
    s: float | None = option(
        "Model",
        type=POSITIVE,
        help="scale of the head's cosines",
        default_help="the head's, see below",
        aliases=("head_scale",),
    )
    m: float | None = option(
        "Model",
        type=NOT_NEGATIVE,
        help="margin: radians for ArcFace, cosine for CosFace",
        default_help="the head's, see below",
        aliases=("margin",),
    )
    head_options: tuple[str, ...] = option(
        "Model",
        default=(),
        type=to_assignments,
        metavar="NAME=X ...",
        help="further parameters of the head, see below",
        default_help="the head's",
        split_words=True,
    )
    init_head: str = choice(
        ("random", "mean"),
        default="random",
        group="Model",
        help="with --init: first class centers: random, or the mean embedding of images of the class",
    )
    margin_warmup_epochs: float = option(
        "Model", default=0.0, type=NOT_NEGATIVE, help="epochs in which the margin m grows from 0 to its value"
    )
    sample_rate: float = option(
        "Model",
        default=1.0,
        type=_FRACTION,
        help="fraction of the classes in each step: the classes of the batch, and random others (Partial FC)",
    )
    batch_size: int = option(
        "Optimization",
        default=64,
        type=integer(2),
        help="images per batch, over all GPUs; under torchrun, for each process",
    )
    accumulate: int = option(
        "Optimization", default=1, type=integer(1), help="gradient accumulation: micro-batches per batch"
    )
    epochs: int = option(
        "Optimization", default=50, type=integer(1), help="epochs of the complete run, epochs before a resume included"
    )
    lr: float = option("Optimization", default=0.025, type=POSITIVE, help="learning rate after the warm-up")
    scale_lr: bool = flag("Optimization", help="under torchrun, multiply lr by the number of processes")
    schedule: str = choice(
        SCHEDULES,
        default="step",
        group="Optimization",
        help="how lr falls after the warm-up: step: at the stages; poly: (1 - progress)^2; cosine: half a cosine",
    )
    backbone_lr: float = option(
        "Optimization",
        default=1.0,
        type=POSITIVE,
        help="with --init: the backbone's learning rate, as a multiple of lr",
    )
    freeze_epochs: int = option(
        "Optimization",
        default=0,
        type=integer(0),
        help="with --init: first epochs, that train the head alone; no weight or statistic of the backbone changes",
    )
    stages: tuple[int, ...] = option(
        "Optimization",
        default=(15, 23, 30),
        type=_STAGES,
        help="epochs at which the step schedule divides lr by 10, or none",
    )
    warmup_epochs: float = option(
        "Optimization", default=5.0, type=NOT_NEGATIVE, help="epochs of linear warm-up of the learning rate"
    )
    optimizer: str = choice(
        OPTIMIZERS,
        default="sgd",
        group="Optimization",
        help="sgd; or adamw, which needs other values of lr and weight_decay, such as 0.001 and 0.1",
    )
    weight_decay: float = option(
        "Optimization",
        default=5e-4,
        type=NOT_NEGATIVE,
        help="weight decay, not of batch norm parameters; adamw: not of biases, slopes and layer norm either",
    )
    clip_grad_norm: float = option(
        "Optimization", default=0.0, type=NOT_NEGATIVE, help="largest norm of the gradients, such as 5; 0: any norm"
    )
    ema: float = option(
        "Optimization",
        default=0.0,
        type=_BELOW_1,
        help="decay of a moving average of the backbone's weights, such as 0.9999: the average is evaluated, and "
        "saved as EMA_...pth; 0: none",
    )
    momentum: float = option("Optimization", default=0.9, type=_BELOW_1, help="momentum of SGD")
    LR_train: bool = flag("Resolution", help="train on a fraction LR_prob of the samples in low resolution")
    LR_prob: float = option(
        "Resolution",
        default=0.5,
        type=FROM_0_TO_1,
        help="fraction of the samples in low resolution; each sample draws one of several LR_scale",
    )
    grad_checkpoint: bool = flag(
        "Machine", help="compute the backbone's activations again in backward: less memory, about a third more time"
    )
    compile: bool = flag("Machine", help="torch.compile the backbone: a slow first step, then faster ones")
    val_batch_size: int | None = eval_batch_size()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"--accumulate={self.accumulate}: does not divide --batch_size={self.batch_size}. Choose a divisor."
            )
        if self.grad_checkpoint and self.compile:
            raise UsageError("--grad_checkpoint: does not work with --compile. Leave one of them out.")
        if self.init is None:
            defaults = {"freeze_epochs": 0, "backbone_lr": 1.0, "init_head": "random"}
            defaults |= {"channel_order": None, "input_scale": None}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise UsageError(f"--{name}: is used with --init alone. Add --init=FILE, or leave this out.")
        if self.init_head == "mean" and self.head == "SubCenterArcFace":
            raise UsageError("--init_head=mean: SubCenterArcFace has several centers a class. Choose random.")
        known = HEAD_PARAMETERS[self.head] | {FILTERING: 0.0}
        for name in self.head_settings:
            if name not in known:
                given_by = f"--{name}" if name in ("s", "m") else "--head_options"
                raise UsageError(
                    f"{given_by}: {self.head} has no parameter {name}. Its parameters are {', '.join(known)}."
                )

    @property
    def head_settings(self) -> dict[str, Any]:
        """Return the parameters of the head that are given, for build_head()."""
        given = {name: value for name, value in (("s", self.s), ("m", self.m)) if value is not None}
        known = HEAD_PARAMETERS[self.head]
        for assignment in self.head_options:
            name, value = assignment.split("=")
            given[name] = type(known.get(name, 0.0))(float(value))
        return given

    def check_gpus(self, num_gpus: int) -> None:
        """Raise UsageError if the batch or --compile does not fit the number of GPUs of this process (CPU: 1)."""
        if self.compile and num_gpus > 1:
            raise UsageError(
                f"--compile: works on one GPU, and --gpu_num names {num_gpus}. Leave it out, or name one GPU."
            )
        micro_batch = self.batch_size // self.accumulate
        per_gpu = -(-micro_batch // num_gpus)  # images on each GPU but the last, which gets the rest
        if micro_batch < 2 * num_gpus or micro_batch % per_gpu == 1:
            parts = f" in {self.accumulate} micro-batches" if self.accumulate > 1 else ""
            raise UsageError(
                f"--batch_size: {self.batch_size}{parts} leaves one of {num_gpus} GPUs with less than two images, and "
                f"batch normalization needs two. Choose a multiple of {num_gpus * self.accumulate}, "
                f"{2 * num_gpus * self.accumulate} or more."
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(ReportSettings, Config):
    """The settings of validation.py."""

    resume_dir: str | None = folder(
        help="a run, or a .pth file", default_help="the newest run in best_checkpoint_dir", aliases=("load_dir",)
    )
    backbone: str | None = choice(
        BACKBONE_NAMES, default=None, group="Model", default_help="the checkpoint's; must agree with it"
    )
    compare: tuple[str, ...] = option(
        PATHS,
        default=(),
        type=to_checkpoints,
        metavar="NAME=PATH ...",
        help="two networks or more to compare, runs or files: the others with the first; NAME: in the tables",
        default_help="evaluate resume_dir alone",
        split_words=True,
    )
    report: str | None = option(
        "Output",
        type=to_path,
        metavar="FILE.html",
        help="write a page with tables, curves, thresholds and the pairs that went wrong",
        default_help="not written",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.compare) == 1:
            raise UsageError(f"--compare={self.compare[0]}: is one network. Name two or more, or use --resume_dir.")
        if self.compare and self.resume_dir:
            raise UsageError("--compare: names its networks itself. Leave --resume_dir out.")


def parse_train(
    argv: list[str],
    inherit: Callable[[str], Explicit] | None = None,
    inherit_init: Callable[[Explicit], Explicit] = lambda _: {},
) -> TrainConfig:
    """Return the settings of train.py.

    Args:
        argv: arguments without the program's name.
        inherit: returns the settings of the run that --resume_dir names.
        inherit_init: gets the explicit settings, and returns the settings that the file of --init tells.

    Raises:
        UsageError: a mistake, or a batch that does not fit the GPUs of this process.
        SystemExit: as parse() does.
    """
    from_run = inherit_from_run(inherit)

    def from_run_or_file(explicit: Explicit) -> Explicit:
        if explicit.get("init") is None:
            return from_run(explicit)
        if explicit.get("resume_dir") not in (None, AUTO):
            raise UsageError(
                f"--init: starts a new run, and --resume_dir={explicit['resume_dir']} continues one. Give one of them."
            )
        told = inherit_init(explicit)
        for name in ("backbone", "embedding_size"):
            if name in told and explicit.get(name, told[name]) != told[name]:
                raise UsageError(
                    f"--{name}={explicit[name]}: --init={explicit['init']} has {told[name]}. Leave --{name} out."
                )
        return told

    def check(config: TrainConfig) -> None:
        config.check_gpus(max(len(local_gpu_ids(config.gpu_num, DistEnv.from_environ())), 1))

    config = parse(
        TrainConfig,
        "train.py",
        argv,
        groups=GROUPS,
        inherit=from_run_or_file,
        check=check,
        epilog=heads_help(),
    )
    if config.scale_lr and not DistEnv.from_environ().is_distributed:
        logger.warning("--scale_lr: has no effect with one process. Start several with torchrun.")
    return config


def heads_help() -> str:
    """Return the heads with their parameters, the defaults of these, and the papers."""
    lines = ["Heads, with the default of each parameter:"]
    for name, parameters in HEAD_PARAMETERS.items():
        defaults = " ".join(f"{parameter}={value:g}" for parameter, value in parameters.items())
        lines.append(f"  {name:<20}{defaults}\n{'':<22}{HEAD_PAPERS[name]}")
    return "\n".join([*lines, f"Every head also has {FILTERING}=0 (0: off)."])


def parse_validation(argv: list[str]) -> ValidationConfig:
    """Return the settings of validation.py; raises as parse_train does."""
    return parse(ValidationConfig, "validation.py", argv, groups=GROUPS)
