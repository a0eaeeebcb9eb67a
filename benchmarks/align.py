"""Measure speed and accuracy of alignment, compared with a plain MTCNN with the same weights in the same run.

python -m benchmarks.align --images LFW/images
python -m benchmarks.align --images LFW/images --count 0 --landmarks LFW/landmarks.jsonl --aligned LFW/aligned_112
python -m benchmarks.align --images LFW/images --count 320 --parts

The times include reading, detection, warping and writing; our times also include starting processes. The programs are
measured alternately. Ours uses one process per core. The plain MTCNN uses all cores for each operation, and is measured
twice: with one input at a time, and with all crops of a photograph in one batch. With --landmarks, every photograph is
compared with the result of a reference detector. Each line of that file is JSON: name, landmarks ([x1 … x5 y1 … y5] of
each face) and central (the index of the central face). With --aligned, the faces are compared with the faces of another
program. With --parts, the time of each step of one process on one core is measured instead.
"""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch

from applications.align import batch, detector, networks, pyramid
from applications.align.batch import AlignSettings, align_tree
from applications.align.manifest import ALIGNED, read_manifest
from benchmarks.plain_mtcnn import PlainDetector, align_image
from benchmarks.timing import JsonFlag, write_json
from util.cli.parser import choice, flag, option, parse
from util.cli.types import integer, to_file
from util.device import keep_freed_memory
from util.errors import DataError, run_script
from util.image_io import read_photo

# (module or class, function, name) of the steps that --parts measures. No step contains another one.
STEPS = (
    (batch, "read_photo", "reading"),
    (pyramid, "paint", "pyramid levels onto canvases"),
    (networks.ProposalNet, "forward", "P-Net"),
    (detector, "_crops", "crops"),
    (networks.RefinementNet, "forward", "R-Net"),
    (networks.OutputNet, "forward", "O-Net"),
    (detector, "suppress", "non-maximum suppression"),
    (batch, "align", "warping"),
    (batch, "write_image", "writing"),
)
ROUNDS = 3
PLAIN_STRIDE = 10  # the plain MTCNN gets every tenth photograph of a round, because it is slow


@dataclass(frozen=True, kw_only=True)
class Flags(JsonFlag):
    """The settings of this benchmark."""

    images: Path = option(type=to_file, metavar="DIR", help="folder of photographs", required=True)
    count: int = option(default=3000, type=integer(0), help="random photographs; 0: all of them")
    landmarks: Path | None = option(type=to_file, metavar="FILE", help="landmarks of a reference detector")
    aligned: Path | None = option(type=to_file, metavar="DIR", help="central faces, as another program aligned them")
    device: str = choice(("cpu", "cuda"), default="cpu", help="device of our detector: cpu or cuda")
    parts: bool = flag(help="measure the time of each part")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.align", arguments, description=__doc__, check=JsonFlag.check)
    files = sorted(str(path.relative_to(options.images)) for path in options.images.rglob("*.jpg"))
    if len(files) < 100:
        raise DataError(f"{options.images}: {len(files)} JPEG files, but 100 are needed. Name another folder.")
    random.Random(0).shuffle(files)
    files = files[: options.count or None]
    if options.parts:
        figures = step_times(options.images, files)
    else:
        figures = speed(options.images, files, torch.device(options.device))
    with tempfile.TemporaryDirectory() as folder:
        if options.landmarks:
            align_tree(options.images, Path(folder), AlignSettings(select="central"), files=files)
            figures |= quality(Path(folder), options.landmarks, options.aligned)
    for name, value in figures.items():
        print(f"{name:<46}{value:.4g}")
    if options.json:
        write_json(options.json, figures)


def step_times(images: Path, files: list[str]) -> dict[str, float]:
    """Measure milliseconds per image of the steps on one core, over the second half of the files, after warming up."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    keep_freed_memory()
    times: dict[str, float] = {name: 0.0 for _, _, name in STEPS}

    def timed(name: str, function: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                times[name] += time.perf_counter() - started

        return call

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for owner, function, name in STEPS:
            stack.enter_context(patch.object(owner, function, timed(name, getattr(owner, function))))
        half = len(files) // 2
        for turn, part in enumerate((files[:half], files[half:])):
            times.update(dict.fromkeys(times, 0.0))
            summary = align_tree(images, Path(folder) / str(turn), AlignSettings(), processes=0, files=part)
    slowest_first = sorted(times, key=times.__getitem__, reverse=True)
    times["all"] = summary.seconds
    return {f"{name}, ms an image": times[name] / len(part) * 1e3 for name in [*slowest_first, "all"]}


def speed(images: Path, files: list[str], device: torch.device) -> dict[str, float]:
    """Measure milliseconds per image of ours and of the plain ones alternately. Return medians over the rounds."""
    plain = {"one input at a time": PlainDetector(False), "crops together": PlainDetector(True)}
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in plain}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            files_of_round = files[turn::ROUNDS]
            few = files_of_round[::PLAIN_STRIDE]
            for name, detector in plain.items():
                started = time.perf_counter()
                for file in few:
                    align_image(detector, str(images / file), f"{folder}/face.jpg")
                theirs[name].append((time.perf_counter() - started) / len(few))
            summary = align_tree(images, Path(folder) / str(turn), AlignSettings(), [device], files=files_of_round)
            ours.append(summary.seconds / len(files_of_round))
    figures = {"ours, ms an image": statistics.median(ours) * 1e3, "ours, images/s": 1 / statistics.median(ours)}
    for name, seconds in theirs.items():
        figures[f"plain, {name}, ms an image"] = statistics.median(seconds) * 1e3
        figures[f"plain, {name} / ours"] = statistics.median(a / b for a, b in zip(seconds, ours, strict=True))
    return figures


def quality(aligned: Path, landmarks: Path, others: Path | None) -> dict[str, float]:
    """Measure the distance of our landmarks and faces from the reference."""
    references = {entry["name"]: entry for entry in map(json.loads, landmarks.read_text().splitlines())}
    rows = list(read_manifest(aligned))
    distances = []
    differences = []
    for row in rows:
        reference = references.get(Path(row.path).stem)
        if row.face and reference:
            points = np.reshape(reference["landmarks"][reference["central"]], (2, 5)).T
            distances.append(np.linalg.norm(row.face.landmarks - points, axis=1).mean())
            if others:
                ours = read_photo(aligned / row.output)
                theirs = read_photo(others / row.path)
                differences.append(np.abs(ours.astype(int) - theirs).mean())
    if not distances:
        raise DataError(f"{landmarks}: has none of the photographs. Name the landmarks of these images.")
    figures = {
        "photographs": len(rows),
        "with a face, %": 100 * sum(row.status == ALIGNED for row in rows) / len(rows),
        "landmarks, px from the reference, median": float(np.median(distances)),
        "landmarks, px from the reference, 99 %": float(np.percentile(distances, 99)),
        "landmarks, px from the reference, largest": max(distances),
    }
    if others:
        figures["faces, grey levels from the reference, mean"] = float(np.mean(differences))
    return figures


if __name__ == "__main__":
    run_script(main)
