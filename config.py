"""Every flag of train.py and validation.py: its default, its rule and its help.

    config = parse_train(["--gpu_num=[0,1]", "--LR_train", "--stages", "10", "20"])
    config.gpu_num, config.LR_train, config.stages        # (0, 1), True, (10, 20)

util/cli/parser.py reads the command line and the file given with --config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from model.names import BACKBONE_NAMES, HEAD_NAMES, LOSS_NAMES, SR_SCALES
from util.cli.parser import Explicit, Settings, choice, flag, inherit_from_run, option, parse
from util.cli.types import (
    EVAL_BATCH_DEFAULTS,
    PRECISIONS,
    SET_NAMES,
    integer,
    integers,
    number,
    pair_set_paths,
    to_gpus,
    to_pair_sets,
    to_path,
)
from util.distributed import DistEnv, local_gpu_ids
from util.errors import UsageError

AUGMENTATIONS = ("standard", "strong")

# The sections of --help, in their order; the section of the flags that every program has comes last.
PATHS, DATA, MODEL, OPTIMIZATION = "Where things are", "Data", "Model", "Optimization"
RESOLUTION, MACHINE, OUTPUT = "Low and super resolution", "Machine", "Output"
GROUPS = (PATHS, DATA, MODEL, OPTIMIZATION, RESOLUTION, MACHINE, OUTPUT)

_POSITIVE = number("a number above 0", lambda value: value > 0)
_NOT_NEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
_FROM_0_TO_1 = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_FRACTION = number("a number above 0, and 1 at most", lambda value: 0 < value <= 1)
_BELOW_1 = number("a number from 0 to less than 1", lambda value: 0 <= value < 1)
_STAGES = integers(
    "none",
    "ascending epochs from 1 on, like 15 23 30 or [15,23,30]",
    lambda epochs: all(first < second for first, second in pairwise([0, *epochs])),
)
_SCALES = integers(
    None,
    "different whole numbers from 2 to 14, like 4 or 2,4,8",
    lambda scales: len(set(scales)) == len(scales) > 0 and all(2 <= scale <= 14 for scale in scales),
    scalar=True,
)


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The settings that train.py and validation.py share. UsageError where a value breaks its rule."""

    data_dir: str = option(
        default="./data", type=to_path, metavar="DIR", help="training and verification sets", group=PATHS
    )
    best_checkpoint_dir: str = option(
        default="./checkpoints_best", type=to_path, metavar="DIR", help="runs with their best epoch", group=PATHS
    )
    val_data: tuple[str, ...] = option(
        default=(),
        type=to_pair_sets,
        metavar="SET ...",
        help=(
            "further verification sets, each NAME=PATH: a bcolz folder, an InsightFace .bin file, or a text list of "
            "pairs with its images in the same folder, or in ROOT with NAME=PATH:ROOT. A name has "
            f"{SET_NAMES}; without NAME= it is the file's name. LFW, CFP_FF, CFP_FP and AgeDB (in any case) replace "
            "the set of that name in data_dir. none: no further sets"
        ),
        split_words=True,
        group=DATA,
    )
    resume_dir: str | None = option(
        type=to_path,
        metavar="DIR",
        help="run to continue from its newest epoch, or one .pth file of it",
        default_help="a new run",
        group=PATHS,
    )
    LR_scale: tuple[int, ...] = option(
        default=(4,),
        type=_SCALES,
        metavar="N ...",
        help="low resolution is 112 // N pixels a side; several N: each is used",
        group=RESOLUTION,
    )
    LR_eval: bool = flag(help="also evaluate at low resolution: bicubic down and up again", group=RESOLUTION)
    SR_eval: bool = flag(
        help="also evaluate at low resolution, and after super resolution of the same small images", group=RESOLUTION
    )
    sr_checkpoint_dir: str | None = option(
        type=to_path,
        metavar="PATH",
        help="super resolution network: an SR file, a run, or a folder of runs (the newest for each scale)",
        default_help="best_checkpoint_dir",
        group=RESOLUTION,
    )
    gpu_num: tuple[int, ...] = option(
        default=(0,), type=to_gpus, metavar="LIST", help="GPUs, as 0 or 0,1 or [0,1]; or cpu", group=MACHINE
    )
    precision: str = choice(
        PRECISIONS,
        default="auto",
        help="what the backbone computes in; auto: bf16 on a GPU that has it, else fp32",
        group=MACHINE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unfit = [scale for scale in self.LR_scale if scale not in SR_SCALES]
        if self.SR_eval and unfit:
            raise UsageError(
                f"--LR_scale={unfit[0]}: super resolution enlarges {', '.join(map(str, SR_SCALES))} times only; choose "
                f"of these, or leave --SR_eval out"
            )
        if self.sr_checkpoint_dir and not self.SR_eval:
            raise UsageError("--sr_checkpoint_dir: is used with --SR_eval alone; add it, or leave this out")

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

    @property
    def pair_set_paths(self) -> dict[str, tuple[str, str | None]]:
        """Return `val_data` as {name: (path, folder of the images or None)} for find_pair_sets."""
        return pair_set_paths(self.val_data)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """The settings of train.py. Epochs of warm-up may be fractions; epochs in `stages` count from 1."""

    checkpoint_dir: str = option(
        default="./checkpoints", type=to_path, metavar="DIR", help="runs with the files of each epoch", group=PATHS
    )
    log_dir: str = option(default="./log", type=to_path, metavar="DIR", help="TensorBoard files", group=PATHS)
    train_data: str | None = option(
        type=to_path,
        metavar="DIR",
        help="folder with one folder per identity, under data_dir or a path; or a RecordIO file train.rec",
        default_help="imgs_casia, ms1m_align_112, imgs_train or imgs",
        group=DATA,
    )
    augment: str = choice(
        AUGMENTATIONS,
        default="standard",
        help="standard: crop and flip; strong: also rotation, scale, color, erasing",
        group=DATA,
    )
    backbone: str = choice(BACKBONE_NAMES, default="IR_SE_50", group=MODEL)
    embedding_size: int = option(
        default=512, type=integer(1), metavar="N", help="dimensions of the embedding", group=MODEL
    )
    head: str = choice(HEAD_NAMES, default="ArcFace", group=MODEL)
    loss: str = choice(LOSS_NAMES, default="focal", group=MODEL)
    # torchrun takes --s and --m for abbreviations of flags of its own, and stops; the long names reach the program.
    s: float = option(
        default=64.0,
        type=_POSITIVE,
        metavar="X",
        help="scale of the head's cosines",
        aliases=("head_scale",),
        group=MODEL,
    )
    m: float = option(
        default=0.5,
        type=_FROM_0_TO_1,
        metavar="X",
        help="margin: radians for ArcFace, cosine for CosFace",
        aliases=("margin",),
        group=MODEL,
    )
    margin_warmup_epochs: float = option(
        default=0.0,
        type=_NOT_NEGATIVE,
        metavar="X",
        help="epochs in which the margin m grows from 0 to its value",
        group=MODEL,
    )
    sample_rate: float = option(
        default=1.0,
        type=_FRACTION,
        metavar="X",
        help="fraction of the classes in each step: the classes of the batch, and random others (Partial FC)",
        group=MODEL,
    )
    batch_size: int = option(
        default=64,
        type=integer(2),
        metavar="N",
        help="images per batch, over all GPUs; under torchrun, for each process",
        group=OPTIMIZATION,
    )
    accumulate: int = option(
        default=1,
        type=integer(1),
        metavar="N",
        help="gradient accumulation: micro-batches per batch",
        group=OPTIMIZATION,
    )
    epochs: int = option(
        default=50,
        type=integer(1),
        metavar="N",
        help="epochs of the complete run, epochs before a resume included",
        group=OPTIMIZATION,
    )
    lr: float = option(
        default=0.025, type=_POSITIVE, metavar="X", help="learning rate after the warm-up", group=OPTIMIZATION
    )
    scale_lr: bool = flag(help="under torchrun, multiply lr by the number of processes", group=OPTIMIZATION)
    stages: tuple[int, ...] = option(
        default=(15, 23, 30),
        type=_STAGES,
        metavar="LIST",
        help="epochs at which lr is divided by 10, or none",
        group=OPTIMIZATION,
    )
    warmup_epochs: float = option(
        default=5.0,
        type=_NOT_NEGATIVE,
        metavar="X",
        help="epochs of linear warm-up of the learning rate",
        group=OPTIMIZATION,
    )
    weight_decay: float = option(
        default=5e-4,
        type=_NOT_NEGATIVE,
        metavar="X",
        help="weight decay, not applied to batch norm parameters",
        group=OPTIMIZATION,
    )
    momentum: float = option(default=0.9, type=_BELOW_1, metavar="X", help="momentum of SGD", group=OPTIMIZATION)
    LR_train: bool = flag(help="train on a fraction LR_prob of the samples in low resolution", group=RESOLUTION)
    LR_prob: float = option(
        default=0.5,
        type=_FROM_0_TO_1,
        metavar="X",
        help="fraction of the samples in low resolution; each sample draws one of several LR_scale",
        group=RESOLUTION,
    )
    compile: bool = flag(help="torch.compile the backbone: a slow first step, then faster ones", group=MACHINE)
    val_batch_size: int | None = option(
        type=integer(1),
        metavar="N",
        help="images per batch of the evaluation, over all GPUs",
        default_help=EVAL_BATCH_DEFAULTS,
        group=MACHINE,
    )
    num_workers: int | None = option(
        type=integer(0),
        metavar="N",
        help="processes that read images; 0: the main process",
        default_help="from the number of CPU cores",
        group=MACHINE,
    )
    seed: int = option(
        default=1337, type=integer(0, 2**32 - 1), metavar="N", help="seed of all random numbers", group=MACHINE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"--accumulate={self.accumulate}: does not divide --batch_size={self.batch_size}; choose a divisor"
            )

    def check_gpus(self, num_gpus: int) -> None:
        """Raise UsageError if the batch or --compile does not fit the number of GPUs of this process (CPU: 1)."""
        if self.compile and num_gpus > 1:
            raise UsageError(
                f"--compile: works on one GPU, and --gpu_num names {num_gpus}; leave it out, or name one GPU"
            )
        micro_batch = self.batch_size // self.accumulate
        per_gpu = -(-micro_batch // num_gpus)  # images on each GPU but the last, which gets the rest
        if micro_batch < 2 * num_gpus or micro_batch % per_gpu == 1:
            parts = f" in {self.accumulate} micro-batches" if self.accumulate > 1 else ""
            raise UsageError(
                f"--batch_size: {self.batch_size}{parts} leaves one of {num_gpus} GPUs with less than two images, and "
                f"batch normalization needs two; choose a multiple of {num_gpus * self.accumulate}, "
                f"{2 * num_gpus * self.accumulate} or more"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Config):
    """The settings of validation.py."""

    resume_dir: str | None = option(
        type=to_path,
        metavar="DIR",
        help="a run, or a .pth file",
        default_help="the newest run in best_checkpoint_dir",
        aliases=("load_dir",),
        group=PATHS,
    )
    backbone: str | None = choice(
        BACKBONE_NAMES, default=None, default_help="the checkpoint's; must agree with it", group=MODEL
    )
    batch_size: int | None = option(
        type=integer(1),
        metavar="N",
        help="images per batch, over all GPUs",
        default_help=EVAL_BATCH_DEFAULTS,
        group=MACHINE,
    )
    LR_oneside: bool = flag(help="low resolution in the first image of each pair only", group=RESOLUTION)
    json: str | None = option(
        type=to_path, metavar="FILE", help="write the results as JSON", default_help="not written", group=OUTPUT
    )
    plot: str | None = option(
        type=to_path, metavar="FILE", help="draw the ROC curves as PNG", default_help="not drawn", group=OUTPUT
    )


def parse_train(argv: list[str], inherit: Callable[[str], Explicit] | None = None) -> TrainConfig:
    """Return the settings of train.py.

    Args:
        argv: arguments without the script's name.
        inherit: returns the settings of the run that --resume_dir names; they replace the defaults.

    Raises:
        UsageError: a mistake, or a batch that does not fit the GPUs of this process.
        SystemExit: code 0 after --help or --print_config has printed.
    """

    def check(config: TrainConfig) -> None:
        config.check_gpus(max(len(local_gpu_ids(config.gpu_num, DistEnv.from_environ())), 1))

    return parse(TrainConfig, "train.py", argv, groups=GROUPS, inherit=inherit_from_run(inherit), check=check)


def parse_validation(argv: list[str]) -> ValidationConfig:
    """Return the settings of validation.py; raises as parse_train does."""
    return parse(ValidationConfig, "validation.py", argv, groups=GROUPS)
