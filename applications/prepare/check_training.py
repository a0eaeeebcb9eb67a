"""Read every image of a training set on all cores and report its errors."""

from collections.abc import Iterable, Iterator
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


# Properties of an image. Two of 40 million different images have equal hashes in one of 23,000 sets.
_STATS = np.dtype(
    [
        ("hash", np.uint64),  # 64 bits of BLAKE2b of the file
        ("size", np.uint16),  # pixels a side, 0 for an image that cannot be used
        ("color", np.uint8),  # the result of classify_channel_order
    ]
)


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
    stats, broken = _read_images(images, processes)
    usable = stats["size"] > 0
    # The number of images of each size, the most frequent size first.
    sizes, counts = np.unique(stats["size"][usable], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    texts = [f"{sizes[i]}x{sizes[i]} ({counts[i]})" for i in order[:SHOWN]]
    more = f" and {len(sizes) - SHOWN} other sizes" if len(sizes) > SHOWN else ""
    findings.facts.append(f"sizes: {', '.join(texts) or 'none'}{more}")
    findings.details["sizes"] = {int(sizes[i]): int(counts[i]) for i in order}
    if broken:
        count = int((~usable).sum())
        findings.details["unreadable count"] = count
        findings.errors.append(f"{count} images cannot be used:{findings.list_names('unreadable', broken)}")
    _describe_duplicates(findings, images, groups_of_equals(stats["hash"], usable))
    swapped = np.flatnonzero(stats["color"] == SWAPPED)[:KEPT].tolist()
    findings.describe_colors(stats["color"][usable], [images.where(index) for index in swapped])
    return findings


def _read_images(images: TrainingImages, processes: int) -> tuple[np.ndarray, list[str]]:
    """Return the properties of all images, (n,) _STATS, and what is wrong with the first KEPT broken ones."""
    stats = np.zeros(len(images), _STATS)
    broken: list[str] = []
    chunks = [range(start, min(start + _CHUNK, len(images))) for start in range(0, len(images), _CHUNK)]
    with (
        tqdm(total=len(images), desc=f"reading {images.root.name}", unit="image", unit_scale=True) as bar,
        parallel_map(_read_chunk, images, chunks, processes) as results,
    ):
        for chunk, (found, errors) in zip(chunks, results, strict=True):
            stats[chunk.start : chunk.stop] = found
            broken += errors[: KEPT - len(broken)]
            bar.update(len(chunk))
    return stats, broken


def _read_chunk(images: TrainingImages, chunk: range) -> tuple[np.ndarray, list[str]]:
    stats = np.zeros(len(chunk), _STATS)
    stats["color"] = UNDECIDED
    errors = []
    for row, index in enumerate(chunk):
        working_on(images.where(index))
        try:
            encoded = images.encoded(index)
            image = images.image(index)
        except DataError as error:
            errors.append(str(error))
            continue
        digest = int.from_bytes(blake2b(encoded, digest_size=8).digest())
        size = min(image.shape[0], np.iinfo(np.uint16).max)
        stats[row] = (digest, size, channel_order.classify_channel_order(image))
    return stats, errors


def _describe_duplicates(findings: Findings, images: TrainingImages, groups: Iterable[np.ndarray]) -> None:
    """Warn of files with the same bytes. Within a person they have a higher weight; across people a label is wrong."""
    within: list[str] = []
    across: list[str] = []
    count_within = count_across = 0
    for group in groups:
        is_across = bool((images.labels[group] != images.labels[group[0]]).any())
        count_across += is_across
        count_within += 0 if is_across else len(group) - 1
        kept = across if is_across else within
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
