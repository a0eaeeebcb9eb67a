"""Draw a page of photographs with the faces found in them, each next to its aligned face."""

from pathlib import Path

import cv2
import numpy as np

from applications.align.manifest import ALIGNED, NO_FACE, UNREADABLE, Row, read_manifest
from applications.align.warp import align
from util.files import atomic_write
from util.image_io import UnreadableImage, read_photo

_CELL, _GAP = 168, 8  # pixels: side of a photograph and of a face, and the space between them
_COLUMNS = 4
_ALIGNED_COUNT, _NO_FACE_COUNT = 20, 4
_BACKGROUND, _INK, _MARK, _FAILED = (245, 245, 245), (40, 40, 40), (40, 200, 90), (200, 40, 40)  # RGB


def write_contact_sheet(source: Path, dest: Path, file: Path) -> None:
    """Write a PNG with photographs chosen evenly from the manifest of `dest`, the ones without a face last.

    Each photograph is drawn with the box and landmarks of its first face, and with the aligned face to its right.
    Raises DataError if `dest` has no manifest, or a damaged one.
    """
    rows = list(read_manifest(dest))
    shown = _choose_evenly([row for row in rows if row.status == ALIGNED], _ALIGNED_COUNT)
    shown += _choose_evenly([row for row in rows if row.status == NO_FACE], _NO_FACE_COUNT)
    page = np.full((_CELL, _CELL, 3), _BACKGROUND, np.uint8)
    if shown:
        cells = [_draw_cell(row, source) for row in shown]
        cells += [np.full_like(cells[0], _BACKGROUND)] * (-len(cells) % _COLUMNS)
        page = np.vstack([np.hstack(cells[start : start + _COLUMNS]) for start in range(0, len(cells), _COLUMNS)])
    page = np.pad(page, ((_GAP, 0), (_GAP, 0), (0, 0)), constant_values=_BACKGROUND[0])
    with atomic_write(file) as partial:
        partial.write_bytes(cv2.imencode(".png", page[:, :, ::-1])[1].tobytes())


def _choose_evenly(rows: list[Row], count: int) -> list[Row]:
    step = max(len(rows) / count, 1.0)
    return [rows[int(index * step)] for index in range(min(count, len(rows)))]


def _draw_cell(row: Row, source: Path) -> np.ndarray:
    """Return (CELL + GAP, 2 * CELL + 3 * GAP, 3): the photograph, and the face aligned again from it."""
    try:
        photo = read_photo(source / row.path)
    except UnreadableImage:  # it was removed after the alignment
        photo = np.full((1, 1, 3), _BACKGROUND, np.uint8)
        row = Row(row.path, UNREADABLE)
    size = np.array(photo.shape[1::-1])
    scale = _CELL / size.max()
    # Rounding can make the longer side slightly larger than the cell: 300 * (168 / 300) > 168.
    start = np.maximum(_CELL - size * scale, 0) / 2  # x, y
    left, top = np.floor(start).astype(int)
    small_size = np.maximum(np.round(size * scale).astype(int), 1)
    small = cv2.resize(photo, small_size.tolist(), interpolation=cv2.INTER_AREA)[:_CELL, :_CELL]
    before = np.full((_CELL, _CELL, 3), _INK, np.uint8)
    before[top : top + small.shape[0], left : left + small.shape[1]] = small
    after = np.full((_CELL, _CELL, 3), _BACKGROUND, np.uint8)
    if row.face:
        corners = np.rint(row.face.box.reshape(2, 2) * scale + start).astype(int).tolist()
        cv2.rectangle(before, corners[0], corners[1], color=_MARK, thickness=1, lineType=cv2.LINE_AA)
        for point in np.rint(row.face.landmarks * scale + start).astype(int).tolist():
            cv2.circle(before, point, radius=2, color=_MARK, thickness=-1, lineType=cv2.LINE_AA)
        after = align(photo, row.face.landmarks, _CELL)
    else:
        place = (30, _CELL // 2)
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(after, row.status, place, fontFace=font, fontScale=0.6, color=_FAILED, lineType=cv2.LINE_AA)
    cell = np.full((_CELL + _GAP, 2 * _CELL + 3 * _GAP, 3), _BACKGROUND, np.uint8)
    cell[:_CELL, :_CELL] = before
    cell[:_CELL, _CELL + _GAP : 2 * _CELL + _GAP] = after
    return cell
