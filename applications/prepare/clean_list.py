"""The list of what was found in a training set: kinds of findings, and a CSV file that people can shorten."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from util.errors import DataError
from util.files import atomic_write

if TYPE_CHECKING:
    from util.data.loader import TrainingImages

MISLABELED, OUTLIER, TWO_NAMES, DUPLICATE = "mislabeled", "outlier", "two_names", "duplicate"
VERIFICATION = "verification"
KINDS = (MISLABELED, OUTLIER, TWO_NAMES, DUPLICATE, VERIFICATION)
COLUMNS = ("kind", "person", "image", "other_person", "other_image", "cosine", "own_cosine")


@dataclass(frozen=True)
class Row:
    """A line of the list: a finding with names instead of positions. A finding about a person has no image."""

    kind: str
    person: str
    image: str
    other_person: str
    other_image: str
    cosine: str
    own_cosine: str


def image_name(images: TrainingImages, index: int) -> str:
    """Return the place of an image in its set: PERSON/IMAGE.jpg, or "record 17" of a .rec file."""
    return images.where(index).removeprefix(f"{images.root}/").removeprefix(f"{images.root}: ")


def write_list(file: Path, rows: list[Row]) -> None:
    """Write the findings as CSV. Names that are not UTF-8 keep their bytes."""
    with (
        atomic_write(file) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([[getattr(row, column) for column in COLUMNS] for row in rows])


def read_list(file: Path) -> list[Row]:
    """Read a file that write_list() wrote, perhaps with fewer lines. Raise DataError if it is another file."""
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            header, *lines = list(csv.reader(stream, strict=True)) or [[]]
    except (OSError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error}). Name a file that --findings has written.") from None
    if tuple(header) != COLUMNS:
        raise DataError(f"{file}: its first line is not {','.join(COLUMNS)}. Name a file that --findings has written.")
    for line_number, line in enumerate(lines, 2):
        if line and (len(line) != len(COLUMNS) or line[0] not in KINDS):
            raise DataError(f"{file}, line {line_number}: not a finding. Remove the line, or restore it.")
    return [Row(*line) for line in lines if line]
