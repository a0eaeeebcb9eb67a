"""Every flag of the training of super resolution: its default, its rule and its help. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

from util.cli.parser import Given, Settings, flag, named, option, parse
from util.cli.types import integer, number, one_of, to_gpus, to_path
from util.errors import UsageError

FACE = 112  # pixels of an aligned face
SCALES = ("2", "4", "8")
# `default` is the network of the paper, with its learning rate and batches; `small` is for minutes on a CPU, where many
# steps of few images go further than few steps of many.
SIZES = MappingProxyType(
    {
        "small": {"num_features": 32, "num_rg": 2, "num_rcab": 4, "reduction": 8},
        "default": {"num_features": 64, "num_rg": 10, "num_rcab": 20, "reduction": 16},
    }
)
LEARNING_RATES = MappingProxyType({"small": 5e-4, "default": 1e-4})
BATCH_SIZES = MappingProxyType({"small": 4, "default": 16})

WHERE, DATA, MODEL, OPTIMIZATION = "Where things are", "Data", "Model", "Optimisation"
IDENTITY, MACHINE = "Identity", "Machine"
GROUPS = (WHERE, DATA, MODEL, OPTIMIZATION, IDENTITY, MACHINE)
_BY_SIZE = "from --size"
_NOT_NEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
_SHARE = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def _scale(value: object) -> int:
    return int(one_of(SCALES)(str(value)))


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """The settings of applications/super_resolution/train.py."""

    data: str | None = option(
        type=to_path,
        metavar="PATH",
        help="aligned faces: a folder of people, or a .rec",
        default_help="required",
        group=WHERE,
    )
    val_data: str | None = option(
        type=to_path,
        metavar="PATH",
        help="faces to validate on: a folder, a .rec, or a verification set",
        default_help="people held out of --data, see --val_share",
        group=WHERE,
    )
    checkpoint_dir: str = option(
        default="checkpoints", type=to_path, metavar="DIR", help="runs, one folder each", group=WHERE
    )
    best_checkpoint_dir: str = option(
        default="checkpoints_best", type=to_path, metavar="DIR", help="the best epoch of each run", group=WHERE
    )
    log_dir: str = option(
        default="log", type=to_path, metavar="DIR", help="metrics, sample images and TensorBoard events", group=WHERE
    )
    resume_dir: str | None = option(
        type=to_path, metavar="DIR", help="a run to go on with, or its SR file", default_help="a new run", group=WHERE
    )
    scale: int = option(
        default=4, type=_scale, metavar="N", help="how many times larger faces become: 2, 4 or 8", group=MODEL
    )
    size: str | None = choice(
        tuple(SIZES),
        default=None,
        help="small, or the paper's",
        default_help="small on a CPU, default on a GPU",
        group=MODEL,
    )
    num_features: int | None = option(type=integer(1), metavar="N", help="channels", default_help=_BY_SIZE, group=MODEL)
    num_rg: int | None = option(
        type=integer(1), metavar="N", help="residual groups", default_help=_BY_SIZE, group=MODEL
    )
    num_rcab: int | None = option(
        type=integer(1), metavar="N", help="blocks in each group", default_help=_BY_SIZE, group=MODEL
    )
    reduction: int | None = option(
        type=integer(1),
        metavar="N",
        help="by which the attention squeezes channels",
        default_help=_BY_SIZE,
        group=MODEL,
    )
    patch: int | None = option(
        type=integer(4),
        metavar="N",
        help="train on random patches of N low-resolution pixels",
        default_help="whole faces",
        group=DATA,
    )
    crop_share: float = option(
        default=0.5,
        type=_SHARE,
        metavar="X",
        help="share of the samples that are cut as recognition cuts them: 112 of 128 pixels",
        group=DATA,
    )
    val_share: float = option(
        default=0.05, type=_SHARE, metavar="X", help="share of the people to hold out for the validation", group=DATA
    )
    val_images: int = option(
        default=500, type=integer(1), metavar="N", help="images to validate on, at most", group=DATA
    )
    epochs: int = option(default=20, type=integer(1), metavar="N", help="epochs of the whole run", group=OPTIMIZATION)
    steps: int | None = option(
        type=integer(1), metavar="N", help="batches in an epoch", default_help="images / batch_size", group=OPTIMIZATION
    )
    batch_size: int | None = option(
        type=integer(1),
        metavar="N",
        help="images in a batch",
        default_help="4 for small, 16 (the paper's) for default",
        group=OPTIMIZATION,
    )
    lr: float | None = option(
        type=number("a number above 0", lambda value: value > 0),
        metavar="X",
        help="highest learning rate of Adam: it rises over a twentieth of the steps, then falls to 0 along a cosine",
        default_help="5e-4 for small, 1e-4 (the paper's) for default",
        group=OPTIMIZATION,
    )
    identity_weight: float = option(
        default=0.0, type=_NOT_NEGATIVE, metavar="X", help="weight of the identity term beside L1", group=IDENTITY
    )
    identity_backbone: str | None = option(
        type=to_path, metavar="FILE", help="recognition network whose embeddings are to stay the same", group=IDENTITY
    )
    gpu_num: tuple[int, ...] = option(
        default=(0,),
        type=to_gpus,
        metavar="LIST",
        help="GPUs, like 0 or [0,1], or cpu",
        default_help="cpu",
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
        default=1337, type=integer(0, 2**32 - 1), metavar="N", help="seed of every random number", group=MACHINE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise UsageError("--data: missing; name a folder of people with aligned faces, or a .rec file")
        if self.patch is not None and self.patch > FACE // self.scale:
            raise UsageError(
                f"--patch={self.patch}: a face has {FACE // self.scale} pixels at --scale={self.scale}; give at most "
                f"that, or leave it out for whole faces"
            )
        if self.identity_weight and self.identity_backbone is None:
            raise UsageError("--identity_weight: needs a recognition network; name its file with --identity_backbone")
        if self.identity_weight and self.patch is not None:
            raise UsageError("--patch: the identity of a patch is unknown; leave out --patch or --identity_weight")
        if self.val_data is None and self.val_share == 0:
            raise UsageError("--val_share=0: leaves nothing to validate on; give more, or name faces with --val_data")

    @property
    def network_sizes(self) -> dict[str, int]:
        """The sizes of the network that are asked for: those of --size, but for those that have a flag of their own."""
        own = {name: getattr(self, name) for name in SIZES["small"] if getattr(self, name) is not None}
        return dict(SIZES.get(self.size, {})) | own

    def with_size(self, size: str) -> "TrainSettings":
        """The same with what follows from the size filled in; from `size`, unless --size says another."""
        size = self.size or size
        lr = LEARNING_RATES[size] if self.lr is None else self.lr
        batch_size = BATCH_SIZES[size] if self.batch_size is None else self.batch_size
        return replace(self, size=size, lr=lr, batch_size=batch_size)


def parse_train(argv: list[str], inherit: Callable[[str], Given]) -> TrainSettings:
    """The settings from the arguments. `inherit(resume_dir)` gives those of the run that --resume_dir continues.

    Raises UsageError for a mistake; SystemExit(0) after --help and --print_config have printed.
    """

    def inherit_where_resumed(given: Given) -> Given:
        return inherit(given["resume_dir"]) if given.get("resume_dir") is not None else {}

    return parse(TrainSettings, "-m applications.super_resolution.train", GROUPS, argv, inherit_where_resumed)


@dataclass(frozen=True, kw_only=True)
class UpscaleSettings(Settings):
    """The settings of applications/super_resolution/upscale.py."""

    source: str | None = option(
        type=to_path, metavar="DIR", help="images, in folders; only read", default_help="required", group=WHERE
    )
    out: str | None = option(
        type=to_path,
        metavar="DIR",
        help="where the enlarged images go, in the same folders",
        default_help="required",
        group=WHERE,
    )
    sr_checkpoint_dir: str = option(
        default="checkpoints_best",
        type=to_path,
        metavar="PATH",
        help="the network: an SR file, a run, or a folder of runs",
        group=WHERE,
    )
    scale: int | None = option(
        type=_scale,
        metavar="N",
        help="that the network must have",
        default_help="its own; 4 in a folder of runs",
        group=MODEL,
    )
    degrade: bool = flag(help="shrink the images, which are faces, before they are enlarged: for a look", group=DATA)
    format: str = choice(("png", "jpg"), default="png", help="png, or jpg of quality 95", group=DATA)
    batch_size: int = option(
        default=16, type=integer(1), metavar="N", help="images of 112x112 at once; more of smaller ones", group=MACHINE
    )
    gpu_num: tuple[int, ...] = option(
        default=(0,),
        type=to_gpus,
        metavar="LIST",
        help="GPUs, like 0 or [0,1], or cpu",
        default_help="cpu",
        group=MACHINE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("source", "out"):
            if getattr(self, name) is None:
                raise UsageError(f"--{name}: missing; name a folder")


def parse_upscale(argv: list[str]) -> UpscaleSettings:
    """The settings from the arguments; as parse_train."""
    return parse(UpscaleSettings, "-m applications.super_resolution.upscale", GROUPS, argv)
