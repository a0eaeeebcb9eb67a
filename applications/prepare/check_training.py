"""Read every image of a training set on all cores and report its errors."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from applications.prepare import channel_order
from applications.prepare.channel_order import SWAPPED, UNDECIDED
from applications.prepare.report import KEPT, SHOWN, Findings
from util.data.loader import TrainingImages, open_training_images
from util.errors import DataError
from util.parallel import parallel_map, working_on

_CHUNK = 256  # images that a process reads at a time


@dataclass
class ImageStats:
    """Properties of n images, in 11 bytes each."""

    # (n,) uint64: 64 bits of BLAKE2b of the file. Two of 40 million different images collide in one of 23,000 sets.
    hashes: np.ndarray
    sizes: np.ndarray  # (n,) uint16: pixels a side, 0 for an image that cannot be used
    colors: np.ndarray  # (n,) uint8: the result of classify_channel_order
    broken: list[tuple[int, str]] = field(default_factory=list)  # (index, message)

    @staticmethod
    def empty(count: int) -> "ImageStats":
        colors = np.full(count, UNDECIDED, np.uint8)
        return ImageStats(np.zeros(count, np.uint64), np.zeros(count, np.uint16), colors)


def check_training(path: Path, processes: int) -> Findings:
    """Return findings about a training set. Every image is decoded as in training."""
    findings = Findings("training images", str(path))
    try:
        images = open_training_images(path)
    except DataError as error:
        findings.errors.append(str(error))
        return findings
    findings.path = str(images.root)
    counts = np.bincount(images.labels, minlength=len(images.classes))
    findings.facts.append(
        f"{len(images)} images of {len(images.classes)} people; {counts.min()} to {counts.max()} images a person "
        f"(median {np.median(counts):g}), {(counts == 1).sum()} people with a single one"
    )
    stats = _read_images(images, processes)
    # The number of images of each size, the most frequent size first.
    sizes, counts = np.unique(stats.sizes[stats.sizes > 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    texts = [f"{sizes[i]}x{sizes[i]} ({counts[i]})" for i in order[:SHOWN]]
    more = f" and {len(sizes) - SHOWN} other sizes" if len(sizes) > SHOWN else ""
    findings.facts.append(f"sizes: {', '.join(texts) or 'none'}{more}")
    findings.details["sizes"] = {int(sizes[i]): int(counts[i]) for i in order}
    if stats.broken:
        count = int((stats.sizes == 0).sum())
        findings.details["unreadable count"] = count
        names = findings.list_names("unreadable", [message for _, message in stats.broken])
        findings.errors.append(f"{count} images cannot be used:{names}")
    _describe_duplicates(findings, images, stats)
    swapped = np.flatnonzero(stats.colors == SWAPPED)[:KEPT].tolist()
    findings.describe_colors(stats.colors[stats.sizes > 0], [images.where(index) for index in swapped])
    return findings


def _read_images(images: TrainingImages, processes: int) -> ImageStats:
    stats = ImageStats.empty(len(images))
    chunks = [range(start, min(start + _CHUNK, len(images))) for start in range(0, len(images), _CHUNK)]
    with (
        tqdm(total=len(images), desc=f"reading {images.root.name}", unit="image", unit_scale=True) as bar,
        parallel_map(_read_chunk, images, chunks, processes) as results,
    ):
        for chunk, found in zip(chunks, results, strict=True):
            rows = slice(chunk.start, chunk.stop)
            stats.hashes[rows] = found.hashes
            stats.sizes[rows] = found.sizes
            stats.colors[rows] = found.colors
            stats.broken += found.broken[: KEPT - len(stats.broken)]
            bar.update(len(chunk))
    return stats


def _read_chunk(images: TrainingImages, chunk: range) -> ImageStats:
    """Return the properties of the images with these indices."""
    stats = ImageStats.empty(len(chunk))
    for row, index in enumerate(chunk):
        working_on(images.where(index))
        try:
            encoded = images.encoded(index)
            stats.hashes[row] = int.from_bytes(blake2b(encoded, digest_size=8).digest())
            image = images.image(index)
        except DataError as error:
            stats.broken.append((index, str(error)))
            continue
        stats.sizes[row] = min(image.shape[0], np.iinfo(np.uint16).max)
        stats.colors[row] = channel_order.classify_channel_order(image)
    return stats


def _describe_duplicates(findings: Findings, images: TrainingImages, stats: ImageStats) -> None:
    """Warn of files with the same bytes. Within a person they have a higher weight; across people a label is wrong."""
    within: list[str] = []
    across: list[str] = []
    count_within = count_across = 0
    for group in groups_of_equals(stats.hashes, stats.sizes > 0):
        people = np.unique(images.labels[group])
        kept = across if len(people) > 1 else within
        if len(people) > 1:
            count_across += 1
        else:
            count_within += len(group) - 1
        if len(kept) < KEPT:
            kept.append(" = ".join(images.where(index) for index in group[:SHOWN].tolist()))
    if count_within:
        names = findings.list_names("duplicates within a person", within)
        findings.warnings.append(f"{count_within} files repeat another of the same person:{names}")
    if count_across:
        names = findings.list_names("duplicates across people", across)
        findings.warnings.append(
            f"{count_across} files are in the folders of two or more people, with a wrong label in all but one:{names}"
        )


def groups_of_equals(hashes: np.ndarray, usable: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the ascending indices of each group of two or more equal hashes, among the usable images."""
    order = np.flatnonzero(usable)
    order = order[np.argsort(hashes[order], kind="stable")]
    # A group starts where a hash differs from the one before.
    starts = np.flatnonzero(np.r_[True, hashes[order[1:]] != hashes[order[:-1]]][: len(order)])
    sizes = np.diff(np.r_[starts, len(order)])
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        yield order[start : start + size]
