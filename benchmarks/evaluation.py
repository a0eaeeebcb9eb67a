"""Measure the preparation of verification images, and its fraction of the time of a validation.

python -m benchmarks.evaluation
python -m benchmarks.evaluation --data data/imgs_casia --backbone MobileFaceNet

The baseline uses PIL for each image: resize, crop, mirror and convert to a tensor. Both return a batch of the images
and a batch of their mirror images. The fraction does not include reading the images and is measured with one thread. In
a validation, another thread prepares the images while the network runs.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import baseline
from benchmarks.sample_images import folder_of_people, some_images
from benchmarks.timing import Benchmark, TimingFlags, rate_row, report, time_alternately, use_threads
from model.backbone import build_backbone
from model.names import BACKBONE_NAMES
from util.cli.parser import choice, option, parse
from util.cli.types import integer, to_file
from util.errors import run_script
from util.evaluate import embed, with_flip
from util.transform import eval_crop


@dataclass(frozen=True, kw_only=True)
class Flags(TimingFlags):
    """The settings of this benchmark."""

    repeats: int = option(default=7, type=integer(1), metavar="N", help="measured turns, after one of warming up")
    data: Path | None = option(
        type=to_file,
        metavar="DIR",
        help="images, one folder per identity",
        default_help="data/demo, or faces drawn now",
    )
    images: int = option(default=512, type=integer(1), metavar="N", help="images per turn")
    backbone: str = choice(BACKBONE_NAMES, default="IR_SE_50", help="backbone whose time is compared")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.evaluation", arguments, description=__doc__, check=TimingFlags.check)
    name = "MobileFaceNet_025" if options.quick else options.backbone
    use_threads(options.threads)
    with folder_of_people(options.data, options.quick) as folder:
        images = some_images(folder, 8 if options.quick else options.images)
    report(measure(images, name, options.threads, options.repeats), options.json)


def measure(images: np.ndarray, name: str, threads: int, repeats: int) -> Benchmark:
    """Measure images per second of both, and the fraction of preparation in an evaluation with the backbone `name`."""
    times = time_alternately(partial(_ours, images), partial(_baseline, images), repeats)
    row = rate_row("crop and mirror", len(images), times)
    backbone = build_backbone(name).eval().to(memory_format=torch.channels_last)
    few = images[:16]
    preparing, embedding = time_alternately(partial(eval_crop, few), partial(embed, backbone, few), min(repeats, 3))
    fraction = sum(preparing) / (sum(preparing) + sum(embedding))
    notes = (f"Preparation, without reading the images, is {fraction:.2%} of the time of an evaluation with {name}.",)
    setting = f"{len(images)} images of 112x112, threads: {threads}, median of {repeats} turns"
    return Benchmark("evaluation", setting, (row,), notes)


def _ours(images: np.ndarray) -> None:
    for start in range(0, len(images), 64):
        with_flip(torch.from_numpy(eval_crop(images[start : start + 64])))


def _baseline(images: np.ndarray) -> None:
    for start in range(0, len(images), 64):
        baseline.evaluation_batch(images[start : start + 64])


if __name__ == "__main__":
    run_script(main)
