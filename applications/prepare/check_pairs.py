"""Read every image of a verification set and report its errors."""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from applications.prepare.channel_order import SWAPPED, UNDECIDED, classify_channel_order
from applications.prepare.report import Findings
from applications.prepare.write_set import is_reordered, new_order
from util.errors import DataError
from util.pairs import PairSet, load_pairs
from util.verification import FOLDS

_BLOCK = 64  # images read at once


def check_pairs(name: str, path: Path, root: Path | None = None) -> Findings:
    """Return findings about a verification set. Every image is decoded as in validation."""
    findings = Findings(f"verification set {name}", str(path))
    try:
        pairs = load_pairs(path, root)
    except DataError as error:
        findings.errors.append(str(error))
        return findings
    _describe_folds(findings, path, pairs.issame)
    hashes, colors = _read_images(findings, pairs)
    _describe_repetitions(findings, pairs.issame, hashes)
    swapped = np.flatnonzero(colors == SWAPPED).tolist()
    findings.describe_colors(colors, [f"image {index} (from 0)" for index in swapped])
    return findings


def _describe_folds(findings: Findings, path: Path, issame: np.ndarray) -> None:
    """Add the numbers of same and different pairs, in the complete set and in its ten folds."""
    folds = [(int(fold.sum()), int((~fold).sum())) for fold in np.array_split(issame, FOLDS)]
    findings.details["folds"] = [{"same": same, "different": different} for same, different in folds]
    texts = []
    for counts in zip(*folds, strict=True):
        low, high = min(counts), max(counts)
        texts.append(f"{low}" if low == high else f"{low} to {high}")
    same = int(issame.sum())
    findings.facts.append(
        f"{len(issame)} pairs, {same} same and {len(issame) - same} different; in each tenth {texts[0]} same and "
        f"{texts[1]} different"
    )
    try:
        if is_reordered(new_order(path, issame)):
            findings.warnings.append(
                "some tenths have only same or only different pairs: train.py and validation.py interleave the pairs, "
                "other programs may not"
            )
    except DataError as error:
        findings.errors.append(str(error))


def _read_images(findings: Findings, pairs: PairSet) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes of the pixels, (2P,) uint64, and channel orders, (2P,) uint8: 0 and UNDECIDED for broken images."""
    hashes = np.zeros(2 * len(pairs), np.uint64)
    colors = np.full(2 * len(pairs), UNDECIDED, np.uint8)
    broken: list[str] = []
    images = tqdm(_images_or_errors(pairs), f"reading {pairs.name}", total=len(hashes), unit="image")
    for index, image in enumerate(images):
        if isinstance(image, DataError):
            broken.append(str(image))
            continue
        hashes[index] = int.from_bytes(blake2b(image.tobytes(), digest_size=8).digest())
        colors[index] = classify_channel_order(image)
    if broken:
        findings.errors.append(f"{len(broken)} images cannot be used:{findings.list_names('unreadable', broken)}")
    return hashes, colors


def _images_or_errors(pairs: PairSet) -> Iterator[np.ndarray | DataError]:
    """Yield the images of a set in order, or the error in place of an image that cannot be read."""
    for start in range(0, 2 * len(pairs), _BLOCK):
        stop = min(start + _BLOCK, 2 * len(pairs))
        try:
            yield from pairs.images(start, stop)
        except DataError:
            for index in range(start, stop):  # read the block image by image
                try:
                    yield pairs.images(index, index + 1)[0]
                except DataError as error:
                    yield error


def _describe_repetitions(findings: Findings, issame: np.ndarray, hashes: np.ndarray) -> None:
    """Warn of pairs of an image with itself, which test nothing or are wrong, and of pairs that occur twice."""
    both = np.sort(hashes.reshape(-1, 2), axis=1)  # the order of the two images does not matter; 0 is a broken image
    findings.facts.append(f"{len(np.unique(hashes[hashes > 0]))} different images")
    readable = both[:, 0] > 0
    with_itself = readable & (both[:, 0] == both[:, 1])
    for kind, selected in (("the same person", with_itself & issame), ("different people", with_itself & ~issame)):
        if selected.any():
            pairs = [f"pair {pair} (from 0)" for pair in np.flatnonzero(selected).tolist()]
            names = findings.list_names(f"one image twice, {kind}", pairs)
            findings.warnings.append(f"{len(pairs)} pairs of {kind} are one image twice:{names}")
    repeated = int(readable.sum()) - len(np.unique(both[readable], axis=0))
    if repeated:
        findings.warnings.append(f"{repeated} pairs repeat another")
