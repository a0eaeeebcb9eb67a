"""Verification sets: 2P face images, of which 2i and 2i + 1 are a pair, and a truth for each pair."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from util.console import logger
from util.errors import DataError
from util.pairs.bcolz import CarrayPairs
from util.pairs.bin import BIN_LIMIT, BinPairs
from util.pairs.images import PairSet, read_regular
from util.pairs.text_list import GroupLists, ListPairs, group_lists
from util.verification import FOLDS, contiguous_folds

# Where the sets lie under data_dir, in the order in which they are reported: bcolz folders, InsightFace's .bin files,
# or LIST:ROOT. If one of the first four is missing, that is reported.
VERIFICATION_SETS = {
    "LFW": ("lfw_align_112/lfw", "lfw.bin"),
    "CFP_FF": ("cfp_align_112/cfp_ff", "cfp_ff.bin"),
    "CFP_FP": ("cfp_align_112/cfp_fp", "cfp_fp.bin"),
    "AgeDB": ("AgeDB/agedb_30", "agedb_30/agedb_30", "agedb_30", "agedb_30.bin"),
    "CALFW": ("calfw_align_112/calfw", "calfw/calfw", "calfw", "calfw.bin"),
    "CPLFW": ("cplfw_align_112/cplfw", "cplfw/cplfw", "cplfw", "cplfw.bin"),
    "VGG2_FP": ("vgg2_fp_align_112/vgg2_fp", "vgg2_fp/vgg2_fp", "vgg2_fp", "vgg2_fp.bin"),
    "XQLFW": ("xqlfw_pairs.txt:xqlfw_aligned_112", "xqlfw/xqlfw_pairs.txt:xqlfw/xqlfw_aligned_112", "xqlfw.bin"),
}
USUAL_SETS = tuple(VERIFICATION_SETS)[:4]
# How pickles begin: in the binary protocols; two lists in the text protocols; a call, which is refused by name later.
_PICKLE = re.compile(rb"\x80|\(?(\(l|\]q|c\w[\w.]*\n\w+\n)")


class PairSubset(PairSet):
    """Some pairs of another set, in any order: `order` (Q,) holds their numbers in that set."""

    def __init__(self, pairs: PairSet, order: np.ndarray):
        self.name = pairs.name
        self.issame = pairs.issame[order]
        if pairs.groups is not None:
            self.groups = pairs.groups[order]
        self._pairs = pairs
        self._order = order

    def image_name(self, index: int) -> str:
        return self._pairs.image_name(self._number(index))

    def _image(self, index: int) -> np.ndarray:
        number = self._number(index)
        return self._pairs.images(number, number + 1)[0]

    def _number(self, index: int) -> int:
        return 2 * int(self._order[index // 2]) + index % 2


def load_pairs(path: str | Path, root: str | Path | None = None) -> PairSet:
    """Open a verification set. Its content tells its format; the pairs have the order of the file.

    Args:
        path: a bcolz folder, with the list `path`_list.npy next to it; a .bin file of InsightFace; a list of pairs in
            text, or a folder with lists of groups, see util/pairs/text_list.py.
        root: the folder with the images of text lists; None for the list's own folder, or RFW's folder data. Other
            formats ignore it.

    Raises:
        DataError: the set cannot be read. Images between the first and the last one are decoded when they are read.
    """
    path = Path(path)
    if os.path.isfile(path / "meta" / "storage"):
        return CarrayPairs(path)  # which decodes its first and last image
    if os.path.isdir(path):
        if not group_lists(path):
            raise DataError(
                f"{path}: not a bcolz carray, nor lists of groups. Name a folder with meta/ and data/ in it, or with "
                f"GROUP/GROUP_pairs.txt."
            )
        pairs: PairSet = GroupLists(path, None if root is None else Path(root))
    elif not os.path.exists(path):
        raise DataError(f"{path}: no such verification set. Correct the path.")
    elif _PICKLE.match(read_regular(path, BIN_LIMIT, fix="Name another file.", length=256)):
        pairs = BinPairs(path)
    else:
        pairs = ListPairs(path, path.parent if root is None else Path(root))
    for index in (0, 2 * len(pairs) - 1):
        pairs.images(index, index + 1)
    return pairs


def locate_sets(data_dir: str | Path) -> dict[str, tuple[str, str | None]]:
    """Return {name: (path, folder of the images or None)} of the sets of VERIFICATION_SETS that exist."""
    located = {}
    for name, places in VERIFICATION_SETS.items():
        for place in places:
            path, *root = (str(Path(data_dir, part)) for part in place.split(":"))
            if os.path.isdir(Path(path, "meta")) or (os.path.isfile(path) and all(map(os.path.isdir, root))):
                located[name] = path, root[0] if root else None
                break
    return located


def find_pair_sets(
    data_dir: str | Path, extra_sets: Mapping[str, tuple[str, str | None]] | None = None
) -> tuple[list[PairSet], list[str]]:
    """Open the verification sets under data_dir, then the extra sets.

    Args:
        data_dir: the folder with the sets of VERIFICATION_SETS.
        extra_sets: {name: (path, root)} for load_pairs. An extra set replaces the set of VERIFICATION_SETS with the
            same name, in any case.

    Returns:
        The sets, and the names of USUAL_SETS that do not exist. If there are only extra sets, no set counts as missing.

    Raises:
        DataError: a set exists and cannot be evaluated. Leaving it out silently would change the average.
    """
    extra_sets = extra_sets or {}
    replaced = {name.lower() for name in extra_sets}
    places = {name: place for name, place in locate_sets(data_dir).items() if name.lower() not in replaced}
    found = [_open(name, path, root) for name, (path, root) in places.items()]
    missing = [name for name in USUAL_SETS if name not in places and name.lower() not in replaced]
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
    logger.info(f"{name}: some of the ten folds would contain only positive or only negative pairs; interleaving them")
    return PairSubset(pairs, order)


def interleaved_order(issame: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Return an order (P,) of the pairs in which each of the contiguous folds has positive and negative pairs.

    The given order is kept if its folds have both kinds. Otherwise all folds get the same number of positive pairs, to
    within one, and of negative pairs. Pairs of one kind stay in their order: a set of five folds with the positive
    pairs first becomes ten halves of these folds. Raises DataError if there are fewer pairs of a kind than folds.
    """
    with suppress(DataError):
        contiguous_folds(issame, folds)
        return np.arange(len(issame))
    positive = np.flatnonzero(issame)
    negative = np.flatnonzero(~issame)
    if min(len(positive), len(negative)) < folds <= len(issame):
        counts = f"{len(positive)} same and {len(negative)} different pairs"
        raise DataError(f"{counts}, and each of {folds} folds needs both kinds. Add pairs.")
    fold_sizes, positive_sizes = (
        np.bincount(np.arange(count) % folds, minlength=folds) for count in (len(issame), len(positive))
    )
    # The pairs of fold k get places that are spread evenly from k to k + 1: the positive ones, and the negative ones.
    # The numbers of negative pairs differ by one at most, because the numbers of all pairs and of positive pairs do.
    places = [
        fold + (np.arange(size) + 0.5) / size
        for sizes in (positive_sizes, fold_sizes - positive_sizes)
        for fold, size in enumerate(sizes)
    ]
    order = np.concatenate([positive, negative])[np.argsort(np.concatenate(places), kind="stable")]
    contiguous_folds(issame[order], folds)  # raises if no order helps: fewer pairs than folds
    return order


def iter_images(pairs: PairSet) -> Iterator[np.ndarray]:
    """Yield the 2P images of a set, each (112, 112, 3) RGB uint8."""
    for index in range(2 * len(pairs)):
        yield pairs.images(index, index + 1)[0]
