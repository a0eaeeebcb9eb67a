"""Name the faces of photographs and videos, draw them, and record every face."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from applications.recognizer import Match, Recognizer, load_image
from util.annotate import GREEN, ORANGE, draw_face
from util.console import logger
from util.errors import DataError, RunError
from util.files import atomic_write, path_inside
from util.gallery import Gallery
from util.image_io import SUFFIXES, write_image
from util.image_tree import printable, unique_output_names, walk

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))
_COLUMNS = ("file", "frame", "seconds", "name", "nearest", "cosine", "x1", "y1", "x2", "y2", "score")
Record = dict[str, str | int | float | None]


def find_probes(given: Sequence[Path], out: Path) -> dict[str, Path]:
    """Return {output name without a suffix: photograph or video}, of files and of the files below folders.

    Files in `out` are left out. A file that is named itself may have any suffix. DataError if it is missing.
    """
    files: dict[Path, str] = {}  # a file that is named twice counts once
    for path in given:
        if path.is_dir():
            for folder, names in walk(path, out):
                known = [name for name in names if Path(name).suffix.lower() in SUFFIXES | VIDEO_SUFFIXES]
                files |= {path / folder / name: os.path.normpath(os.path.join(folder, name)) for name in known}
        elif path.is_file():
            files.setdefault(path, path.name)
        else:
            raise DataError(f"{printable(path)}: no such file or folder. Name photographs or videos.")
    probes: dict[str, Path] = {}
    for path, name in zip(files, unique_output_names(list(files.values())), strict=True):
        numbered = (f"{name}_{number}" for number in count(2))  # of files with one name in several folders
        probes[name if name not in probes else next(other for other in numbered if other not in probes)] = path
    return probes


def identify_all(
    recognizer: Recognizer, gallery: Gallery, probes: dict[str, Path], *, threshold: float, out: Path, every: int
) -> dict[str, int]:
    """Name all faces in photographs and videos. Write OUT/NAME.jpg or .mp4, OUT/faces.json and OUT/faces.csv.

    A file that cannot be read is named in a warning, and left out.

    Args:
        recognizer: finds and embeds the faces.
        gallery: the known people.
        probes: {output name without a suffix: file}.
        threshold: least cosine for a name.
        out: the folder for the results.
        every: of a video, every N-th frame is searched. The frames between show the faces of the frame before.

    Returns:
        Counts of files, of faces with and without a name, and of files that were left out.

    Raises:
        DataError: no file can be read.
        RunError: a result cannot be written.
    """
    records: list[Record] = []
    counts = {"files": 0, "faces with a name": 0, "unknown faces": 0, "files left out": 0}
    for name, path in tqdm(probes.items(), "identified", unit="file", disable=None, delay=2):
        try:
            if path.suffix.lower() in VIDEO_SUFFIXES:
                found = _identify_video(recognizer, gallery, path, threshold=threshold, out=out, name=name, every=every)
            else:
                image = load_image(path)
                matches = recognizer.search(image, gallery, threshold=threshold)
                with _writes(target := path_inside(out, f"{name}.jpg", path)):
                    write_image(target, draw_matches(image, matches))
                found = [_record(path, match) for match in matches]
        except DataError as error:
            logger.warning(f"warning: left out: {error}")
            counts["files left out"] += 1
            continue
        counts["files"] += 1
        counts["faces with a name"] += sum(record["name"] is not None for record in found)
        counts["unknown faces"] += sum(record["name"] is None for record in found)
        records += found
    if not counts["files"]:
        raise DataError("none of the photographs and videos can be read. The reasons are above.")
    with _writes(out), atomic_write(out / "faces.json") as partial:
        partial.write_text(json.dumps({"threshold": threshold, "faces": records}, indent=1) + "\n")
    with _writes(out), atomic_write(out / "faces.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(records)
    return counts


def draw_matches(image: np.ndarray, matches: Iterable[Match]) -> np.ndarray:
    """Return a copy of an image (H, W, 3) RGB uint8 with the box, name and cosine of each face."""
    drawn = image.copy()
    for match in matches:
        label = f"{match.name or 'unknown'} {match.cosine:.2f}"
        color = ORANGE if match.name is None else GREEN
        draw_face(drawn, match.face.box, match.face.landmarks, label, color=color)
    return drawn


def _record(path: Path, match: Match, frame: int | None = None, seconds: float | None = None) -> Record:
    """Return the row of a face."""
    box = dict(zip(("x1", "y1", "x2", "y2"), np.round(match.face.box, 1).tolist(), strict=True))
    return {
        "file": printable(path),
        "frame": frame,
        "seconds": None if seconds is None else round(seconds, 3),
        "name": match.name,
        "nearest": match.nearest,
        "cosine": round(match.cosine, 4),
        **box,
        "score": round(match.face.score, 4),
    }


def _identify_video(
    recognizer: Recognizer, gallery: Gallery, path: Path, *, threshold: float, out: Path, name: str, every: int
) -> list[Record]:
    """Name the faces of a video and write it with boxes and names, without its sound. Return the rows."""
    records: list[Record] = []
    matches: list[Match] = []
    target = path_inside(out, f"{name}.mp4", path)
    with _open_video(path) as video:
        rate = video.get(cv2.CAP_PROP_FPS) or 25.0
        with _writes(target), atomic_write(target) as partial:
            writer = None
            for number, frame in enumerate(_frames(video)):
                if number % every == 0:
                    matches = recognizer.search(frame, gallery, threshold=threshold)
                    records += [_record(path, match, frame=number, seconds=number / rate) for match in matches]
                if writer is None:
                    size = frame.shape[1::-1]
                    writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
                    if not writer.isOpened():
                        raise RunError(f"{printable(target)}: OpenCV cannot write it as MP4. Name another --out.")
                writer.write(draw_matches(frame, matches)[:, :, ::-1])
            if writer is None:
                raise DataError(f"{printable(path)}: no frame of this video can be read. Restore or remove it.")
            writer.release()
    return records


@contextmanager
def _open_video(path: Path) -> Iterator[cv2.VideoCapture]:
    video = cv2.VideoCapture(str(path))
    try:
        yield video
    finally:
        video.release()


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Yield the frames, (H, W, 3) RGB uint8."""
    while True:
        has_frame, frame = video.read()
        if not has_frame:
            return
        yield np.ascontiguousarray(frame[:, :, ::-1])


@contextmanager
def _writes(path: Path) -> Iterator[None]:
    """Turn an error of the disk into RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{printable(path)}: cannot be written ({error.strerror}). Name another --out.") from None
