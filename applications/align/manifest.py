"""Record the result of each file of an aligned tree in DEST/manifest.csv, and the settings in DEST/align.json.

Rows are appended while the program works, so a stopped run knows what is left to do. The columns:

    path        the photograph, relative to the source
    status      aligned, no face, unreadable, or not an image
    output      the aligned face, relative to the destination
    faces       number of faces found
    x1 … y2     the face's box, in pixels of the upright photograph
    score       the probability of a face
    left_eye_x … mouth_right_y
    reason      why no aligned face was written

A photograph has one row, or one row for each face if all faces are kept. Names that are not UTF-8 keep their bytes.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from applications.align.detector import Face
from util.errors import DataError
from util.files import Provenance, atomic_write, path_inside

ALIGNED, NO_FACE, UNREADABLE, NOT_AN_IMAGE = "aligned", "no face", "unreadable", "not an image"
FILE, SETTINGS_FILE = "manifest.csv", "align.json"
_POINTS = [
    f"{point}_{axis}" for point in ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right") for axis in "xy"
]
_NUMBERS = ["x1", "y1", "x2", "y2", "score", *_POINTS]
COLUMNS = ["path", "status", "output", "faces", *_NUMBERS, "reason"]


@dataclass(frozen=True)
class Row:
    """A row of the manifest. `face` is set if the status is "aligned"."""

    path: str
    status: str
    output: str = ""
    faces: int = 0
    face: Face | None = None
    reason: str = ""

    def cells(self) -> list[str]:
        """Return the row as text, one cell for each of COLUMNS."""
        numbers = [""] * len(_NUMBERS)
        if self.face:
            box = [f"{value:.3f}" for value in self.face.box]
            points = [f"{value:.3f}" for value in self.face.landmarks.flat]
            numbers = [*box, f"{self.face.score:.6f}", *points]
        return [self.path, self.status, self.output, str(self.faces), *numbers, self.reason]

    @staticmethod
    def from_cells(cells: list[str]) -> "Row":
        """Parse a row. Raise ValueError if a cell is missing or is not a number where it should be one."""
        if len(cells) != len(COLUMNS):
            raise ValueError("incomplete line")
        path, status, output, faces, *numbers, reason = cells
        face = None
        if any(numbers):
            values = np.array([float(number) for number in numbers])
            face = Face(box=values[:4], score=float(values[4]), landmarks=values[5:].reshape(5, 2))
        return Row(path, status, output, faces=int(faces), face=face, reason=reason)


def read_manifest(dest: Path) -> Iterator[Row]:
    """Yield the rows of DEST/manifest.csv, without a last row that a killed run wrote in part.

    Raises DataError if the file is missing, is not a manifest, or is damaged before its last line.
    """
    path = dest / FILE
    try:
        with _open(path, "r") as file:
            lines = csv.reader(file)
            if next(lines, None) != COLUMNS:
                raise DataError(f"{path}: not the manifest of an alignment. Remove it, or name another folder.")
            # Read one line ahead: only the last one may be incomplete.
            following = next(lines, None)
            while following is not None:
                cells = following
                following = next(lines, None)
                try:
                    yield Row.from_cells(cells)
                except ValueError as error:
                    if following is not None:
                        number = lines.line_num - 1
                        raise DataError(
                            f"{path}: line {number} is damaged ({error}). Start over with --force."
                        ) from None
    except FileNotFoundError:
        raise DataError(f"{path}: missing. Align the photographs first.") from None


def _open(path: Path, mode: str) -> Any:
    return path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")


class Manifest(AbstractContextManager):
    """The manifest of a run. `done` holds the paths that are finished, `counts` the number of files of each status."""

    def __init__(self, dest: Path, settings: dict[str, Any], force: bool = False):
        """Open or create DEST/manifest.csv and DEST/align.json. With `force`, remove the faces of an earlier run first.

        Raises:
            UsageError: an earlier run had other settings.
            DataError: the manifest of an earlier run is damaged, or one of the files is a link out of `dest`.
        """
        dest.mkdir(parents=True, exist_ok=True)
        self.done: set[str] = set()
        self.counts: Counter[str] = Counter()
        path = path_inside(dest, FILE)
        provenance = Provenance(path_inside(dest, SETTINGS_FILE), settings, indent=2)
        if force:
            _remove_faces(dest)
        elif path.exists():
            provenance.check(dest, "Name another folder, or add --force to start over.")
        provenance.write()
        with atomic_write(path) as partial, _open(partial, "w") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            if path.exists():
                for rows in _rows_to_keep(dest):
                    writer.writerows(row.cells() for row in rows)
                    self._count(rows)
        self._file = _open(path, "a")
        self._writer = csv.writer(self._file)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and flush them. All rows of one photograph must come in one call."""
        rows = list(rows)
        self._writer.writerows(row.cells() for row in rows)
        self._file.flush()
        self._count(rows)

    def _count(self, rows: list[Row]) -> None:
        for row in rows:
            if row.path not in self.done:
                self.counts[row.status] += 1
                self.done.add(row.path)

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _rows_to_keep(dest: Path) -> Iterator[list[Row]]:
    """Yield the rows of each photograph that is not tried again.

    A file that was unreadable may have been repaired, and an aligned face may have been removed.
    """
    for _, group in groupby(read_manifest(dest), key=lambda row: row.path):
        rows = list(group)
        is_unreadable = any(row.status == UNREADABLE for row in rows)
        is_missing = any(row.status == ALIGNED and not os.path.exists(dest / row.output) for row in rows)
        if not (is_unreadable or is_missing):
            yield rows


def _remove_faces(dest: Path) -> None:
    """Remove the manifest of an earlier run and the faces listed in it, and no other file."""
    with suppress(DataError):  # a manifest that is missing or damaged lists nothing
        for row in read_manifest(dest):
            with suppress(ValueError):  # a name that leads out of the folder, or that no file can have
                if os.path.isfile(face := path_inside(dest, row.output)):
                    face.unlink()
    (dest / FILE).unlink(missing_ok=True)
