"""Evaluate a network on identities: a folder of people, TinyFace, IJB-B or IJB-C. From the repository root:

python -m applications.evaluate_identities --data faces --network RUN --report report.html     # faces/PERSON/IMAGE.jpg
python -m applications.evaluate_identities --data tinyface --images tinyface_aligned --network RUN
python -m applications.evaluate_identities --data IJBC --network w600k_r50.onnx --json ijbc.json

What a folder holds is told from the names in it. docs/evaluation.md describes the protocols.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from util.cli.options import GROUPS, TrainedNetworkSettings, eval_batch_size, precision
from util.cli.parser import PATHS, option, parse
from util.cli.types import integer, number, to_file
from util.console import logger
from util.errors import run_script
from util.files import require_writable_file

if TYPE_CHECKING:
    from applications.evaluate_identities.report import Evaluation


@dataclass(frozen=True, kw_only=True)
class IdentitySettings(TrainedNetworkSettings):
    """The settings of applications.evaluate_identities."""

    data: Path = option(
        PATHS,
        type=to_file,
        help="folder of people with aligned faces or .rec file, or the folder of TinyFace, IJB-B or IJB-C",
        required=True,
    )
    images: Path | None = option(
        PATHS,
        type=to_file,
        metavar="DIR",
        help="TinyFace: folder of the aligned images, with Gallery_Match, Gallery_Distractor and Probe in it",
        default_help="the images in --data",
    )
    pairs: int = option(
        "Data", default=1_000_000, type=integer(1), help="folder: largest number of same and of different pairs"
    )
    gallery_images: int = option(
        "Data", default=1, type=integer(1), help="folder: largest number of images of a person in the gallery"
    )
    unknown: float = option(
        "Data",
        default=0.3,
        type=number("a number from 0 to below 1", lambda value: 0 <= value < 1),
        help="folder: fraction of the people who are not in the gallery",
    )
    seed: int = option("Data", default=1, type=integer(0), help="folder: seed of the random choices")
    precision: str = precision()
    batch_size: int | None = eval_batch_size()
    json: Path | None = option("Output", type=to_file, metavar="FILE", help="write the figures as JSON")
    report: Path | None = option(
        "Output", type=to_file, metavar="FILE.html", help="write a page with tables, curves and pictures of errors"
    )


def main(arguments: list[str]) -> None:
    settings = parse(
        IdentitySettings, "-m applications.evaluate_identities", arguments, groups=GROUPS, check=check_destinations
    )
    # torch takes seconds to import: import it after the command line was read without an error.
    from util.html_page import write_page
    from util.training.report import write_json

    evaluation = evaluate(settings)
    logger.info(evaluation.text())
    if settings.json:
        write_json(settings.json, {"data": str(settings.data), "network": settings.network, **evaluation.figures})
        logger.info(f"figures: {settings.json}")
    if settings.report:
        write_page(settings.report, evaluation.page())
        logger.info(f"report: {settings.report}")


def check_destinations(settings: IdentitySettings) -> None:
    """Raise UsageError if --json or --report cannot be written: before the work, not after it."""
    for flag, file in (("--json", settings.json), ("--report", settings.report)):
        if file is not None:
            require_writable_file(flag, file)


def evaluate(settings: IdentitySettings) -> Evaluation:
    """Read the network and the images, embed the images, and evaluate by the protocol of the set."""
    from applications.evaluate_identities.folder import evaluate_folder
    from applications.evaluate_identities.ijb import IjbSet
    from applications.evaluate_identities.tinyface import TinyFaceSet
    from util.data.loader import open_training_images
    from util.device import resolve_dtype, select_devices
    from util.embedding import embed_images
    from util.public_networks import open_network

    devices = select_devices(settings.gpu_num)
    dtype = resolve_dtype(settings.precision, devices[0])
    file, network = open_network(
        settings.network, settings.channel_order, settings.input_scale, crop=settings.eval_crop
    )
    protocol = IjbSet.find(settings.data) or TinyFaceSet.find(settings.data, settings.images)
    if protocol is None:
        images = open_training_images(settings.data)
        embedded = embed_images(network, images, devices, settings.batch_size, dtype=dtype)
        evaluation = evaluate_folder(images, embedded, settings)
    else:
        logger.info(protocol.describe())  # before the work, which may take hours
        embedded = embed_images(network, protocol, devices, settings.batch_size, dtype=dtype, strict=True)
        evaluation = protocol.evaluate(embedded)
    evaluation.intro = f"{file}: {network.describe()}."
    evaluation.figures["network_crop"] = network.crop
    return evaluation


if __name__ == "__main__":
    run_script(main)
