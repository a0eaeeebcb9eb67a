"""Read verification sets from a folder of aligned faces and a text file that lists the pairs, in one of two forms.

LFW's pairs.txt (http://vis-www.cs.umass.edu/lfw/README.txt): a header `10 300` (folds, pairs of each kind in a fold),
`300`, or no header; then `NAME 1 4` for images NAME/NAME_0001 and NAME/NAME_0004 of one person, and `NAME 1 OTHER 2`
for two people. Or a plain list: `PATH PATH 1` for the same person, `PATH PATH 0` for different ones. Columns are
separated by tabs, commas or spaces. The suffixes of the images may be left out.
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
from util.face import FACE_SIZE
from util.files import read_bytes
from util.pairs.images import decode_pair_image


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images by their names in the list (LFW's NAME 4 as NAME/NAME_0004), and the number of the line."""

    first: str
    second: str
    same: bool
    line: int


class ListPairs:
    """The pairs of a text file, with images in `root`, or in the list's own folder.

    Raises DataError at opening if a line cannot be parsed, an image is missing, or the first or last image cannot be
    decoded.
    """

    def __init__(self, path: Path, root: Path | None = None):
        self.name = path.stem
        pairs = read_pair_list(path)
        self.issame = np.array([pair.same for pair in pairs], dtype=bool)  # (P,)
        self._files = find_images(path, path.parent if root is None else root, pairs)
        for index in (0, len(self._files) - 1):
            self.images(index, index + 1)

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        files = self._files[start:stop]
        images = np.empty((len(files), FACE_SIZE, FACE_SIZE, 3), np.uint8)
        for index, file in enumerate(files):
            images[index] = decode_pair_image(read_bytes(Path(file), "Restore it."), file)
        return images


def read_pair_list(path: Path) -> list[Pair]:
    """Read the pairs of a list in the order of the file. Raise DataError, with file and line, if that fails."""
    rows = _read_rows(path)
    header = None
    if rows and len(rows[0][1]) in (1, 2) and _are_numbers(*rows[0][1]):
        header = [int(word) for word in rows[0][1]]
        rows = rows[1:]
    is_lfw_form = header or any(len(row) == 4 and _are_numbers(row[1], row[3]) for _, row in rows)
    parse = _parse_lfw_pair if is_lfw_form else _parse_plain_pair
    pairs = [parse(path, line, row) for line, row in rows]
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
        text = read_bytes(path, "Restore it.").decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(
            f"{path}: not a verification set. Name a bcolz folder, a .bin of InsightFace (a pickle), or a list of "
            f"pairs (text in UTF-8)."
        )
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, _split_columns(line.strip())) for number, line in enumerate(lines, start=1) if line.strip()]


def _split_columns(line: str) -> list[str]:
    """Split a line at tabs, else at two commas, else at spaces: with tabs and commas, names may hold spaces."""
    separator = None
    if "\t" in line:
        separator = "\t"
    elif line.count(",") == 2:
        separator = ","
    return [word.strip() for word in line.split(separator)]


def _are_numbers(*words: str) -> bool:
    return all(re.fullmatch("[0-9]{1,9}", word) for word in words)


def _parse_lfw_pair(path: Path, line: int, row: list[str]) -> Pair:
    if len(row) not in (3, 4) or not _are_numbers(row[1], row[-1]):
        raise DataError(
            f"{path}, line {line}: must be `NAME 1 4` or `NAME 1 OTHER 2`, as in LFW's pairs.txt, and is "
            f"{' '.join(row)[:200]!r}. Correct the line."
        )
    other = row[2] if len(row) == 4 else row[0]
    first = f"{row[0]}/{row[0]}_{int(row[1]):04d}"
    second = f"{other}/{other}_{int(row[-1]):04d}"
    return Pair(first, second, same=len(row) == 3, line=line)


def _parse_plain_pair(path: Path, line: int, row: list[str]) -> Pair:
    if len(row) != 3 or row[2] not in ("0", "1") or not row[0] or not row[1]:
        raise DataError(
            f"{path}, line {line}: must be two images and then 1 (same person) or 0, separated by tabs, commas or "
            f"spaces (names with spaces: by tabs or commas), and is {' '.join(row)[:200]!r}. Correct the line."
        )
    return Pair(row[0], row[1], same=row[2] == "1", line=line)


def find_images(path: Path, root: Path, pairs: Iterable[Pair]) -> list[str]:
    """Return the 2P image files of the pairs, with the suffixes that the list leaves out.

    Args:
        path: the list, for messages.
        root: the folder that the names in the list start from.
        pairs: the pairs of the list.

    Raises:
        DataError: images are missing; names their number, the first of them and its line.
    """
    if not root.is_dir():
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
            f"{path}: {len(missing)} of its images are not in {root}, first {name} (line {line}). Name the folder of "
            f"aligned faces that the names start from (--val_data takes LIST:FOLDER), or align the missing images."
        )
    return files


@cache
def _list_images(folder: Path) -> dict[str, str]:
    """Return {name with or without suffix: name} of the images in a folder.

    If names differ only in their suffix, the name without suffix means the first one in the order of IMAGE_SUFFIXES.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
    except OSError:
        return {}
    images: dict[str, str] = {}
    for suffix in IMAGE_SUFFIXES:
        for name in names:
            stem, own_suffix = os.path.splitext(name)
            if own_suffix.lower() == suffix:
                images.setdefault(stem, name)
    return images | {name: name for name in names}
