"""A page to look at: photographs with what was found in them, and beside each its aligned face."""

from pathlib import Path

import cv2
import numpy as np

from applications.align.manifest import ALIGNED, NO_FACE, UNREADABLE, Row, read_manifest
from applications.align.warp import align
from util.files import atomic_write
from util.image_io import UnreadableImage, read_photo

_CELL, _GAP = 168, 8  # pixels
_ACROSS, _ALIGNED, _NOT_ALIGNED = 4, 20, 4
_BACKGROUND, _INK, _MARK, _FAILED = (245, 245, 245), (40, 40, 40), (40, 200, 90), (200, 40, 40)


def write_contact_sheet(source: Path, dest: Path, file: Path) -> None:
    """Draws some photographs, spread evenly over the manifest of DEST, as a PNG; last those in which no face was found.

    Each is shown with the box and landmarks of the chosen face, and the aligned face to its right.
    """
    rows = list(read_manifest(dest))
    shown = _spread([row for row in rows if row.status == ALIGNED], _ALIGNED)
    shown += _spread([row for row in rows if row.status == NO_FACE], _NOT_ALIGNED)
    cells = [_cell(row, source) for row in shown]
    cells += [np.full_like(cells[0], _BACKGROUND)] * (-len(cells) % _ACROSS) if cells else []
    lines = [np.hstack(cells[start : start + _ACROSS]) for start in range(0, len(cells), _ACROSS)]
    page = np.vstack(lines) if lines else np.full((_CELL, _CELL, 3), _BACKGROUND, np.uint8)
    page = cv2.copyMakeBorder(page, _GAP, 0, _GAP, 0, cv2.BORDER_CONSTANT, value=_BACKGROUND)
    with atomic_write(file) as partial:
        partial.write_bytes(cv2.imencode(".png", page[:, :, ::-1])[1].tobytes())


def _spread(rows: list[Row], count: int) -> list[Row]:
    step = max(len(rows) / count, 1.0)
    return [rows[int(index * step)] for index in range(min(count, len(rows)))]


def _cell(row: Row, source: Path) -> np.ndarray:
    """(CELL + GAP, 2 * CELL + 3 * GAP, 3): the photograph, and the aligned face made anew from it."""
    try:
        photo = read_photo(source / row.path)
    except UnreadableImage:  # it has gone since
        photo, row = np.full((1, 1, 3), _BACKGROUND, np.uint8), Row(row.path, UNREADABLE)
    before = _fitted(photo)
    after = np.full((_CELL, _CELL, 3), _BACKGROUND, np.uint8)
    if row.face:
        _mark(before, row, photo.shape)
        after = align(photo, row.face.landmarks, _CELL)
    else:
        cv2.putText(after, row.status, (30, _CELL // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.6, _FAILED, 1, cv2.LINE_AA)
    cell = np.full((_CELL + _GAP, 2 * _CELL + 3 * _GAP, 3), _BACKGROUND, np.uint8)
    cell[:_CELL, :_CELL] = before
    cell[:_CELL, _CELL + _GAP : 2 * _CELL + _GAP] = after
    return cell


def _fitted(photo: np.ndarray) -> np.ndarray:
    """The photograph in the middle of a square of _CELL pixels."""
    scale, start = _placement(photo.shape)
    size = np.maximum(np.round(np.array(photo.shape[1::-1]) * scale).astype(int), 1)
    square = np.full((_CELL, _CELL, 3), _INK, np.uint8)
    left, top = np.floor(start).astype(int)
    small = cv2.resize(photo, size.tolist(), interpolation=cv2.INTER_AREA)[:_CELL, :_CELL]
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


def _placement(shape: tuple[int, ...]) -> tuple[float, np.ndarray]:
    """Scale and offset (x, y) from pixels of the photograph to those of its cell."""
    size = np.array(shape[1::-1])
    scale = _CELL / size.max()
    # Rounding can make the longer side a hair larger than the cell: 300 * (168 / 300) > 168.
    return scale, np.maximum(_CELL - size * scale, 0) / 2


def _mark(cell: np.ndarray, row: Row, shape: tuple[int, ...]) -> None:
    scale, start = _placement(shape)
    corners = np.rint(row.face.box.reshape(2, 2) * scale + start).astype(int)
    cv2.rectangle(cell, corners[0].tolist(), corners[1].tolist(), _MARK, 1, cv2.LINE_AA)
    for point in np.rint(row.face.landmarks * scale + start).astype(int):
        cv2.circle(cell, point.tolist(), 2, _MARK, -1, cv2.LINE_AA)
