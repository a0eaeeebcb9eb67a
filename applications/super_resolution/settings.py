"""Every flag of the training of super resolution: its default, its rule and its help. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

from model.names import SR_SCALES
from util.cli.options import GROUPS, RunSettings, gpus, inherit_from_run
from util.cli.parser import PATHS, Explicit, Settings, choice, flag, folder, option, parse
from util.cli.types import FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, integer, number, to_path
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

_BY_SIZE = "from --size"
_SCALE = number(f"one of {', '.join(map(str, SR_SCALES))}", lambda value: value in SR_SCALES, int)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """The settings of applications/super_resolution/train.py."""

    data: str = option(
        PATHS, type=to_path, help="aligned faces: a folder with one folder per identity, or a .rec", required=True
    )
    val_data: str | None = option(
        PATHS,
        type=to_path,
        help="faces to validate on: a folder, a .rec, or a verification set",
        default_help="identities held out of --data, see --val_share",
    )
    log_dir: str = folder(default="./log", help="metrics, sample images and TensorBoard events")
    scale: int = option("Model", default=4, type=_SCALE, help="enlargement: 2, 4 or 8")
    size: str | None = choice(
        tuple(SIZES),
        default=None,
        group="Model",
        help="small, or the paper's",
        default_help="small on a CPU, default on a GPU",
    )
    num_features: int | None = option("Model", type=integer(1), help="channels", default_help=_BY_SIZE)
    num_rg: int | None = option("Model", type=integer(1), help="residual groups", default_help=_BY_SIZE)
    num_rcab: int | None = option("Model", type=integer(1), help="blocks in each group", default_help=_BY_SIZE)
    reduction: int | None = option(
        "Model", type=integer(1), help="channel reduction in the attention", default_help=_BY_SIZE
    )
    patch: int | None = option(
        "Data", type=integer(4), help="train on random patches of N low-resolution pixels", default_help="whole faces"
    )
    crop_share: float = option(
        "Data",
        default=0.5,
        type=FROM_0_TO_1,
        help="fraction of the samples that are cropped as for recognition: 112 of 128 pixels",
    )
    val_share: float = option(
        "Data", default=0.05, type=FROM_0_TO_1, help="fraction of the identities to hold out for validation"
    )
    val_images: int = option("Data", default=500, type=integer(1), help="maximum number of validation images")
    epochs: int = option("Optimization", default=20, type=integer(1), help="epochs of the complete run")
    steps: int | None = option(
        "Optimization", type=integer(1), help="batches per epoch", default_help="images / batch_size"
    )
    batch_size: int = option(
        "Optimization",
        type=integer(1),
        help="images per batch",
        default_help="4 for small, 16 (the paper's) for default",
    )
    lr: float = option(
        "Optimization",
        type=POSITIVE,
        help="highest learning rate of Adam: it rises over a twentieth of the steps, then falls to 0 along a cosine",
        default_help="5e-4 for small, 1e-4 (the paper's) for default",
    )
    identity_weight: float = option(
        "Identity", default=0.0, type=NOT_NEGATIVE, help="weight of the identity loss; the L1 loss has weight 1"
    )
    identity_backbone: str | None = option(
        "Identity", type=to_path, metavar="FILE", help="recognition network whose embeddings the identity loss compares"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch is not None and self.patch > FACE // self.scale:
            raise UsageError(
                f"--patch={self.patch}: a face has {FACE // self.scale} pixels at --scale={self.scale}. Give at most "
                f"that, or leave it out for whole faces."
            )
        if self.identity_weight and self.identity_backbone is None:
            raise UsageError("--identity_weight: needs a recognition network. Name its file with --identity_backbone.")
        if self.identity_weight and self.patch is not None:
            raise UsageError("--patch: the identity of a patch is unknown. Leave out --patch or --identity_weight.")
        if self.val_data is None and self.val_share == 0:
            raise UsageError("--val_share=0: leaves nothing to validate on. Give more, or name faces with --val_data.")

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

    source: str = folder(help="images, in folders; only read", required=True)
    out: str = folder(help="where the enlarged images go, in the same folders", required=True)
    sr_checkpoint_dir: str = option(
        PATHS, default="checkpoints_best", type=to_path, help="the network: an SR file, a run, or a folder of runs"
    )
    scale: int | None = option(
        "Model", type=_SCALE, help="scale of the network", default_help="its own; 4 in a folder of runs"
    )
    degrade: bool = flag(
        "Data", help="shrink the images, which are aligned faces, before enlarging them: for a demonstration"
    )
    format: str = choice(("png", "jpg"), default="png", group="Data", help="png, or jpg of quality 95")
    batch_size: int = option(
        "Machine", default=16, type=integer(1), help="images of 112x112 per batch; more if they are smaller"
    )
    gpu_num: tuple[int, ...] = gpus()


def parse_upscale(argv: list[str]) -> UpscaleSettings:
    """Return the settings from the arguments; raises as parse_train does."""
    return parse(UpscaleSettings, "-m applications.super_resolution.upscale", argv, groups=GROUPS)
