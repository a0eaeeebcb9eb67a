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
    """The aligned faces of a set.

    `files`: {photograph, relative to its source: aligned face, relative to `root`}. `low`: photographs whose face was
    found only at lower thresholds. `cut`: photographs without a face, for which a fallback crop was used.
    """

    root: Path
    files: dict[str, str] = field(default_factory=dict)
    low: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


def align_all(
    source: Path,
    photographs: Sequence[str],
    root: Path,
    fallback_crop: Callable[[np.ndarray], np.ndarray] | None,
    *,
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
        select: the face to keep, as in AlignSettings.
        accept_face: a selected face for which this is false counts as not found.
        processes: number of processes, as in align_tree.
        force: start over.

    Raises:
        DataError: photographs cannot be read, or no face was found and `fallback_crop` is None.
    """
    aligned = AlignedFaces(root)
    left = list(dict.fromkeys(map(os.path.normpath, photographs)))
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
            if rows[name].status == ALIGNED and accept_face(rows[name].face):
                aligned.files[name] = os.path.join(folder, rows[name].output)
                if thresholds != THRESHOLDS:
                    aligned.low.append(name)
        left = [name for name in left if name not in aligned.files]
    if left and fallback_crop is None:
        raise DataError(
            f"{source}: no face found in {_format_photographs(left, _IN_ERRORS)}. Replace them, remove their pairs "
            f"from the list, or add --whole_image to use the full photographs, resized."
        )
    for name in left:
        aligned.files[name] = os.path.join(FALLBACK_FOLDER, f"{name}.png")
        path = path_inside(path_inside(root, FALLBACK_FOLDER), f"{name}.png", list_file=source)
        if force or not path.exists():
            write_image(path, fallback_crop(read_photo(source / name)))
        aligned.cut.append(name)
    return aligned


def full_image(image: np.ndarray) -> np.ndarray:
    """Resize (H, W, 3) RGB uint8 to (112, 112, 3): a fallback for photographs that show little more than a face."""
    return cv2.resize(image, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA)


def describe(aligned: AlignedFaces, fallback: str) -> list[str]:
    """Return console lines about faces that the first pass did not find. `fallback` describes the crop."""
    lines = []
    if aligned.low:
        thresholds = " ".join(map(str, DETECTION_PASSES["found_low"]))
        photos = _format_photographs(aligned.low, _IN_SUMMARY)
        lines.append(f"face found only at lower thresholds ({thresholds}) in {photos}")
    if aligned.cut:
        lines.append(f"no face found: used {fallback} of {_format_photographs(aligned.cut, _IN_SUMMARY)}")
    return lines


def _format_photographs(names: Sequence[str], limit: int) -> str:
    """Return "12 photographs: a, b, c and 9 more"."""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} photograph{plural}: {format_names([printable(name) for name in names], limit)}"
