"""Verification sets as a folder of aligned faces and a text file that lists the pairs, in one of two forms.

LFW's pairs.txt (http://vis-www.cs.umass.edu/lfw/README.txt): a header `10 300` (folds, pairs of each kind in a fold),
`300`, or none; then `NAME 1 4` for images NAME/NAME_0001 and NAME/NAME_0004 of one person, and `NAME 1 OTHER 2` for
two people. Or a plain list: `PATH PATH 1` for the same person, `PATH PATH 0` for different ones. Columns are separated
by tabs, commas or spaces. Images may be named without their suffix.
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
from util.pairs.images import FACE_SIZE, decode_pair_image


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images, as the list names them (LFW's NAME 4 as NAME/NAME_0004), and the line that says so."""

    first: str
    second: str
    same: bool
    line: int


class ListPairs:
    """The pairs of a text file, with images in `root`, or in the list's own folder.

    DataError at opening if a line cannot be understood, or an image is missing; or the first or last image is none.
    """

    def __init__(self, path: Path, root: Path | None = None):
        self.name = path.stem
        pairs = read_pair_list(path)
        self.issame = np.array([pair.same for pair in pairs], dtype=bool)  # (P,)
        self._files = find_images(path, path.parent if root is None else root, pairs)
        for file in (self._files[0], self._files[-1]):
            _read_face(file)

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        images = np.empty((stop - start, FACE_SIZE, FACE_SIZE, 3), np.uint8)
        for index in range(start, stop):
            images[index - start] = _read_face(self._files[index])
        return images


def _read_face(file: str) -> np.ndarray:
    try:
        encoded = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); restore it") from None
    return decode_pair_image(encoded, file)


def read_pair_list(path: Path) -> list[Pair]:
    """The pairs of a list in the order of the file. DataError names file and line."""
    rows = _rows(path)
    header = [int(word) for word in rows[0][1]] if rows and _is_header(rows[0][1]) else None
    rows = rows[1:] if header else rows
    official = header or any(len(row) == 4 and _are_numbers(row[1], row[3]) for _, row in rows)
    pairs = [(_official_pair if official else _plain_pair)(path, line, row) for line, row in rows]
    if not pairs:
        raise DataError(f"{path}: lists no pairs; write lines like `ann/1.jpg bob/1.jpg 0`")
    if header:
        _check_count(path, header, len(pairs))
    return pairs


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number from 1, columns) of the lines that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(
            f"{path}: not a verification set: neither a bcolz folder, nor a .bin of InsightFace (a pickle), nor a list "
            f"of pairs (text in UTF-8)"
        )
    return [(number, _columns(line)) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _columns(line: str) -> list[str]:
    """Names may hold spaces where tabs or commas separate them."""
    separator = "\t" if "\t" in line.strip() else "," if line.count(",") == 2 else None
    return [word.strip() for word in line.strip().split(separator)]


def _is_header(row: list[str]) -> bool:
    return len(row) in (1, 2) and _are_numbers(*row)


def _are_numbers(*words: str) -> bool:
    return all(re.fullmatch("[0-9]{1,9}", word) for word in words)


def _check_count(path: Path, header: list[int], found: int) -> None:
    *folds, per_kind = header
    promised = 2 * per_kind * (folds[0] if folds else max(1, -(-found // max(1, 2 * per_kind))))
    if found != promised:
        raise DataError(
            f"{path}: its first line ({' '.join(map(str, header))}) promises {promised} pairs, and {found} follow; "
            f"copy it again, or correct that line"
        )


def _official_pair(path: Path, line: int, row: list[str]) -> Pair:
    if len(row) not in (3, 4) or not _are_numbers(row[1], row[-1]):
        raise DataError(
            f"{path}, line {line}: must be `NAME 1 4` or `NAME 1 OTHER 2`, as in LFW's pairs.txt, and is "
            f"{' '.join(row)[:200]!r}"
        )
    first, second = row[0], row[-2] if len(row) == 4 else row[0]
    return Pair(_lfw_image(first, row[1]), _lfw_image(second, row[-1]), len(row) == 3, line)


def _lfw_image(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def _plain_pair(path: Path, line: int, row: list[str]) -> Pair:
    if len(row) != 3 or row[2] not in ("0", "1") or not row[0] or not row[1]:
        raise DataError(
            f"{path}, line {line}: must be two images and then 1 (same person) or 0, separated by tabs, commas or "
            f"spaces (names with spaces: by tabs or commas), and is {' '.join(row)[:200]!r}"
        )
    return Pair(row[0], row[1], row[2] == "1", line)


def find_images(path: Path, root: Path, pairs: Iterable[Pair]) -> list[str]:
    """The 2P files of the pairs, with the suffixes that the list may leave out.

    DataError counts the images that are not in `root` and names the first, and its line in the list `path`.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, and the images of {path} should be in it; correct the path")
    files, missing = [], {}
    for pair in pairs:
        for name in (pair.first, pair.second):
            place = root / name
            file = _listing(place.parent).get(place.name)
            files.append(str(place.parent / (file or "")))
            if file is None:
                missing.setdefault(name, pair.line)
    _listing.cache_clear()
    if missing:
        name, line = next(iter(missing.items()))
        raise DataError(
            f"{path}: {len(missing)} of its images are not in {root}, first {name} (line {line}); name the folder "
            f"of aligned faces that the names begin in (--val_data takes LIST:FOLDER), or align those that are missing"
        )
    return files


@cache
def _listing(folder: Path) -> dict[str, str]:
    """{name with or without suffix: name} of the images in a folder. Of two that differ in suffix, IMAGE_SUFFIXES'."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    except OSError:
        return {}
    images = {name: os.path.splitext(name)[1].lower() for name in names}
    images = {name: IMAGE_SUFFIXES.index(suffix) for name, suffix in images.items() if suffix in IMAGE_SUFFIXES}
    without_suffix = {os.path.splitext(name)[0]: name for name in sorted(images, key=images.get, reverse=True)}
    return without_suffix | {name: name for name in names}
