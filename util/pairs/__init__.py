"""Verification sets: 2P face images, of which 2i and 2i + 1 are a pair, and a truth for each pair."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

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
# How pickles begin: in the binary protocols; two lists in the text protocols; and a call, to be refused by name.
_PICKLE = re.compile(rb"\x80|\(?(\(l|\]q|c\w[\w.]*\n\w+\n)")
_BLOCK = 64  # images at a time


class PairSet(Protocol):
    """What evaluation needs of a verification set, whatever its format on the disk."""

    name: str
    issame: np.ndarray  # (P,) bool

    def __len__(self) -> int:
        """The number of pairs P."""
        ...

    def images(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        ...


class PairSubset:
    """Pairs of another set, in an order of their own: `order` (Q,) holds their numbers in that set."""

    def __init__(self, pairs: PairSet, order: np.ndarray):
        self.name, self.issame = pairs.name, pairs.issame[order]
        self._pairs, self._order = pairs, order

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop (counted in images, 0 to 2Q) as (n, 112, 112, 3) RGB uint8."""
        chosen = self._order[start // 2 : -(-stop // 2)].tolist()
        images = np.concatenate([self._pairs.images(2 * pair, 2 * pair + 2) for pair in chosen])
        return images[start % 2 :][: stop - start]


def load_pairs(path: str | Path, root: str | Path | None = None) -> PairSet:
    """Opens a verification set, whose format is told by what is in it; pairs are in the order of the file.

    A folder is a bcolz carray, with the list `path`_list.npy beside it. A file is a .bin of InsightFace, or a list of
    pairs in text, see util/pairs/text_list.py: its images are in `root`, or else in the list's own folder. The other formats
    hold their images. Raises DataError, naming the file and the remedy, for anything that evaluation could not read
    later, but for images in the midst that cannot be decoded.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "meta" / "storage").is_file():
            raise DataError(f"{path}: not a bcolz carray (a folder with meta/ and data/ inside)")
        return CarrayPairs(path)
    if not path.is_file():
        raise DataError(f"{path}: no such verification set; correct the path")
    if _is_pickle(path):
        return BinPairs(path)
    return ListPairs(path, None if root is None else Path(root))


def _is_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _PICKLE.match(file.read(256)) is not None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it") from None


def find_pair_sets(
    data_dir: str | Path, named: Mapping[str, tuple[str, str | None]] | None = None
) -> tuple[list[PairSet], list[str]]:
    """Opens the verification sets that lie under data_dir, then the named ones; and names those that are not there.

    `named` is {name: (path, root)}, for load_pairs; it takes the place of a set of VERIFICATION_SETS of that name, be
    it in capitals or not. Where only named sets are wanted, none of the others counts as missing.
    A set that is there and cannot be read or judged raises DataError: to leave it out quietly would change the average.
    """
    named = named or {}
    replaced = {name.lower() for name in named}
    found, missing = [], []
    for name, places in VERIFICATION_SETS.items():
        if name.lower() in replaced:
            continue
        paths = [Path(data_dir) / place for place in places]
        path = next((path for path in paths if (path / "meta").is_dir() or path.is_file()), None)
        if path is None:
            missing.append(name)
        else:
            found.append(_open(name, path))
    if named and not found:
        missing = []
    return found + [_open(name, path, root) for name, (path, root) in named.items()], missing


def _open(name: str, path: str | Path, root: str | None = None) -> PairSet:
    """The set under a name of its own, in an order that ten folds can judge."""
    pairs = load_pairs(path, root)
    pairs.name = name
    try:
        order = interleaved_order(pairs.issame)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if (order[1:] > order[:-1]).all():
        return pairs
    print(
        f"{name}: cut in ten as it stands, some parts have only same or only different pairs, so both are interleaved"
    )
    return PairSubset(pairs, order)


def interleaved_order(issame: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """(P,) an order of the pairs in which each of the contiguous folds has both kinds: the given one where it has.

    Otherwise each fold gets the same share of same and of different pairs, to within one, and pairs of one kind stay
    in their order: so a set whose files hold five folds, same pairs first, becomes ten halves of those folds.
    DataError if there are fewer of a kind than folds.
    """
    order = np.arange(len(issame))
    with suppress(DataError):
        contiguous_folds(issame, folds)
        return order
    same, different = np.flatnonzero(issame), np.flatnonzero(~issame)
    if min(len(same), len(different)) < folds <= len(issame):
        raise DataError(
            f"{len(same)} same and {len(different)} different pairs, and each of {folds} folds needs both kinds; add "
            f"pairs"
        )
    all_sizes, same_sizes = ([len(part) for part in np.array_split(part, folds)] for part in (order, same))
    different_sizes = np.subtract(all_sizes, same_sizes)  # differ by one at most, as those of the others do
    places = np.concatenate([_places(same_sizes), _places(different_sizes)])
    order = np.concatenate([same, different])[np.argsort(places, kind="stable")]
    contiguous_folds(issame[order], folds)  # for what no order helps: fewer pairs than folds
    return order


def _places(sizes: Iterable[int]) -> np.ndarray:
    """Where so many things for each fold lie, spread evenly over it: fold k is from k to k + 1."""
    return np.concatenate([fold + (np.arange(size) + 0.5) / size for fold, size in enumerate(sizes)])


def iter_images(pairs: PairSet) -> Iterator[np.ndarray]:
    """The 2P images of a set, (112, 112, 3) RGB uint8, one after the other, for those who write it in another form."""
    for start in range(0, 2 * len(pairs), _BLOCK):
        yield from pairs.images(start, min(start + _BLOCK, 2 * len(pairs)))
