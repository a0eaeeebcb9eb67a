"""The aligned faces of the photographs that a verification set names: all of them, since no pair may be dropped.

Every published figure is about all pairs of a protocol, and the photographs in which no detector finds a face are the
hard ones: to leave them out would flatter. So they are looked through again with lower thresholds, and what is then
left is cut out without a detector, where the face of such a photograph usually is.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from applications.align.batch import AlignSettings, align_tree, printable, write_image
from applications.align.detector import THRESHOLDS, Face
from applications.align.manifest import ALIGNED, NO_FACE, Row, read_manifest
from util.errors import DataError
from util.face import FACE_SIZE
from util.files import path_inside
from util.image_io import read_photo

# Folder: the thresholds with which its faces were found. No two share one, so that a run that is stopped goes on.
STAGES = {"found": THRESHOLDS, "found_low": (0.4, 0.5, 0.5)}
CUT_OUT = "not_found"
_NAMED, _REPORTED = 3, 10  # photographs that an error and a summary name; the set's note has all


@dataclass
class AlignedFaces:
    """`files`: {photograph, relative to the source: its aligned face, relative to `root`}. `low` are the photographs
    whose face was found only at lower thresholds, `cut` those in which none was found."""

    root: Path
    files: dict[str, str] = field(default_factory=dict)
    low: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


def align_all(
    source: Path,
    photographs: Sequence[str],
    root: Path,
    cut_out: Callable[[np.ndarray], np.ndarray] | None,
    select: str = "central",
    is_wanted: Callable[[Face], bool] = lambda face: True,
    processes: int | None = None,
    force: bool = False,
) -> AlignedFaces:
    """Aligns the photographs, relative to `source`, into folders of `root`, one for each way in which a face was found.

    A face that is not `is_wanted` counts as none. `cut_out` makes an aligned face, (112, 112, 3) RGB uint8, of a
    photograph in which none was found; without it, such photographs raise DataError. So do those that cannot be read.
    A run that was stopped goes on where it was.
    """
    aligned = AlignedFaces(root)
    left = list(dict.fromkeys(map(os.path.normpath, photographs)))
    for stage, thresholds in STAGES.items():
        if left:
            settings = AlignSettings(select=select, thresholds=thresholds, format="png")
            align_tree(source, root / stage, settings, processes=processes, files=left, force=force)
            found = _found(source, root, stage, left, is_wanted)
            aligned.files |= found
            left = [name for name in left if name not in found]
            aligned.low += found if stage != next(iter(STAGES)) else []
    if left and cut_out is None:
        raise DataError(
            f"{source}: no face found in {named(left)}; replace them, take their pairs out of the list, or add "
            f"--whole_image to take those photographs as they are, resized"
        )
    for name in left:
        face = os.path.join(CUT_OUT, f"{name}.png")
        path = path_inside(root / CUT_OUT, f"{name}.png", named_in=source)
        if force or not path.exists():
            write_image(path, cut_out(read_photo(source / name)))
        aligned.files[name] = face
        aligned.cut.append(name)
    return aligned


def _found(
    source: Path, root: Path, stage: str, photographs: Sequence[str], is_wanted: Callable[[Face], bool]
) -> dict[str, str]:
    """{photograph: aligned face} of a stage. DataError counts the photographs that cannot be read."""
    rows: dict[str, Row] = {row.path: row for row in read_manifest(root / stage)}
    broken = [name for name in photographs if rows[name].status not in (ALIGNED, NO_FACE)]
    if broken:
        reason = rows[broken[0]].reason or "not an image"
        raise DataError(
            f"{source}: cannot read {named(broken)} ({reason}); restore them and run the same command again"
        )
    wanted = {name: rows[name] for name in photographs if rows[name].status == ALIGNED and is_wanted(rows[name].face)}
    return {name: os.path.join(stage, row.output) for name, row in wanted.items()}


def whole_image(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB uint8 -> (112, 112, 3): for photographs that show little more than a face."""
    return cv2.resize(image, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA)


def named(names: Sequence[str], limit: int = _NAMED) -> str:
    """`12 photographs: a, b, c and so on`."""
    shown = ", ".join(printable(name) for name in names[:limit])
    count = f"{len(names)} photograph{'s' if len(names) > 1 else ''}"
    return f"{count}: {shown}{' and so on' if len(names) > limit else ''}"


def describe(aligned: AlignedFaces, how_cut: str) -> list[str]:
    """Lines for the console about the photographs whose faces were not simply found."""
    lines = []
    if aligned.low:
        lines.append(
            f"face found only at lower thresholds ({' '.join(map(str, STAGES['found_low']))}) in "
            f"{named(aligned.low, _REPORTED)}"
        )
    if aligned.cut:
        lines.append(f"no face found, so {how_cut}, in {named(aligned.cut, _REPORTED)}")
    return lines
