"""Read verification sets from a folder of aligned faces and a text file that lists the pairs, in one of two forms.

LFW's pairs.txt (http://vis-www.cs.umass.edu/lfw/README.txt): a header `10 300` (folds, pairs of each kind in a fold),
`300`, or no header; then `NAME 1 4` for images NAME/NAME_0001 and NAME/NAME_0004 of one person, and `NAME 1 OTHER 2`
for two people. Or a plain list: `PATH PATH 1` for the same person, `PATH PATH 0` for different ones, and if wanted the
group of people that the pair belongs to in a fourth column. Columns are separated by tabs, commas or spaces. The
suffixes of the images may be left out.

Or lists of groups, as RFW (Wang et al. 2019) publishes them: GROUP/GROUP_pairs.txt in LFW's form, with the images in
ROOT/GROUP. The folder of RFW has the lists in txts/ and the images in data/.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from util.data.folder_index import IMAGE_SUFFIXES
from util.errors import DataError
from util.pairs.images import PairSet, decode_pair_image, read_regular

_MAX_LIST = 1 << 27  # bytes of a list: more than a million pairs
_MAX_IMAGE = 1 << 26  # bytes of an image file


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images by their names in the list (LFW's NAME 4 as NAME/NAME_0004), the number of the line, and a group."""

    first: str
    second: str
    same: bool
    line: int
    group: str = ""


class ListPairs(PairSet):
    """The pairs of a text file, with images in `root`. Raises DataError for a wrong line or a missing image."""

    def __init__(self, path: Path, root: Path):
        self.name = path.stem
        pairs = read_pair_list(path)
        self.issame = np.array([pair.same for pair in pairs], dtype=bool)  # (P,)
        self._files = find_images(path, root, pairs)
        if any(pair.group for pair in pairs):
            self.groups = np.array([pair.group for pair in pairs])
        self._root = root

    def image_name(self, index: int) -> str:
        return os.path.relpath(self._files[index], self._root)

    def _image(self, index: int) -> np.ndarray:
        file = self._files[index]
        return decode_pair_image(read_regular(Path(file), _MAX_IMAGE, fix="Restore it."), file)


