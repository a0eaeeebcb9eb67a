"""Reads every image of a training set, on all cores, and counts what is wrong with it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from tqdm import tqdm

from applications.prepare import channel_order as color
from applications.prepare.report import KEPT, SHOWN, Findings
from util.data.loader import TrainingImages
from util.errors import DataError
from util.parallel import parallel_map

_CHUNK = 256  # images that a process takes at once


@dataclass
class Measured:
    """What is known of n images. `hashes` (n,) uint64: of the files' bytes; 64 bits of BLAKE2b, which two of 40 million
    different images share in one of 23,000 sets. `sizes` (n,) uint16: pixels a side, 0 for an image that cannot be
    used; `colours` (n,) uint8, as colour.judge says; `broken`: (index, message)."""

    hashes: np.ndarray
    sizes: np.ndarray
    colors: np.ndarray
    broken: list[tuple[int, str]] = field(default_factory=list)

    @staticmethod
    def empty(count: int) -> "Measured":
        return Measured(*(np.zeros(count, dtype) for dtype in (np.uint64, np.uint16, np.uint8)))


def check_training(images: TrainingImages, processes: int) -> Findings:
    """Findings about a training set, whose every image is decoded as training would do it."""
    findings = Findings("training images", str(images.root))
    counts = np.bincount(images.labels, minlength=len(images.classes))
    findings.facts.append(
        f"{len(images)} images of {len(images.classes)} people; {counts.min()} to {counts.max()} images a person "
        f"(median {np.median(counts):g}), {(counts == 1).sum()} people with a single one"
    )
    measured = measure(images, processes)
    describe_sizes(findings, measured.sizes)
    if measured.broken:
        findings.details["unreadable count"] = int((measured.sizes == 0).sum())
        named = findings.list_names("unreadable", [message for _, message in measured.broken])
        findings.errors.append(f"{(measured.sizes == 0).sum()} images cannot be used:{named}")
    describe_duplicates(findings, images, measured)
    describe_colors(findings, images, measured)
    return findings


def measure(images: TrainingImages, processes: int) -> Measured:
    """Everything about all images, in 11 bytes each."""
    total = Measured.empty(len(images))
    chunks = [range(start, min(start + _CHUNK, len(images))) for start in range(0, len(images), _CHUNK)]
    with tqdm(total=len(images), desc=f"reading {images.root.name}", unit="image", unit_scale=True) as bar:
        for chunk, part in zip(chunks, parallel_map(measure_chunk, images, chunks, processes), strict=True):
            for name in ("hashes", "sizes", "colors"):
                getattr(total, name)[chunk.start : chunk.stop] = getattr(part, name)
            total.broken += part.broken[: KEPT - len(total.broken)]
            bar.update(len(chunk))
    return total


def measure_chunk(images: TrainingImages, chunk: range) -> Measured:
    measured = Measured.empty(len(chunk))
    measured.colors[:] = color.UNDECIDED
    for place, index in enumerate(chunk):
        try:
            encoded = images.encoded(index)
            measured.hashes[place] = int.from_bytes(blake2b(encoded, digest_size=8).digest())
            image = images.image(index)
        except DataError as error:
            measured.broken.append((index, str(error)))
            continue
        measured.sizes[place] = min(image.shape[0], np.iinfo(np.uint16).max)
        measured.colors[place] = color.judge(image)
    return measured


def describe_sizes(findings: Findings, sizes: np.ndarray) -> None:
    """How many images there are of each size, the most frequent first."""
    values, counts = np.unique(sizes[sizes > 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    texts = [f"{values[i]}x{values[i]} ({counts[i]})" for i in order[:SHOWN]]
    more = f" and {len(values) - SHOWN} other sizes" if len(values) > SHOWN else ""
    findings.facts.append(f"sizes: {', '.join(texts) or 'none'}{more}")
    findings.details["sizes"] = {int(values[i]): int(counts[i]) for i in order}


def describe_duplicates(findings: Findings, images: TrainingImages, measured: Measured) -> None:
    """Files with the same bytes: of one person they only weigh more, of two people one of them is wrong."""
    within, across = [], []
    count_within = count_across = 0
    for group in groups_of_equals(measured.hashes, measured.sizes > 0):
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
            f"{count_across} files lie with two or more people, so that all but one mislead:{names}"
        )


def groups_of_equals(hashes: np.ndarray, usable: np.ndarray) -> Iterator[np.ndarray]:
    """The indices, ascending, of each group of two or more equal hashes among the usable ones."""
    order = np.flatnonzero(usable)
    order = order[np.argsort(hashes[order], kind="stable")]
    starts = np.flatnonzero(np.r_[True, hashes[order[1:]] != hashes[order[:-1]]][: len(order)])
    sizes = np.diff(np.r_[starts, len(order)])
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        yield order[start : start + size]


def describe_colors(findings: Findings, images: TrainingImages, measured: Measured) -> None:
    fact, warning = color.describe(measured.colors[measured.sizes > 0])
    findings.facts.append(fact)
    swapped = np.flatnonzero(measured.colors == color.SWAPPED)[:KEPT].tolist()
    names = findings.list_names("red and blue swapped", [images.where(index) for index in swapped])
    if warning:
        findings.warnings.append(warning + ":" + names)
