"""Makes verification sets: in an order that ten folds can judge, with the list of their pairs, whole or not at all.

Beside the carray OUT and OUT_list.npy lie OUT_pairs.txt, the pairs in the order of the set (where the images have
names), and OUT.json, which says what the set was made from.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from applications.prepare.align_pairs import AlignedFaces
from util.errors import DataError, UsageError
from util.files import atomic_write, require_writable_dir
from util.pairs import PairSet, PairSubset, interleaved_order, iter_images, load_pairs
from util.pairs.bcolz import write_carray
from util.verification import FOLDS

ListedPair = tuple[str, str, bool]  # two images, and whether they are of one person


def is_made(out: Path, made_from: dict[str, Any], force: bool) -> bool:
    """Whether `out` is a set that was made from exactly this, and is not to be made anew; then that is said.

    UsageError if it is another one, which only `force` replaces, or if it could not be written.
    """
    require_writable_dir("--out", out.parent)
    if force or not out.exists():
        return False
    try:
        before = json.loads(_note(out).read_text())["made from"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    if before == made_from:
        print(f"{out}: was made from this before; nothing to do (--force makes it anew)")
        return True
    raise UsageError(
        f"{out}: is there already, and was not made from this; name another place, or add --force to replace it"
    )


def new_order(source: Path, issame: np.ndarray, equal_shares: bool = False) -> np.ndarray:
    """(P,) the order in which the pairs of `source` become a set: the given one where ten folds can judge it.

    With `equal_shares`, only where each tenth has the same share of same and of different pairs, to within one.
    Otherwise both kinds are interleaved, see util.pairs.interleaved(). DataError if there are fewer than ten of a kind.
    """
    shares = [int(part.sum()) for part in np.array_split(issame, FOLDS)]
    try:
        if equal_shares and max(shares) - min(shares) > 1:
            by_kind = np.argsort(~issame, kind="stable")  # same pairs first, which cannot be judged as it stands
            return by_kind[interleaved_order(issame[by_kind])]
        return interleaved_order(issame)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def write_aligned(
    out: Path, aligned: AlignedFaces, pairs: Sequence[ListedPair], order: np.ndarray, made_from: dict[str, Any]
) -> None:
    """Writes pairs of photographs, whose faces are aligned, as the set `out` in that order, with its list of pairs."""
    face = aligned.files
    chosen = [(face[first], face[second], same) for first, second, same in (pairs[index] for index in order.tolist())]
    notes = {"images in": str(aligned.root), "found at lower thresholds": aligned.low, "not found": aligned.cut}
    with atomic_write(list_file(out)) as listed:
        listed.write_text("".join(f"{first}\t{second}\t{same:d}\n" for first, second, same in chosen))
        write_set(out, load_pairs(listed, aligned.root), np.arange(len(chosen)), made_from, notes)


def write_set(out: Path, pairs: PairSet, order: np.ndarray, made_from: dict[str, Any], notes: dict[str, Any]) -> None:
    """Writes the pairs in that order as the carray `out`, and last the note about what they are from."""
    if is_reordered(order):
        pairs = PairSubset(pairs, order)
    images = tqdm(iter_images(pairs), f"writing {out.name}", 2 * len(pairs), unit="image")
    write_carray(out, images, pairs.issame)
    note = {"made from": made_from, "pairs": len(pairs), "same": int(pairs.issame.sum()), **notes}
    with atomic_write(_note(out)) as partial:
        partial.write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n")


def is_reordered(order: np.ndarray) -> bool:
    return bool((order[1:] < order[:-1]).any())


def list_file(out: Path) -> Path:
    """Where the pairs of a set are listed, in its order."""
    return out.with_name(f"{out.name}_pairs.txt")


def _note(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")
