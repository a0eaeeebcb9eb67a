"""Export a network for programs without this toolkit: ONNX or torch.export. From the repository root:

    python -m applications.export --network Backbone_Best.pth --out net.onnx --data data/imgs
    python -m applications.export --network Backbone_Best.pth --out net.onnx --preprocessing --flip --calibration c.json
    python -m applications.export --network Backbone_Best.pth --out int8.onnx --int8 --data data/imgs --val_data lfw.bin
    python -m applications.export --network Backbone_Best.pth --out net.pt2

Without further flags the network takes (N, 3, 112, 112) float32 RGB in [-1, 1], with any N, and gives embeddings that
are not normalized. The metadata in the file says what it takes; validation.py and all applications read it. Each export
is compared with torch, on faces of --data.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from util.cli.options import GROUPS, TrainedNetworkSettings
from util.cli.parser import PATHS, flag, option, parse
from util.cli.types import pair_set_paths, to_file, to_pair_sets
from util.errors import DataError, UsageError, run_script
from util.files import atomic_write, require_writable_file

if TYPE_CHECKING:
    import numpy as np
    import torch

    from util.public_networks import PublicNetwork

CHECKED_FACES = 32


@dataclass(frozen=True, kw_only=True)
class Flags(TrainedNetworkSettings):
    """The settings of applications.export."""

    out: Path = option(
        PATHS, type=to_file, metavar="FILE", help="file to write: .onnx, or .pt2 of torch.export", required=True
    )
    data: Path | None = option(
        PATHS,
        type=to_file,
        metavar="DIR",
        help="aligned faces, a folder for each person, for the comparison with torch and for --int8",
        default_help="the comparison uses random images",
    )
    calibration: Path | None = option(
        PATHS, type=to_file, metavar="FILE", help="calibration to put into the metadata, with thresholds at fixed FARs"
    )
    val_data: tuple[str, ...] = option(
        "Data",
        default=(),
        type=to_pair_sets,
        metavar="SET ...",
        help="verification sets NAME=PATH or NAME=PATH:ROOT, to evaluate the network before and after",
        split_words=True,
    )
    preprocessing: bool = flag(
        "Model", help="take complete aligned faces, (N, 112, 112, 3) uint8 RGB, and give normalized embeddings"
    )
    flip: bool = flag("Model", help="add the embedding of the mirror image, which takes twice the time")
    int8: bool = flag("Model", help="quantize weights and activations, with 128 faces of --data")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out.suffix not in (".onnx", ".pt2"):
            raise UsageError(f"--out={self.out}: must end in .onnx, or in .pt2 for torch.export. Rename it.")
        if self.out.suffix == ".pt2" and (self.int8 or self.val_data):
            raise UsageError(f"--out={self.out}: --int8 and --val_data are for .onnx. Leave them out, or rename it.")
        if self.int8 and self.data is None:
            raise UsageError("--int8: needs faces for the range of each layer. Give --data.")
        if self.int8 and self.calibration:
            raise UsageError(
                "--calibration: belongs to the float32 network. Export with --int8 first, then run "
                "applications.calibrate on the int8 file."
            )


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.export", arguments, groups=GROUPS, description=__doc__)
    require_writable_file("--out", flags.out)

    # torch takes seconds to import: report mistakes in the command line first.
    import shutil
    import tempfile

    from applications.export.graph import Deployed, check_program, copy_onnx, write_onnx, write_torch_export
    from applications.export.metadata import describe
    from applications.export.quantize import CALIBRATION_FACES, quantize
    from util.calibration import find_calibration
    from util.files import sha256
    from util.public_networks import open_network
    from util.transform import EVAL_CROPS

    # Network, faces, metadata.
    file, network = open_network(flags.network, flags.channel_order, flags.input_scale, crop=flags.eval_crop)
    is_onnx = not network.is_trainable
    if is_onnx and (flags.preprocessing or flags.flip or flags.out.suffix != ".onnx"):
        raise UsageError(
            f"--network={file}: an ONNX network can be quantized (--int8), and gets metadata. For --preprocessing, "
            "--flip and .pt2 give the PyTorch file of it."
        )
    needed = CHECKED_FACES + (CALIBRATION_FACES if flags.int8 else 0)
    faces = sample_faces(flags.data, needed)
    if flags.int8 and len(faces) < needed:
        raise DataError(f"--data={flags.data}: has {len(faces)} images, and --int8 needs {needed}. Name a larger set.")
    crops = EVAL_CROPS[network.crop](faces)
    made_from = sha256(file)
    calibration = find_calibration(flags.calibration, file, {} if flags.int8 else network.metadata, made_from)
    metadata = describe(
        network,
        file,
        calibration,
        made_from=made_from,
        preprocessing=flags.preprocessing,
        flip=flags.flip,
        int8=flags.int8,
    )

    # Write the program, and compare it.
    module = Deployed(network.network, network.crop, preprocessing=flags.preprocessing, flip=flags.flip)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"float{flags.out.suffix}"
        if is_onnx:
            copy_onnx(file, metadata, target)
            images = as_onnx_takes(network, crops)
        else:
            (write_onnx if target.suffix == ".onnx" else write_torch_export)(module, metadata, target)
            images = module.prepare(crops, faces)
            difference = check_program(module, target, images[:CHECKED_FACES])
            shown = f"{min(CHECKED_FACES, len(images))} {'faces' if flags.data else 'random images'}"
            print(f"compared with torch on {shown}: the largest difference of an embedding is {difference:.1e}")
        if flags.int8:
            checked, ranged = images[:CHECKED_FACES], images[CHECKED_FACES:]
            cosine = quantize(target, ranged, checked, metadata=metadata, path=flags.out)
            print(f"int8: the mean cosine with the float32 embeddings of {CHECKED_FACES} other faces is {cosine:.4f}")
        else:
            with atomic_write(flags.out) as partial:
                shutil.copyfile(target, partial)
    size = flags.out.stat().st_size / 1e6
    print(f"{flags.out}: {metadata['description']}, {size:.1f} MB")
    if calibration is None and not flags.int8:
        print("without thresholds: make a calibration with python -m applications.calibrate, and give --calibration")
    if flags.val_data:
        print(compare_accuracy(network, flags))


def sample_faces(data: Path | None, count: int) -> "np.ndarray":
    """Return (N, 112, 112, 3) RGB uint8: `count` or fewer random faces of a set, or random images without one."""
    import numpy as np

    from util.data.loader import open_training_images
    from util.transform import full_crop

    if data is None:
        return np.random.default_rng(0).integers(0, 256, (count, 112, 112, 3), dtype=np.uint8)
    images = open_training_images(data)
    chosen = np.random.default_rng(0).permutation(len(images))[:count]
    return np.stack([full_crop(images.image(int(index))) for index in chosen])


def as_onnx_takes(network: "PublicNetwork", crops: "np.ndarray") -> "torch.Tensor":
    """Return evaluation crops (N, 112, 112, 3) as the file of an ONNX network takes them."""
    import torch

    from util.face import INPUT_FACTORS
    from util.transform import normalize

    if network.channel_order == "BGR":
        crops = crops[..., ::-1].copy()
    pixels = torch.from_numpy(crops)
    if network.takes_bytes:
        return pixels
    images = normalize(pixels).contiguous()
    return (images + 1) * INPUT_FACTORS[network.input_scale] if network.input_scale in INPUT_FACTORS else images


def compare_accuracy(network: "PublicNetwork", flags: Flags) -> str:
    """Evaluate the network and the exported file on the verification sets, and return the table."""
    from model.backbone.fold import fold_batch_norm
    from util.device import default_eval_batch_size, prepare_module, select_devices
    from util.evaluate import evaluate
    from util.pairs import find_pair_sets
    from util.public_networks import read_public_network
    from util.training.report import format_table

    devices = select_devices(flags.gpu_num)
    sets, _ = find_pair_sets("", pair_set_paths(flags.val_data))
    rows = [["set", "network", "accuracy", "TAR@FAR=1e-3"]]
    for label, each in (("before", network), ("exported", read_public_network(flags.out))):
        module = prepare_module(fold_batch_norm(each.network), devices)
        results = evaluate(module, sets, device=devices[0], batch_size=default_eval_batch_size(devices), crop=each.crop)
        for name, result in results["HR"].items():
            accuracy = f"{result.accuracy:.4f} +- {result.accuracy_std:.4f}"
            rows.append([name, label, accuracy, f"{result.tar_at_far(1e-3):.4f}"])
    return format_table(rows)


if __name__ == "__main__":
    run_script(main)
