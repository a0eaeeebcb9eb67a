"""Write verification sets atomically, in an order that can be divided into ten folds.

A set is the carray OUT with OUT_list.npy. OUT_pairs.txt lists the pairs in the order of the set, if the images have
names, and OUT.json records what the set was made from.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from applications.prepare.align_pairs import AlignedFaces
from util.errors import DataError, UsageError
from util.files import Provenance, atomic_write, path_inside, require_writable_dir
from util.pairs import PairSet, PairSubset, interleaved_order, iter_images, load_pairs
from util.pairs.bcolz import write_carray
from util.pairs.text_list import find_images, read_pair_list
from util.verification import FOLDS

ListedPair = tuple[str, str, bool]  # two images, and whether they are of one person


def is_made(out: Path, made_from: dict[str, Any], force: bool) -> bool:
    """Return whether `out` is a set made from exactly `made_from`, which OUT.json records, and print it.

    Raises:
        UsageError: `out` is another set and `force` is not given, or `out` cannot be written.
        DataError: `out` or a file next to it is a link out of its folder.
    """
    require_writable_dir("--out", out.parent)
    for path in (out, out.with_name(f"{out.name}_list.npy"), list_file(out), _note(out)):
        path_inside(out.parent, path.name)
    if force or not out.exists():
        return False
    if Provenance(_note(out), {"made from": made_from}).matches():
        print(f"{out}: was made from this before; nothing to do (--force makes it again)")
        return True
    raise UsageError(f"{out}: exists, and was made from something else. Name another place, or add --force.")


def read_rows(listed: Path, images: Path) -> list[ListedPair]:
    """Read a list of pairs, with its images relative to the folder `images`. Raise DataError if one is missing."""
    pairs = read_pair_list(listed)
    names = [os.path.relpath(file, images) for file in find_images(listed, images, pairs)]
    return [(first, second, pair.same) for first, second, pair in zip(names[::2], names[1::2], pairs, strict=True)]


def new_order(source: Path, pairs: Sequence[ListedPair] | np.ndarray, balanced: bool = False) -> np.ndarray:
    """Return (P,) the order in which the pairs of a list become a set.

    The order of the list is kept if each of the ten folds has both kinds of pairs; with `balanced`, only if the folds
    have equal numbers of same pairs, to within one. Otherwise same and different pairs are interleaved, see
    util.pairs.interleaved_order(). Raises DataError if there are fewer than ten pairs of a kind.
    """
    issame = pairs if isinstance(pairs, np.ndarray) else np.array([same for *_, same in pairs])
    same_counts = [int(fold.sum()) for fold in np.array_split(issame, FOLDS)]
    try:
        if balanced and max(same_counts) - min(same_counts) > 1:
            # Sorted by kind, the folds have one kind each, which interleaved_order() then mixes evenly.
            by_kind = np.argsort(~issame, kind="stable")
            return by_kind[interleaved_order(issame[by_kind])]
        return interleaved_order(issame)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def write_aligned(
    out: Path, aligned: AlignedFaces, pairs: Sequence[ListedPair], order: np.ndarray, made_from: dict[str, Any]
) -> None:
    """Write the aligned faces of P pairs of photographs as a set, list its pairs, and print what was done.

    `order` has (P,) indices into `pairs`, and `made_from` is recorded in OUT.json.
    """
    lines = []
    for index in order.tolist():
        first, second, same = pairs[index]
        lines.append(f"{aligned.files[first]}\t{aligned.files[second]}\t{same:d}\n")
    notes = {"images in": str(aligned.root), "found at lower thresholds": aligned.low, "not found": aligned.cut}
    with atomic_write(list_file(out)) as listed:
        listed.write_text("".join(lines))
        pair_set = load_pairs(listed, aligned.root)
        write_set(out, pair_set, np.arange(len(lines)), made_from=made_from, notes=notes)
    print(f"{out}: {len(lines)} pairs of images in {aligned.source}, listed in {list_file(out)}")
    for line in aligned.lines():
        print(line)
    if is_reordered(order):
        print("same and different pairs are interleaved, because the ten folds of the list would be unequal")


def write_set(out: Path, pairs: PairSet, order: np.ndarray, made_from: dict[str, Any], notes: dict[str, Any]) -> None:
    """Write P pairs, in `order` (P,), as the carray `out`, and then OUT.json with `made_from` and `notes`."""
    if is_reordered(order):
        pairs = PairSubset(pairs, order)
    _note(out).unlink(missing_ok=True)  # a set with a note is complete, also after a kill
    images = tqdm(iter_images(pairs), f"writing {out.name}", 2 * len(pairs), unit="image")
    write_carray(out, images, pairs.issame)
    note = {"made from": made_from, "pairs": len(pairs), "same": int(pairs.issame.sum()), **notes}
    Provenance(_note(out), note, indent=1).write()


def is_reordered(order: np.ndarray) -> bool:
    """Return whether the order differs from the order of the list."""
    return bool((order[1:] < order[:-1]).any())


def list_file(out: Path) -> Path:
    """Return the path of the list of a set's pairs."""
    return out.with_name(f"{out.name}_pairs.txt")


def _note(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")
