"""Align the faces of all photographs of a verification set.

Published figures are computed on all pairs of a protocol. The photographs in which no detector finds a face are the
hard ones, and leaving them out would improve the figures. So these photographs are searched again with lower
thresholds. If this finds no face either, a crop at a fixed place is used.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from applications.align.batch import AlignSettings, align_tree
from applications.align.detector import THRESHOLDS, Face
from applications.align.manifest import ALIGNED, NO_FACE, read_manifest
from util.errors import DataError
from util.face import FACE_SIZE
from util.files import format_names, path_inside
from util.image_io import read_photo, write_image
from util.image_tree import printable

# {folder: thresholds}. Each pass has its own folder and manifest, so that a stopped run can continue.
DETECTION_PASSES = {"found": THRESHOLDS, "found_low": (0.4, 0.5, 0.5)}
FALLBACK_FOLDER = "not_found"
_IN_ERRORS = 3  # photographs listed in an error
_IN_SUMMARY = 10  # and in a summary; the note next to the set lists all


@dataclass
class AlignedFaces:
    """The aligned faces of a set."""

    source: Path  # folder of the photographs
    root: Path  # folder of the aligned faces
    files: dict[str, str] = field(default_factory=dict)  # {photograph in `source`: aligned face in `root`}
    low: list[str] = field(default_factory=list)  # photographs whose face was found only at lower thresholds
    cut: list[str] = field(default_factory=list)  # photographs without a face, for which a fallback crop was used
    fallback: str = "the full image"  # what was used of these photographs, for the console

    def lines(self) -> list[str]:
        """Return console lines about faces that the first pass did not find."""
        lines = []
        if self.low:
            thresholds = " ".join(map(str, DETECTION_PASSES["found_low"]))
            photos = _format_photographs(self.low, _IN_SUMMARY)
            lines.append(f"face found only at lower thresholds ({thresholds}) in {photos}")
        if self.cut:
            lines.append(f"no face found: used {self.fallback} of {_format_photographs(self.cut, _IN_SUMMARY)}")
        return lines


def align_all(
    source: Path,
    photographs: Sequence[str],
    root: Path,
    fallback_crop: Callable[[np.ndarray], np.ndarray] | None,
    *,
    listed: Path | str = "",
    select: str = "central",
    accept_face: Callable[[Face], bool] = lambda face: True,
    processes: int | None = None,
    force: bool = False,
) -> AlignedFaces:
    """Align photographs into folders of `root`, one folder for each detection pass. A stopped run can continue.

    Args:
        source: the folder of the photographs.
        photographs: their names, relative to `source`.
        root: gets the folders of aligned faces.
        fallback_crop: makes a face, (112, 112, 3) RGB uint8, of a photograph in which no face was found.
        listed: the list of the photographs, for messages.
        select: the face to keep, as in AlignSettings.
        accept_face: a selected face for which this is false counts as not found.
        processes: number of processes, as in align_tree.
        force: start over.

    Raises:
        DataError: photographs cannot be read, or no face was found and `fallback_crop` is None.
    """
    aligned = AlignedFaces(source, root)
    left = list(dict.fromkeys(map(os.path.normpath, photographs)))
    for name in left:  # an aligned face gets the name of its photograph
        path_inside(root, name, list_file=listed or source)
    for folder, thresholds in DETECTION_PASSES.items():
        if not left:
            break
        settings = AlignSettings(select=select, thresholds=thresholds, format="png")
        align_tree(source, path_inside(root, folder), settings, processes=processes, files=left, force=force)
        rows = {row.path: row for row in read_manifest(root / folder)}
        unreadable = [name for name in left if rows[name].status not in (ALIGNED, NO_FACE)]
        if unreadable:
            reason = rows[unreadable[0]].reason or "not an image"
            photos = _format_photographs(unreadable, _IN_ERRORS)
            raise DataError(f"{source}: cannot read {photos} ({reason}). Restore them and run the same command again.")
        for name in left:
            row = rows[name]
            if row.face is not None and accept_face(row.face):
                aligned.files[name] = os.path.join(folder, row.output)
                if thresholds != THRESHOLDS:
                    aligned.low.append(name)
        left = [name for name in left if name not in aligned.files]
    for name in left:
        if fallback_crop is None:
            raise DataError(
                f"{source}: no face found in {_format_photographs(left, _IN_ERRORS)}. Replace them, remove their pairs "
                f"from the list, or add --whole_image to use the full photographs, resized."
            )
        aligned.files[name] = os.path.join(FALLBACK_FOLDER, f"{name}.png")
        path = path_inside(path_inside(root, FALLBACK_FOLDER), f"{name}.png", list_file=listed or source)
        if force or not path.exists():
            write_image(path, fallback_crop(read_photo(source / name)))
        aligned.cut.append(name)
    return aligned


def full_image(image: np.ndarray) -> np.ndarray:
    """Resize (H, W, 3) RGB uint8 to (112, 112, 3): a fallback for photographs that show little more than a face."""
    return cv2.resize(image, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA)


def _format_photographs(names: Sequence[str], limit: int) -> str:
    """Return "12 photographs: a, b, c and 9 more"."""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} photograph{plural}: {format_names([printable(name) for name in names], limit)}"
