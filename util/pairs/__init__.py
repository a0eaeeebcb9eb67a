"""Verification sets: 2P face images, of which 2i and 2i + 1 are a pair, and a truth for each pair."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from util.console import logger
from util.errors import DataError
from util.pairs.bcolz import CarrayPairs
from util.pairs.bin import BinPairs
from util.pairs.text_list import ListPairs
from util.verification import FOLDS, contiguous_folds

# Where the sets lie under data_dir, in the order in which they are reported.
VERIFICATION_SETS = {
    "LFW": ("lfw_align_112/lfw", "lfw.bin"),
    "CFP_FF": ("cfp_align_112/cfp_ff", "cfp_ff.bin"),
    "CFP_FP": ("cfp_align_112/cfp_fp", "cfp_fp.bin"),
    "AgeDB": ("AgeDB/agedb_30", "agedb_30/agedb_30", "agedb_30", "agedb_30.bin"),
}
# How pickles begin: in the binary protocols; two lists in the text protocols; a call, which is refused by name later.
_PICKLE = re.compile(rb"\x80|\(?(\(l|\]q|c\w[\w.]*\n\w+\n)")
_BLOCK = 64  # images at a time


class PairSet(Protocol):
    """What evaluation needs of a verification set, whatever its format on the disk."""

    name: str
    issame: np.ndarray  # (P,) bool

    def __len__(self) -> int:
        """Return the number of pairs P."""
        ...

    def images(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        ...


class PairSubset:
    """Some pairs of another set, in any order: `order` (Q,) holds their numbers in that set."""

    def __init__(self, pairs: PairSet, order: np.ndarray):
        self.name = pairs.name
        self.issame = pairs.issame[order]
        self._pairs = pairs
        self._order = order

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop (counted in images, 0 to 2Q) as (n, 112, 112, 3) RGB uint8."""
        chosen = self._order[start // 2 : -(-stop // 2)].tolist()
        images = np.concatenate([self._pairs.images(2 * pair, 2 * pair + 2) for pair in chosen])
        return images[start % 2 :][: stop - start]


def load_pairs(path: str | Path, root: str | Path | None = None) -> PairSet:
    """Open a verification set. Its content tells its format; the pairs have the order of the file.

    Args:
        path: a bcolz folder, with the list `path`_list.npy next to it; a .bin file of InsightFace; or a list of pairs
            in text, see util/pairs/text_list.py.
        root: the folder with the images of a text list; None for the list's own folder. Other formats ignore it.

    Raises:
        DataError: evaluation could not read the set; names the file and the fix. Images between the first and the last
            one are decoded later, when they are read.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "meta" / "storage").is_file():
            raise DataError(f"{path}: not a bcolz carray. Name a folder with meta/ and data/ in it.")
        return CarrayPairs(path)
    if not path.is_file():
        raise DataError(f"{path}: no such verification set. Correct the path.")
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Restore it.") from None
    if _PICKLE.match(start):
        return BinPairs(path)
    return ListPairs(path, None if root is None else Path(root))


def find_pair_sets(
    data_dir: str | Path, extra_sets: Mapping[str, tuple[str, str | None]] | None = None
) -> tuple[list[PairSet], list[str]]:
    """Open the verification sets under data_dir, then the extra sets.

    Args:
        data_dir: the folder with the sets of VERIFICATION_SETS.
        extra_sets: {name: (path, root)} for load_pairs. An extra set replaces the set of VERIFICATION_SETS with the
            same name, in any case.

    Returns:
        The sets, and the names of the sets of VERIFICATION_SETS that do not exist. If there are only extra sets, no
        other set counts as missing.

    Raises:
        DataError: a set exists and cannot be evaluated. Leaving it out silently would change the average.
    """
    extra_sets = extra_sets or {}
    replaced = {name.lower() for name in extra_sets}
    found: list[PairSet] = []
    missing: list[str] = []
    for name, places in VERIFICATION_SETS.items():
        if name.lower() in replaced:
            continue
        paths = [Path(data_dir) / place for place in places]
        path = next((path for path in paths if (path / "meta").is_dir() or path.is_file()), None)
        if path is None:
            missing.append(name)
        else:
            found.append(_open(name, path))
    if extra_sets and not found:
        missing = []
    return found + [_open(name, path, root) for name, (path, root) in extra_sets.items()], missing


def _open(name: str, path: str | Path, root: str | None = None) -> PairSet:
    """Open a set under the given name, with its pairs in an order that ten folds can evaluate."""
    pairs = load_pairs(path, root)
    pairs.name = name
    try:
        order = interleaved_order(pairs.issame)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if (order[1:] > order[:-1]).all():
        return pairs
    logger.info(
        f"{name}: some of the ten folds would contain only positive or only negative pairs; interleaving the pairs"
    )
    return PairSubset(pairs, order)


def interleaved_order(issame: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Return an order (P,) of the pairs in which each of the contiguous folds has positive and negative pairs.

    The given order is kept if its folds have both kinds. Otherwise all folds get the same number of positive pairs, to
    within one, and of negative pairs. Pairs of one kind stay in their order: a set of five folds with the positive
    pairs first becomes ten halves of these folds. Raises DataError if there are fewer pairs of a kind than folds.
    """
    order = np.arange(len(issame))
    try:
        contiguous_folds(issame, folds)
    except DataError:
        pass
    else:
        return order
    positive = np.flatnonzero(issame)
    negative = np.flatnonzero(~issame)
    if min(len(positive), len(negative)) < folds <= len(issame):
        raise DataError(
            f"{len(positive)} same and {len(negative)} different pairs, and each of {folds} folds needs both kinds. "
            f"Add pairs."
        )
    fold_sizes = _fold_sizes(len(issame), folds)
    positive_sizes = _fold_sizes(len(positive), folds)
    negative_sizes = fold_sizes - positive_sizes  # differ by one at most, like the other two
    slots = np.concatenate([_slots(positive_sizes), _slots(negative_sizes)])
    order = np.concatenate([positive, negative])[np.argsort(slots, kind="stable")]
    contiguous_folds(issame[order], folds)  # raises if no order helps: fewer pairs than folds
    return order


def _fold_sizes(count: int, folds: int) -> np.ndarray:
    """Return the sizes (folds,) of the parts that np.array_split cuts `count` pairs into."""
    return count // folds + (np.arange(folds) < count % folds)


def _slots(sizes: np.ndarray) -> np.ndarray:
    """Return positions for sizes[k] pairs of each fold k, spread evenly from k to k + 1."""
    return np.concatenate([fold + (np.arange(size) + 0.5) / size for fold, size in enumerate(sizes)])


def iter_images(pairs: PairSet) -> Iterator[np.ndarray]:
    """Yield the 2P images of a set, each (112, 112, 3) RGB uint8."""
    for start in range(0, 2 * len(pairs), _BLOCK):
        yield from pairs.images(start, min(start + _BLOCK, 2 * len(pairs)))
