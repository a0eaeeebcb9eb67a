"""What became of each file of an aligned tree: DEST/manifest.csv, and DEST/align.json with the settings that made it.

The manifest is written as the work goes on, and is how a run that was killed knows what is left. Its columns:

    path        the photograph, relative to the source
    status      aligned, no face, unreadable, or not an image
    output      the aligned face, relative to the destination
    faces       how many faces were found
    x1 … y2     the face's box, in pixels of the upright photograph
    score       the probability of a face
    left_eye_x … mouth_right_y
    reason      why there is no aligned face

A photograph has one line, or one for each of its faces where all are kept. Names that are not UTF-8 keep their bytes.
"""

import csv
import json
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
from util.errors import DataError, UsageError
from util.files import atomic_write

ALIGNED, NO_FACE, UNREADABLE, NOT_AN_IMAGE = "aligned", "no face", "unreadable", "not an image"
FILE, SETTINGS_FILE = "manifest.csv", "align.json"
_POINTS = [
    f"{point}_{axis}" for point in ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right") for axis in "xy"
]
COLUMNS = ["path", "status", "output", "faces", "x1", "y1", "x2", "y2", "score", *_POINTS, "reason"]


@dataclass(frozen=True)
class Row:
    """A line of the manifest. `face` is there when the status is "aligned"."""

    path: str
    status: str
    output: str = ""
    faces: int = 0
    face: Face | None = None
    reason: str = ""

    def cells(self) -> list[str]:
        numbers = [""] * 15
        if self.face:
            box, points = (f"{value:.3f}" for value in self.face.box), (f"{x:.3f}" for x in self.face.landmarks.flat)
            numbers = [*box, f"{self.face.score:.6f}", *points]
        return [self.path, self.status, self.output, str(self.faces), *numbers, self.reason]

    @staticmethod
    def of(cells: list[str]) -> "Row":
        """The row of its cells; ValueError if they are not those of a row."""
        if len(cells) != len(COLUMNS):
            raise ValueError("not a whole line")
        path, status, output, faces, *numbers, reason = cells
        face = None
        if any(numbers):
            values = np.array([float(number) for number in numbers])
            face = Face(values[:4], float(values[4]), values[5:].reshape(5, 2))
        return Row(path, status, output, int(faces), face, reason)


def read_manifest(dest: Path) -> Iterator[Row]:
    """The rows of DEST/manifest.csv, without a last one that was being written when the run was killed.

    Raises DataError if the file is missing or is not a manifest.
    """
    path = dest / FILE
    try:
        with _open(path, "r") as file:
            lines = csv.reader(file)
            if next(lines, None) != COLUMNS:
                raise DataError(f"{path}: not the manifest of an alignment; remove it, or name another folder")
            ahead = next(lines, None)
            while ahead is not None:
                cells, ahead = ahead, next(lines, None)
                try:
                    yield Row.of(cells)
                except ValueError as error:
                    if ahead is not None:
                        raise DataError(
                            f"{path}: line {lines.line_num - 1} is damaged ({error}); start over with --force"
                        ) from None
    except FileNotFoundError:
        raise DataError(f"{path}: missing; align the photographs first") from None


def _open(path: Path, mode: str) -> Any:
    return path.open(mode, encoding="utf-8", errors="surrogateescape", newline="")


class Manifest(AbstractContextManager):
    """The manifest of a run in progress: `done`, the paths that need no more work, and `counts` of each status."""

    def __init__(self, dest: Path, settings: dict[str, Any], force: bool = False):
        """Opens or begins DEST/manifest.csv. What was aligned with other settings raises UsageError; with `force`, what
        was aligned before is removed."""
        dest.mkdir(parents=True, exist_ok=True)
        self.done: set[str] = set()
        self.counts: Counter[str] = Counter()
        path = dest / FILE
        if force:
            _remove(dest)
        elif path.exists():
            _check_settings(dest, settings)
        with atomic_write(dest / SETTINGS_FILE) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
        with atomic_write(path) as partial, _open(partial, "w") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for rows in _rows_that_hold(dest) if path.exists() else ():
                writer.writerows(row.cells() for row in rows)
                self._note(rows)
        self._file = _open(path, "a")
        self._writer = csv.writer(self._file)

    def add(self, rows: Iterable[Row]) -> None:
        """Writes rows down, so that they hold whatever happens next; those of one photograph together."""
        rows = list(rows)
        self._writer.writerows(row.cells() for row in rows)
        self._file.flush()
        self._note(rows)

    def _note(self, rows: list[Row]) -> None:
        for row in rows:
            if row.path not in self.done:
                self.counts[row.status] += 1
                self.done.add(row.path)

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _rows_that_hold(dest: Path) -> Iterator[list[Row]]:
    """The rows of each photograph of an earlier run, but for those that are to be tried again: an unreadable file may
    have been mended, an aligned face removed."""
    for _, group in groupby(read_manifest(dest), key=lambda row: row.path):
        rows = list(group)
        if all(
            row.status != UNREADABLE and (row.status != ALIGNED or os.path.exists(dest / row.output)) for row in rows
        ):
            yield rows


def _check_settings(dest: Path, settings: dict[str, Any]) -> None:
    path = dest / SETTINGS_FILE
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UsageError(f"{path}: missing or damaged, beside a {FILE}; add --force to start over") from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise UsageError(
                f"{dest}: holds faces that were aligned with {name} {before.get(name)}, not {value}; name another "
                f"folder, or add --force to start over"
            )


def _remove(dest: Path) -> None:
    """Removes the faces of an earlier run that its manifest names, and the manifest: nothing else in the folder."""
    with suppress(DataError):  # one that is missing or cannot be read names nothing
        for row in read_manifest(dest):
            if row.output and ".." not in Path(row.output).parts and not Path(row.output).is_absolute():
                (dest / row.output).unlink(missing_ok=True)
    (dest / FILE).unlink(missing_ok=True)