class GroupLists(PairSet):
    """The pairs of the lists of several groups. Raises DataError as ListPairs does, or if there is no list."""

    def __init__(self, folder: Path, root: Path | None):
        self.name = folder.name
        in_txts = (folder / "txts").is_dir()
        lists = group_lists(folder)
        root = root or (folder / "data" if in_txts else folder)
        sets = [ListPairs(file, root / file.parent.name) for file in lists]
        for pairs, file in zip(sets, lists, strict=True):
            pairs.name = file.parent.name
        # A pair's place in its group, from 0 to 1: each of the ten folds then holds the same fold of all groups.
        places = np.concatenate([(np.arange(len(pairs)) + 0.5) / len(pairs) for pairs in sets])
        order = np.argsort(places, kind="stable")
        self.issame = np.concatenate([pairs.issame for pairs in sets])[order]
        names = np.repeat([pairs.name for pairs in sets], [len(pairs) for pairs in sets])
        self.groups = names[order]
        members = [(pairs, 2 * number) for pairs in sets for number in range(len(pairs))]
        self._members = [members[number] for number in order]

    def image_name(self, index: int) -> str:
        pairs, first = self._members[index // 2]
        return os.path.join(pairs.name, pairs.image_name(first + index % 2))

    def _image(self, index: int) -> np.ndarray:
        pairs, first = self._members[index // 2]
        return pairs._image(first + index % 2)


def group_lists(folder: Path) -> list[Path]:
    """Return the lists GROUP/GROUP_pairs.txt in a folder, or in its folder txts."""
    place = folder / "txts" if (folder / "txts").is_dir() else folder
    return sorted(file for file in place.glob("*/*_pairs.txt") if file.name == f"{file.parent.name}_pairs.txt")


def read_pair_list(path: Path) -> list[Pair]:
    """Read the pairs of a list in the order of the file. Raise DataError, with file and line, if that fails."""
    rows = _read_rows(path)
    header = None
    if rows and len(rows[0][1]) in (1, 2) and _are_numbers(*rows[0][1]):
        header = [int(word) for word in rows[0][1]]
        rows = rows[1:]
    is_lfw_form = header or any(len(row) == 4 and _are_numbers(row[1], row[3]) for _, row in rows)
    pairs = []
    for line, row in rows:
        if is_lfw_form and len(row) in (3, 4) and _are_numbers(row[1], row[-1]):
            other = row[2] if len(row) == 4 else row[0]
            first = f"{row[0]}/{row[0]}_{int(row[1]):04d}"
            second = f"{other}/{other}_{int(row[-1]):04d}"
            pairs.append(Pair(first, second, same=len(row) == 3, line=line))
        elif not is_lfw_form and len(row) in (3, 4) and all(row) and row[2] in ("0", "1") and row[-1].isprintable():
            pairs.append(Pair(row[0], row[1], same=row[2] == "1", line=line, group="".join(row[3:])))
        else:
            form = (
                "two images and then 1 (same person) or 0, and a group if wanted, separated by tabs or commas, or by "
                "spaces that no name has"
            )
            if is_lfw_form:
                form = "`NAME 1 4` or `NAME 1 OTHER 2`, as in LFW's pairs.txt"
            raise DataError(f"{path}, line {line}: must be {form}, and is {' '.join(row)[:200]!r}. Correct the line.")
    if not pairs:
        raise DataError(f"{path}: lists no pairs. Write lines like `ann/1.jpg bob/1.jpg 0`.")
    if header:
        *folds, per_kind = header
        # Without the number of folds, any complete number of folds is right.
        fold_count = folds[0] if folds else max(1, -(-len(pairs) // max(1, 2 * per_kind)))
        promised = 2 * per_kind * fold_count
        if len(pairs) != promised:
            raise DataError(
                f"{path}: its first line ({' '.join(map(str, header))}) promises {promised} pairs, and {len(pairs)} "
                f"follow. Copy it again, or correct that line."
            )
    return pairs


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return (line number from 1, columns) of each line that is not empty."""
    try:
        text = read_regular(path, _MAX_LIST, fix="Restore it.").decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(
            f"{path}: not a verification set. Name a bcolz folder, a .bin of InsightFace (a pickle), or a list of "
            f"pairs (text in UTF-8)."
        )
    rows = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if line := line.strip():
            # With tabs or two commas, names may hold spaces. A third comma comes before a group.
            commas = re.fullmatch(r"[^,]*,[^,]*,\s*[01]\s*(,[^,]*)?", line) or line.count(",") == 2
            separator = "\t" if "\t" in line else "," if commas else None
            rows.append((number, [word.strip() for word in line.split(separator)]))
    return rows


def _are_numbers(*words: str) -> bool:
    return all(re.fullmatch("[0-9]{1,9}", word) for word in words)


def find_images(path: Path, root: Path, pairs: Iterable[Pair]) -> list[str]:
    """Return the 2P image files of the pairs, with the suffixes that the list leaves out.

    Args:
        path: the list, for messages.
        root: the folder that the names in the list start from.
        pairs: the pairs of the list.

    Raises:
        DataError: images are missing; names their number, the first of them and its line.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder, but the images of {path} should be in it. Correct the path.")
    files: list[str] = []
    missing: dict[str, int] = {}  # {name: line}
    for pair in pairs:
        for name in (pair.first, pair.second):
            place = root / name
            file = _list_images(place.parent).get(place.name)
            if file is None:
                missing.setdefault(name, pair.line)
            else:
                files.append(str(place.parent / file))
    _list_images.cache_clear()
    if missing:
        name, line = next(iter(missing.items()))
        raise DataError(
            f"{path}: {len(missing)} of its images are not in {root}, first {name:.200} (line {line}). Name the folder "
            f"of aligned faces that the names start from (--val_data takes LIST:FOLDER), or align the missing images."
        )
    return files


@cache
def _list_images(folder: Path) -> dict[str, str]:
    """Return {name with or without suffix: name} of the images in a folder.

    If names differ only in their suffix, the name without suffix means the first one in the order of IMAGE_SUFFIXES.
    """
    try:
        with os.scandir(folder) as entries:
            # entry.is_file() alone raises OSError for a link to itself, which would hide all images.
            names = sorted(file.name for file in entries if file.is_file(follow_symlinks=False) or os.path.isfile(file))
    except OSError:
        return {}
    images: dict[str, str] = {}
    for suffix in IMAGE_SUFFIXES:
        for name in names:
            stem, own_suffix = os.path.splitext(name)
            if own_suffix.lower() == suffix:
                images.setdefault(stem, name)
    return images | {name: name for name in names}
