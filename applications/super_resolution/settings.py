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

    data: str | None = option(None, WHERE, to_path, "PATH", "aligned faces: a folder of people, or a .rec", "required")
    val_data: str | None = option(
        None,
        WHERE,
        to_path,
        "PATH",
        "faces to validate on: a folder, a .rec, or a verification set",
        "people held out of --data, see --val_share",
    )
    checkpoint_dir: str = option("checkpoints", WHERE, to_path, "DIR", "runs, one folder each")
    best_checkpoint_dir: str = option("checkpoints_best", WHERE, to_path, "DIR", "the best epoch of each run")
    log_dir: str = option("log", WHERE, to_path, "DIR", "metrics, sample images and TensorBoard events")
    resume_dir: str | None = option(None, WHERE, to_path, "DIR", "a run to go on with, or its SR file", "a new run")
    scale: int = option(4, MODEL, _scale, "N", "how many times larger faces become: 2, 4 or 8")
    size: str | None = named(None, MODEL, tuple(SIZES), "small on a CPU, default on a GPU", "small, or the paper's")
    num_features: int | None = option(None, MODEL, integer(1), "N", "channels", _BY_SIZE)
    num_rg: int | None = option(None, MODEL, integer(1), "N", "residual groups", _BY_SIZE)
    num_rcab: int | None = option(None, MODEL, integer(1), "N", "blocks in each group", _BY_SIZE)
    reduction: int | None = option(None, MODEL, integer(1), "N", "by which the attention squeezes channels", _BY_SIZE)
    patch: int | None = option(
        None, DATA, integer(4), "N", "train on random patches of N low-resolution pixels", "whole faces"
    )
    crop_share: float = option(
        0.5, DATA, _SHARE, "X", "share of the samples that are cut as recognition cuts them: 112 of 128 pixels"
    )
    val_share: float = option(0.05, DATA, _SHARE, "X", "share of the people to hold out for the validation")
    val_images: int = option(500, DATA, integer(1), "N", "images to validate on, at most")
    epochs: int = option(20, OPTIMIZATION, integer(1), "N", "epochs of the whole run")
    steps: int | None = option(None, OPTIMIZATION, integer(1), "N", "batches in an epoch", "images / batch_size")
    batch_size: int | None = option(
        None, OPTIMIZATION, integer(1), "N", "images in a batch", "4 for small, 16 (the paper's) for default"
    )
    lr: float | None = option(
        None,
        OPTIMIZATION,
        number("a number above 0", lambda value: value > 0),
        "X",
        "highest learning rate of Adam: it rises over a twentieth of the steps, then falls to 0 along a cosine",
        "5e-4 for small, 1e-4 (the paper's) for default",
    )
    identity_weight: float = option(0.0, IDENTITY, _NOT_NEGATIVE, "X", "weight of the identity term beside L1")
    identity_backbone: str | None = option(
        None, IDENTITY, to_path, "FILE", "recognition network whose embeddings are to stay the same"
    )
    gpu_num: tuple[int, ...] = option((0,), MACHINE, to_gpus, "LIST", "GPUs, like 0 or [0,1], or cpu", "cpu")
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

    source: str | None = option(None, WHERE, to_path, "DIR", "images, in folders; only read", "required")
    out: str | None = option(
        None, WHERE, to_path, "DIR", "where the enlarged images go, in the same folders", "required"
    )
    sr_checkpoint_dir: str = option(
        "checkpoints_best", WHERE, to_path, "PATH", "the network: an SR file, a run, or a folder of runs"
    )
    scale: int | None = option(None, MODEL, _scale, "N", "that the network must have", "its own; 4 in a folder of runs")
    degrade: bool = flag(DATA, "shrink the images, which are faces, before they are enlarged: for a look")
    format: str = named("png", DATA, ("png", "jpg"), text="png, or jpg of quality 95")
    batch_size: int = option(16, MACHINE, integer(1), "N", "images of 112x112 at once; more of smaller ones")
    gpu_num: tuple[int, ...] = option((0,), MACHINE, to_gpus, "LIST", "GPUs, like 0 or [0,1], or cpu", "cpu")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("source", "out"):
            if getattr(self, name) is None:
                raise UsageError(f"--{name}: missing; name a folder")


def parse_upscale(argv: list[str]) -> UpscaleSettings:
    """The settings from the arguments; as parse_train."""
    return parse(UpscaleSettings, "-m applications.super_resolution.upscale", GROUPS, argv)
