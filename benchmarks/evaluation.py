"""Measure the preparation of verification images, and its fraction of the time of a validation.

python -m benchmarks.evaluation
python -m benchmarks.evaluation --data data/imgs_casia --backbone MobileFaceNet

The baseline uses PIL for each image: resize, crop, mirror and convert to a tensor. Both return a batch of the images
and a batch of their mirror images. The fraction does not include reading the images and is measured with one thread. In
a validation, another thread prepares the images while the network runs.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from benchmarks import baseline
from benchmarks.sample_images import ImageFlags
from benchmarks.timing import Benchmark, benchmark_main, rate_row, time_alternately
from model.backbone import build_backbone
from model.names import BACKBONE_NAMES
from util.cli.parser import choice, option
from util.cli.types import integer
from util.device import prepare_module
from util.errors import run_script
from util.evaluate import embed, with_flip
from util.transform import eval_crop


@dataclass(frozen=True, kw_only=True)
class Flags(ImageFlags):
    """The settings of this benchmark."""

    images: int = option(default=512, type=integer(1), help="images per turn")
    backbone: str = choice(BACKBONE_NAMES, default="IR_SE_50", help="backbone whose time is compared")


def measure(options: Flags) -> Benchmark:
    """Measure images per second of both, and the fraction of preparation in an evaluation with the backbone."""
    if options.quick:
        options = replace(options, images=8, backbone="MobileFaceNet_025")
    images = options.first_images(options.images)
    times = time_alternately(partial(_ours, images), partial(_baseline, images), options.repeats)
    row = rate_row("crop and mirror", len(images), times)
    backbone = prepare_module(build_backbone(options.backbone).eval(), [torch.device("cpu")])
    few = images[:16]
    repeats = min(options.repeats, 3)
    preparing, embedding = time_alternately(partial(eval_crop, few), partial(embed, backbone, few), repeats)
    fraction = sum(preparing) / (sum(preparing) + sum(embedding))
    note = f"Preparation, without reading, is {fraction:.2%} of the time of an evaluation with {options.backbone}."
    return Benchmark("evaluation", f"{len(images)} images of 112x112, {options.describe()}", (row,), (note,))


def _ours(images: np.ndarray) -> None:
    for start in range(0, len(images), 64):
        with_flip(torch.from_numpy(eval_crop(images[start : start + 64])))


def _baseline(images: np.ndarray) -> None:
    for start in range(0, len(images), 64):
        baseline.evaluation_batch(images[start : start + 64])


main = benchmark_main("evaluation", Flags, measure, __doc__)

if __name__ == "__main__":
    run_script(main)
