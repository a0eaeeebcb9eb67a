"""Every flag of train.py and validation.py: its default, its rule and its help, each written once.

    config = parse_train(["--gpu_num=[0,1]", "--LR_train", "--stages", "10", "20"])
    config.gpu_num, config.LR_train, config.stages        # (0, 1), True, (10, 20)

util/cli/parser.py reads them, from the command line or from the file given with --config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from util.cli.parser import Given, Settings, flag, named, option, parse
from util.cli.types import (
    EVAL_BATCH_DEFAULTS,
    PRECISIONS,
    SET_NAMES,
    integer,
    integers,
    named_pair_sets,
    number,
    to_gpus,
    to_pair_sets,
    to_path,
)
from util.distributed import DistEnv, local_gpu_ids
from util.errors import UsageError

# The registries of model/ know the same names; they are repeated here because importing them would import torch.
_IR_NAMES = ("IR_50", "IR_101", "IR_152", "IR_SE_50", "IR_SE_101", "IR_SE_152")
_MOBILE_NAMES = ("MobileFaceNet", "MobileFaceNet_050", "MobileFaceNet_025")
BACKBONE_NAMES = _IR_NAMES + _MOBILE_NAMES + ("iresnet18", "iresnet34", "iresnet50", "iresnet100")
HEAD_NAMES = ("ArcFace", "CosFace")
LOSS_NAMES = ("focal", "cross_entropy")
AUGMENTATIONS = ("standard", "strong")
SR_SCALES = (2, 4, 8)  # powers of two that divide 112, and leave a face to be seen

# The sections of --help, in their order; that of the flags which every script has comes last.
WHERE, DATA, MODEL, OPTIMIZATION = "Where things are", "Data", "Model", "Optimisation"
RESOLUTION, MACHINE, OUTPUT = "Low and super resolution", "Machine", "Output"
GROUPS = (WHERE, DATA, MODEL, OPTIMIZATION, RESOLUTION, MACHINE, OUTPUT)

_POSITIVE = number("a number above 0", lambda value: value > 0)
_NOT_NEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
_FROM_0_TO_1 = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_SHARE = number("a number above 0, and 1 at most", lambda value: 0 < value <= 1)
_BELOW_1 = number("a number from 0 to less than 1", lambda value: 0 <= value < 1)
_STAGES = integers(
    "none",
    "ascending epochs from 1 on, like 15 23 30 or [15,23,30]",
    lambda epochs: all(first < second for first, second in pairwise([0, *epochs])),
)

_scales = integers(
    None,
    "different whole numbers from 2 to 14, like 4 or 2,4,8",
    lambda numbers: len(set(numbers)) == len(numbers) > 0 and all(2 <= number <= 14 for number in numbers),
)


def _to_scales(value: object) -> tuple[int, ...]:
    return _scales([value] if type(value) is int else value)  # a single one in a file, or in a run of before


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The settings that train.py and validation.py share. UsageError where a value breaks its rule."""

    data_dir: str = option("./data", WHERE, to_path, "DIR", "training and verification sets")
    best_checkpoint_dir: str = option("./checkpoints_best", WHERE, to_path, "DIR", "runs with their best epoch")
    val_data: tuple[str, ...] = option(
        (),
        DATA,
        to_pair_sets,
        "SET ...",
        "verification sets besides those in data_dir, each NAME=PATH: a bcolz folder, a .bin of InsightFace, or a list "
        "of pairs in text, whose images are beside it, or in ROOT with NAME=PATH:ROOT. A name is made of "
        f"{SET_NAMES}; without NAME= it is the file's. LFW, CFP_FF, CFP_FP and AgeDB, in capitals or not, take the "
        "place of those in data_dir. none: no such sets",
        "none",
        apart=True,
    )
    resume_dir: str | None = option(
        None, WHERE, to_path, "DIR", "the run to continue (its newest epoch), or one .pth file of it", "a new run"
    )
    LR_scale: tuple[int, ...] = option(
        (4,), RESOLUTION, _to_scales, "N ...", "low resolution is 112 // N pixels a side; several N: each of them"
    )
    LR_eval: bool = flag(RESOLUTION, "evaluate at low resolution too: bicubic down and up again")
    SR_eval: bool = flag(RESOLUTION, "evaluate at low resolution, and after super resolution of the same small images")
    sr_checkpoint_dir: str | None = option(
        None,
        RESOLUTION,
        to_path,
        "PATH",
        "super resolution network: an SR file, a run, or a folder of runs, of which the newest for each scale is taken",
        "best_checkpoint_dir",
    )
    gpu_num: tuple[int, ...] = option((0,), MACHINE, to_gpus, "LIST", "GPUs, as 0 or 0,1 or [0,1]; or cpu")
    precision: str = named(
        "auto", MACHINE, PRECISIONS, text="what the backbone computes in; auto: bf16 on a GPU that has it, else fp32"
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
        """What evaluation looks at: full resolution, and low and super resolution where they are wanted."""
        return ("HR", *(("LR",) if self.LR_eval or self.SR_eval else ()), *(("SR",) if self.SR_eval else ()))

    @property
    def sr_scales(self) -> tuple[int, ...]:
        """The scales that are evaluated after super resolution."""
        return self.LR_scale if self.SR_eval else ()

    @property
    def sr_path(self) -> str:
        """Where the networks for them are looked for."""
        return self.sr_checkpoint_dir or self.best_checkpoint_dir

    @property
    def named_pair_sets(self) -> dict[str, tuple[str, str | None]]:
        """`val_data` as find_pair_sets wants it."""
        return named_pair_sets(self.val_data)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """The settings of train.py. Epochs of warm-up may be fractions; those of `stages` are counted from 1."""

    checkpoint_dir: str = option("./checkpoints", WHERE, to_path, "DIR", "runs with the files of each epoch")
    log_dir: str = option("./log", WHERE, to_path, "DIR", "TensorBoard files")
    train_data: str | None = option(
        None,
        DATA,
        to_path,
        "DIR",
        "a folder of people under data_dir, or a path; or a train.rec, InsightFace's RecordIO",
        "imgs_casia, ms1m_align_112, imgs_train or imgs",
    )
    augment: str = named(
        "standard", DATA, AUGMENTATIONS, text="standard: crop, flip; strong: rotation, scale, colour, erasing too"
    )
    backbone: str = named("IR_SE_50", MODEL, BACKBONE_NAMES)
    embedding_size: int = option(512, MODEL, integer(1), "N", "numbers in the embedding of a face")
    head: str = named("ArcFace", MODEL, HEAD_NAMES)
    loss: str = named("focal", MODEL, LOSS_NAMES)
    # torchrun takes --s and --m for abbreviations of flags of its own, and stops; the long names reach the program.
    s: float = option(64.0, MODEL, _POSITIVE, "X", "scale of the head's cosines", aliases=("head_scale",))
    m: float = option(
        0.5, MODEL, _FROM_0_TO_1, "X", "margin: radians for ArcFace, cosine for CosFace", aliases=("margin",)
    )
    margin_warmup_epochs: float = option(0.0, MODEL, _NOT_NEGATIVE, "X", "epochs in which m grows from 0")
    sample_rate: float = option(
        1.0,
        MODEL,
        _SHARE,
        "X",
        "share of the classes that take part in each step: those of the batch, and others at random (Partial FC)",
    )
    batch_size: int = option(
        64, OPTIMIZATION, integer(2), "N", "images in a step, over all GPUs; under torchrun, of each process"
    )
    accumulate: int = option(
        1, OPTIMIZATION, integer(1), "N", "parts that each batch is worked through in, for less memory"
    )
    epochs: int = option(50, OPTIMIZATION, integer(1), "N", "epochs in all, those before a resume included")
    lr: float = option(0.025, OPTIMIZATION, _POSITIVE, "X", "learning rate after the warm-up")
    scale_lr: bool = flag(OPTIMIZATION, "under torchrun, multiply lr by the number of processes")
    stages: tuple[int, ...] = option(
        (15, 23, 30), OPTIMIZATION, _STAGES, "LIST", "epochs that divide lr by 10, or none"
    )
    warmup_epochs: float = option(5.0, OPTIMIZATION, _NOT_NEGATIVE, "X", "epochs of linear warm-up of the rate")
    weight_decay: float = option(5e-4, OPTIMIZATION, _NOT_NEGATIVE, "X", "on all weights but batch norm's")
    momentum: float = option(0.9, OPTIMIZATION, _BELOW_1, "X", "momentum of SGD")
    LR_train: bool = flag(RESOLUTION, "train on low resolution in a part of the samples, see LR_prob")
    LR_prob: float = option(
        0.5, RESOLUTION, _FROM_0_TO_1, "X", "share of the samples in low resolution; of several LR_scale each is drawn"
    )
    compile: bool = flag(MACHINE, "torch.compile the backbone: a slow first step, then faster ones")
    val_batch_size: int | None = option(
        None, MACHINE, integer(1), "N", "images in a batch of the validations, over all GPUs", EVAL_BATCH_DEFAULTS
    )
    num_workers: int | None = option(
        None,
        MACHINE,
        integer(0),
        "N",
        "processes that read images; 0: the main process",
        "from the number of CPU cores",
    )
    seed: int = option(1337, MACHINE, integer(0, 2**32 - 1), "N", "seed of every random number")

    def __post_init__(self) -> None:
        super().__post_init__()
        gpus = max(len(local_gpu_ids(self.gpu_num, DistEnv.from_environ())), 1)
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"--accumulate={self.accumulate}: does not divide --batch_size={self.batch_size}; choose a divisor"
            )
        if self.compile and gpus > 1:
            raise UsageError(f"--compile: works on one GPU, and --gpu_num names {gpus}; leave it out, or name one GPU")
        together = self.batch_size // self.accumulate
        share = -(-together // gpus)  # images on each GPU but the last, which gets what is left
        if together < 2 * gpus or together % share == 1:
            parts = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
            raise UsageError(
                f"--batch_size: {self.batch_size}{parts} leaves one of {gpus} GPUs with less than two images, and "
                f"batch normalisation needs two; choose a multiple of {gpus * self.accumulate}, "
                f"{2 * gpus * self.accumulate} or more"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Config):
    """The settings of validation.py."""

    resume_dir: str | None = option(
        None, WHERE, to_path, "DIR", "a run, or a .pth file", "the newest run in best_checkpoint_dir", ("load_dir",)
    )
    backbone: str | None = named(None, MODEL, BACKBONE_NAMES, "recognised from the checkpoint; must agree with it")
    batch_size: int | None = option(
        None, MACHINE, integer(1), "N", "images in a batch, over all GPUs", EVAL_BATCH_DEFAULTS
    )
    LR_oneside: bool = flag(RESOLUTION, "low resolution in the first image of each pair alone")
    json: str | None = option(None, OUTPUT, to_path, "FILE", "write the results as JSON", "not written")
    plot: str | None = option(None, OUTPUT, to_path, "FILE", "draw the ROC curves as PNG", "not drawn")


def parse_train(argv: list[str], inherit: Callable[[str], Given] | None = None) -> TrainConfig:
    """The settings of train.py from its arguments (without the script's name).

    `inherit(resume_dir)` gives the settings of the run that --resume_dir continues: what neither the command line nor
    the file says stays as it was there.
    Raises UsageError for a mistake; SystemExit(0) after --help and --print_config have printed.
    """

    def inherit_where_resumed(given: Given) -> Given:
        resume_dir = given.get("resume_dir")
        return {} if inherit is None or resume_dir is None else inherit(resume_dir)

    return parse(TrainConfig, "train.py", GROUPS, argv, inherit_where_resumed)


def parse_validation(argv: list[str]) -> ValidationConfig:
    """The settings of validation.py; as parse_train."""
    return parse(ValidationConfig, "validation.py", GROUPS, argv)
