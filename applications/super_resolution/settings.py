"""Every flag of the training of super resolution: its default, its rule and its help. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

from model.names import SR_SCALES
from util.cli.parser import Explicit, Settings, choice, flag, inherit_from_run, option, parse
from util.cli.types import integer, number, to_gpus, to_path
from util.errors import UsageError
from util.face import FACE_SIZE as FACE

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

PATHS, DATA, MODEL, OPTIMIZATION = "Where things are", "Data", "Model", "Optimization"
IDENTITY, MACHINE = "Identity", "Machine"
GROUPS = (PATHS, DATA, MODEL, OPTIMIZATION, IDENTITY, MACHINE)
_BY_SIZE = "from --size"
_NOT_NEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
_FRACTION = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


_SCALE = number(f"one of {', '.join(map(str, SR_SCALES))}", lambda value: value in SR_SCALES, int)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """The settings of applications/super_resolution/train.py."""

    data: str = option(
        type=to_path,
        metavar="PATH",
        help="aligned faces: a folder with one folder per identity, or a .rec",
        default_help="required",
        group=PATHS,
    )
    val_data: str | None = option(
        type=to_path,
        metavar="PATH",
        help="faces to validate on: a folder, a .rec, or a verification set",
        default_help="identities held out of --data, see --val_share",
        group=PATHS,
    )
    checkpoint_dir: str = option(
        default="checkpoints", type=to_path, metavar="DIR", help="runs, one folder each", group=PATHS
    )
    best_checkpoint_dir: str = option(
        default="checkpoints_best", type=to_path, metavar="DIR", help="the best epoch of each run", group=PATHS
    )
    log_dir: str = option(
        default="log", type=to_path, metavar="DIR", help="metrics, sample images and TensorBoard events", group=PATHS
    )
    resume_dir: str | None = option(
        type=to_path, metavar="DIR", help="run to continue, or its SR file", default_help="a new run", group=PATHS
    )
    scale: int = option(default=4, type=_SCALE, metavar="N", help="enlargement: 2, 4 or 8", group=MODEL)
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
        help="channel reduction in the attention",
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
        type=_FRACTION,
        metavar="X",
        help="fraction of the samples that are cropped as for recognition: 112 of 128 pixels",
        group=DATA,
    )
    val_share: float = option(
        default=0.05,
        type=_FRACTION,
        metavar="X",
        help="fraction of the identities to hold out for validation",
        group=DATA,
    )
    val_images: int = option(
        default=500, type=integer(1), metavar="N", help="maximum number of validation images", group=DATA
    )
    epochs: int = option(
        default=20, type=integer(1), metavar="N", help="epochs of the complete run", group=OPTIMIZATION
    )
    steps: int | None = option(
        type=integer(1), metavar="N", help="batches per epoch", default_help="images / batch_size", group=OPTIMIZATION
    )
    batch_size: int = option(
        type=integer(1),
        metavar="N",
        help="images per batch",
        default_help="4 for small, 16 (the paper's) for default",
        group=OPTIMIZATION,
    )
    lr: float = option(
        type=number("a number above 0", lambda value: value > 0),
        metavar="X",
        help="highest learning rate of Adam: it rises over a twentieth of the steps, then falls to 0 along a cosine",
        default_help="5e-4 for small, 1e-4 (the paper's) for default",
        group=OPTIMIZATION,
    )
    identity_weight: float = option(
        default=0.0,
        type=_NOT_NEGATIVE,
        metavar="X",
        help="weight of the identity loss; the L1 loss has weight 1",
        group=IDENTITY,
    )
    identity_backbone: str | None = option(
        type=to_path,
        metavar="FILE",
        help="recognition network whose embeddings the identity loss compares",
        group=IDENTITY,
    )
    gpu_num: tuple[int, ...] = option(
        default=(0,), type=to_gpus, metavar="LIST", help="GPUs, as 0 or 0,1 or [0,1]; or cpu", group=MACHINE
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
        """Return the sizes of the network from --size, each replaced by its own flag if that is given."""
        own = {name: getattr(self, name) for name in SIZES["small"] if getattr(self, name) is not None}
        return dict(SIZES.get(str(self.size), {})) | own

    def with_size(self, size: str) -> "TrainSettings":
        """Return the settings with lr and batch_size of the size filled in; --size takes precedence over `size`."""
        size = self.size or size
        lr = LEARNING_RATES[size] if self.lr is None else self.lr
        batch_size = BATCH_SIZES[size] if self.batch_size is None else self.batch_size
        return replace(self, size=size, lr=lr, batch_size=batch_size)


def parse_train(argv: list[str], inherit: Callable[[str], Explicit]) -> TrainSettings:
    """Return the settings from the arguments; `inherit(resume_dir)` returns the settings of the run to resume.

    Raises UsageError for a mistake; SystemExit(0) after --help and --print_config have printed.
    """
    script = "-m applications.super_resolution.train"
    return parse(TrainSettings, script, argv, groups=GROUPS, inherit=inherit_from_run(inherit))


@dataclass(frozen=True, kw_only=True)
class UpscaleSettings(Settings):
    """The settings of applications/super_resolution/upscale.py."""

    source: str = option(
        type=to_path, metavar="DIR", help="images, in folders; only read", default_help="required", group=PATHS
    )
    out: str = option(
        type=to_path,
        metavar="DIR",
        help="where the enlarged images go, in the same folders",
        default_help="required",
        group=PATHS,
    )
    sr_checkpoint_dir: str = option(
        default="checkpoints_best",
        type=to_path,
        metavar="PATH",
        help="the network: an SR file, a run, or a folder of runs",
        group=PATHS,
    )
    scale: int | None = option(
        type=_SCALE,
        metavar="N",
        help="scale of the network",
        default_help="its own; 4 in a folder of runs",
        group=MODEL,
    )
    degrade: bool = flag(
        help="shrink the images, which are aligned faces, before enlarging them: for a demonstration", group=DATA
    )
    format: str = choice(("png", "jpg"), default="png", help="png, or jpg of quality 95", group=DATA)
    batch_size: int = option(
        default=16,
        type=integer(1),
        metavar="N",
        help="images of 112x112 per batch; more if they are smaller",
        group=MACHINE,
    )
    gpu_num: tuple[int, ...] = option(
        default=(0,), type=to_gpus, metavar="LIST", help="GPUs, as 0 or 0,1 or [0,1]; or cpu", group=MACHINE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("source", "out"):
            if getattr(self, name) is None:
                raise UsageError(f"--{name}: missing; name a folder")


def parse_upscale(argv: list[str]) -> UpscaleSettings:
    """Return the settings from the arguments; raises as parse_train does."""
    return parse(UpscaleSettings, "-m applications.super_resolution.upscale", argv, groups=GROUPS)
