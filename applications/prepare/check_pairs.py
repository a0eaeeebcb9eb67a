"""Reads every image of a verification set, and counts what is wrong with it."""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from applications.prepare import channel_order as color
from applications.prepare.report import Findings
from applications.prepare.write_set import is_reordered, new_order
from util.errors import DataError
from util.pairs import PairSet, load_pairs
from util.verification import FOLDS

_BLOCK = 64  # images read at once


def check_pairs(name: str, path: Path, root: Path | None = None) -> Findings:
    """Findings about a verification set, whose every image is decoded as validation would do it."""
    findings = Findings(f"verification set {name}", str(path))
    try:
        pairs = load_pairs(path, root)
    except DataError as error:
        findings.errors.append(str(error))
        return findings
    describe_folds(findings, path, pairs.issame)
    hashes, colors = measure(findings, pairs)
    describe_repetitions(findings, pairs.issame, hashes)
    fact, warning = color.describe(colors)
    findings.facts.append(fact)
    swapped = [f"image {index} (from 0)" for index in np.flatnonzero(colors == color.SWAPPED).tolist()]
    names = findings.list_names("red and blue swapped", swapped)
    if warning:
        findings.warnings.append(warning + ":" + names)
    return findings


def describe_folds(findings: Findings, path: Path, issame: np.ndarray) -> None:
    same = int(issame.sum())
    folds = [(int(part.sum()), int((~part).sum())) for part in np.array_split(issame, FOLDS)]
    findings.details["folds"] = [{"same": same, "different": different} for same, different in folds]
    kinds = [
        f"{min(kind)}" if min(kind) == max(kind) else f"{min(kind)} to {max(kind)}" for kind in zip(*folds, strict=True)
    ]
    findings.facts.append(
        f"{len(issame)} pairs, {same} same and {len(issame) - same} different; in each tenth {kinds[0]} same and "
        f"{kinds[1]} different"
    )
    try:
        if is_reordered(new_order(path, issame)):
            findings.warnings.append(
                "some tenths have only same or only different pairs: train.py and validation.py interleave them, other "
                "programs may not"
            )
    except DataError as error:
        findings.errors.append(str(error))


def measure(findings: Findings, pairs: PairSet) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the pixels, (2P,) uint64, and judgements on the colours, (2P,). 0 and UNDECIDED for a broken image."""
    hashes = np.zeros(2 * len(pairs), np.uint64)
    colors = np.full(2 * len(pairs), color.UNDECIDED, np.uint8)
    broken: list[str] = []
    for index, image in enumerate(tqdm(each_or_error(pairs), f"reading {pairs.name}", len(hashes), unit="image")):
        if isinstance(image, DataError):
            broken.append(str(image))
            continue
        hashes[index] = int.from_bytes(blake2b(image.tobytes(), digest_size=8).digest())
        colors[index] = color.judge(image)
    if broken:
        findings.errors.append(f"{len(broken)} images cannot be used:{findings.list_names('unreadable', broken)}")
    return hashes, colors


def each_or_error(pairs: PairSet) -> Iterator[np.ndarray | DataError]:
    """The images of a set one after the other, and an error in the place of one that cannot be read."""
    for start in range(0, 2 * len(pairs), _BLOCK):
        stop = min(start + _BLOCK, 2 * len(pairs))
        try:
            yield from pairs.images(start, stop)
        except DataError:
            yield from (image_or_error(pairs, index) for index in range(start, stop))


def image_or_error(pairs: PairSet, index: int) -> np.ndarray | DataError:
    try:
        return pairs.images(index, index + 1)[0]
    except DataError as error:
        return error


def describe_repetitions(findings: Findings, issame: np.ndarray, hashes: np.ndarray) -> None:
    """Pairs of one image with itself, which say nothing if they are the same person and are wrong otherwise, and pairs
    that come twice."""
    both = np.sort(hashes.reshape(-1, 2), axis=1)
    findings.facts.append(f"{len(np.unique(hashes[hashes > 0]))} different images")
    whole = both[:, 0] > 0
    itself = whole & (both[:, 0] == both[:, 1])
    for kind, chosen in (("the same person", itself & issame), ("different people", itself & ~issame)):
        if chosen.any():
            pairs = [f"pair {pair} (from 0)" for pair in np.flatnonzero(chosen).tolist()]
            names = findings.list_names(f"one image twice, {kind}", pairs)
            findings.warnings.append(f"{len(pairs)} pairs of {kind} are one image twice:{names}")
    repeated = int(whole.sum()) - len(np.unique(both[whole], axis=0))
    if repeated:
        findings.warnings.append(f"{repeated} pairs repeat another")
