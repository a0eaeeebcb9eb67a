"""Aligns a whole tree of photographs on all cores, so that nothing is lost and a run that is killed can go on."""

import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from applications.align.boxes import distance_to_center, sizes
from applications.align.detector import MIN_FACE, THRESHOLDS, Detector, Face
from applications.align.manifest import ALIGNED, NO_FACE, NOT_AN_IMAGE, UNREADABLE, Manifest, Row
from applications.align.warp import align
from util.device import num_cpus
from util.errors import RunError, UsageError
from util.face import FACE_SIZE
from util.files import atomic_write, check_source_and_dest, path_inside
from util.image_io import SUFFIXES, NotAnImage, UnreadableImage, read_photo
from util.parallel import parallel_map

SELECT = ("largest", "central", "best")
FORMATS = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, 95], "png": []}
_FILES_AT_ONCE = 32  # a process takes: enough to fill P-Net's canvases
_PIXELS_AT_ONCE = 4_000_000  # that it holds decoded
_FURTHER = re.compile(r"\.face\d+$", re.IGNORECASE)  # ends the name of a photograph's second face, and third …
_NAMED = 20  # unreadable files that are named on the console; the manifest has all of them


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """What the aligned faces depend on. `select`: the face with the largest box, the one nearest to the centre of the
    photograph, or the one with the best score. With `keep_all` the others are written too, under names of their own."""

    crop_size: int = FACE_SIZE
    select: str = "largest"
    keep_all: bool = False
    min_face: float = MIN_FACE
    thresholds: tuple[float, float, float] = THRESHOLDS
    format: str = "jpg"

    def __post_init__(self) -> None:
        if not 16 <= self.crop_size <= 4096:
            raise UsageError(f"--crop_size {self.crop_size}: must lie between 16 and 4096 pixels")
        for flag, value, known in (("select", self.select, SELECT), ("format", self.format, tuple(FORMATS))):
            if value not in known:
                raise UsageError(f"--{flag} {value}: must be one of {', '.join(known)}")


@dataclass(frozen=True)
class AlignSummary:
    """`counts` of the files by status, those of earlier runs included; `new`, the files of this run, in `seconds`."""

    counts: Counter[str]
    new: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    """A photograph, relative to the source, and where its face goes, relative to the destination, without a suffix."""

    path: str
    output: str


def align_tree(
    source: Path,
    dest: Path,
    settings: AlignSettings,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    processes: int | None = None,
    files: Iterable[str] | None = None,
    force: bool = False,
) -> AlignSummary:
    """Aligns the faces of every file below `source`, or of `files` (relative to it), into the same folders of `dest`.

    What became of each file stands in DEST/manifest.csv, and is counted in the summary. A file that an
    earlier run into `dest` is done with is left out; `force` starts over. `processes`: how many share the work (by
    default one a core; 0: this one alone). Photographs that cannot be read do not stop it.
    Raises UsageError for folders that cannot be used, RunError where an aligned face could not be written.
    """
    check_source_and_dest("-source_root", source, "-dest_root", dest)
    Detector(devices[0], settings.min_face, settings.thresholds)  # what is wrong with them is said here, and once
    described = {"source": str(source.resolve()), **asdict(settings), "thresholds": list(settings.thresholds)}
    with Manifest(dest, described, force) as manifest:
        folders = list(_folders_of(files) if files is not None else walk(source, dest))
        left = sum(job.path not in manifest.done for folder in folders for job in _jobs(*folder))
        processes = min(_default_processes(devices) if processes is None else processes, -(-left // _FILES_AT_ONCE))
        jobs = (job for folder in folders for job in _jobs(*folder) if job.path not in manifest.done)
        plan = _Plan(source, dest, settings, tuple(devices), processes)
        started = time.perf_counter()
        _align_files(jobs, left, sum(len(names) for _, names in folders), plan, manifest)
        return AlignSummary(manifest.counts, left, time.perf_counter() - started)


def _align_files(jobs: Iterator[_Job], left: int, total: int, plan: "_Plan", manifest: Manifest) -> None:
    """Does the `left` jobs of a tree of `total` files, with a bar, and writes down what became of each."""
    chunks = iter(lambda: list(islice(jobs, _FILES_AT_ONCE)), [])
    unreadable = 0
    with tqdm(total=total, initial=total - left, unit="image", desc="aligned", smoothing=0.05) as bar:
        for rows in _work(chunks, plan):
            manifest.add(rows)
            bar.update(len({row.path for row in rows}))
            for row in (row for row in rows if row.status == UNREADABLE):
                unreadable += 1
                if unreadable <= _NAMED:
                    bar.write(f"{printable(row.path)}: {row.reason}", file=sys.stderr)
    if unreadable > _NAMED:
        print(f"and {unreadable - _NAMED} more that cannot be read; the manifest names them", file=sys.stderr)


def printable(name: str) -> str:
    """A file's name for the console, also one whose bytes are no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _default_processes(devices: Sequence[torch.device]) -> int:
    """A process keeps one core busy. Several share a GPU: while one decodes, another has it."""
    cores = num_cpus()
    return cores if devices[0].type == "cpu" else min(cores, 8 * len(devices))


def walk(source: Path, dest: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to source, names of its files), in order. Links to folders are followed, but in no circle, and
    the destination is left out where it lies within the source."""
    seen, aside = set(), os.path.realpath(dest)
    for folder, subfolders, names in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or real == aside:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield os.path.relpath(folder, source), sorted(names)


def _folders_of(files: Iterable[str]) -> list[tuple[str, list[str]]]:
    folders: dict[str, set[str]] = {}
    for file in files:
        folder, name = os.path.split(os.path.normpath(file))
        folders.setdefault(folder or ".", set()).add(name)
    return sorted((folder, sorted(names)) for folder, names in folders.items())


def _jobs(folder: str, names: list[str]) -> Iterator[_Job]:
    for name, output in zip(names, outputs(names), strict=True):
        yield _Job(*(os.path.normpath(os.path.join(folder, part)) for part in (name, output)))


def outputs(names: list[str]) -> list[str]:
    """What the faces of a folder's files are called, without a suffix: no two alike, on any file system.

    0001.jpg becomes 0001. Where that could be another file's name too, a file keeps its whole name: 0001.jpg and
    0001.png become 0001.jpg and 0001.png, to which the suffix of the output is added. Nor does a name look like that of
    a further face of another photograph.
    """
    stems = [os.path.splitext(name)[0] if os.path.splitext(name)[1].lower() in SUFFIXES else name for name in names]
    claims = Counter(stem.casefold() for stem in stems)
    claims.update(name.casefold() for name, stem in zip(names, stems, strict=True) if stem != name)
    unique = [
        stem if claims[stem.casefold()] == 1 and not _FURTHER.search(stem) else name
        for name, stem in zip(names, stems, strict=True)
    ]
    return [f"{name}.face1" if _FURTHER.search(name) else name for name in unique]


# --- The work on a chunk of files, in this process or in another.


class _Aligner:
    """Reads photographs, finds their faces, writes these aligned: a chunk of jobs in, rows of the manifest out."""

    def __init__(self, source: Path, dest: Path, settings: AlignSettings, device: torch.device):
        self._source, self._dest, self._settings = source, dest, settings
        self._detector = Detector(device, settings.min_face, settings.thresholds)

    def __call__(self, jobs: Sequence[_Job]) -> list[Row]:
        rows: list[Row] = []
        held: list[tuple[_Job, np.ndarray]] = []
        for job in jobs:
            try:
                held.append((job, read_photo(self._source / job.path)))
            except NotAnImage:
                rows.append(Row(job.path, NOT_AN_IMAGE))
            except UnreadableImage as error:
                rows.append(Row(job.path, UNREADABLE, reason=str(error)))
            if sum(image.size for _, image in held) > 3 * _PIXELS_AT_ONCE:
                rows += self._align(held)
                held = []
        return sorted(rows + self._align(held), key=lambda row: row.path)

    def _align(self, held: list[tuple[_Job, np.ndarray]]) -> list[Row]:
        found = self._detector([image for _, image in held])
        return [row for (job, image), faces in zip(held, found, strict=True) for row in self._write(job, image, faces)]

    def _write(self, job: _Job, image: np.ndarray, faces: list[Face]) -> list[Row]:
        if not faces:
            reason = "no face found; a lower --min_face or lower --thresholds find more"
            return [Row(job.path, NO_FACE, reason=reason)]
        first = select_face(faces, image, self._settings.select)
        chosen = [first, *(face for face in faces if face is not first)] if self._settings.keep_all else [first]
        rows = []
        for number, face in enumerate(chosen, start=1):
            output = f"{job.output}.face{number}" if number > 1 else job.output
            output = f"{output}.{self._settings.format}"
            path = path_inside(self._dest, output, named_in=self._source / job.path)
            write_image(path, align(image, face.landmarks, self._settings.crop_size))
            rows.append(Row(job.path, ALIGNED, output, len(faces), face))
        return rows


def select_face(faces: list[Face], image: np.ndarray, select: str) -> Face:
    """The one face of an image that is wanted; of equals the more probable one, which is the earlier in the list."""
    boxes = np.stack([face.box for face in faces])
    height, width = image.shape[:2]
    worth = {
        "largest": lambda: sizes(boxes).prod(axis=1),
        "central": lambda: -distance_to_center(boxes, width, height),
        "best": lambda: np.array([face.score for face in faces]),
    }
    return faces[int(np.argmax(worth[select]()))]


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes RGB uint8 as JPEG (quality 95) or PNG, by the name's ending: whole, or not at all."""
    whole, data = cv2.imencode(path.suffix, image[:, :, ::-1], FORMATS[path.suffix[1:]])
    assert whole, path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(data.tobytes())


# --- Sharing the work.


@dataclass(frozen=True)
class _Plan:
    """What all processes need to know. `started` counts them; None: all is done in this one."""

    source: Path
    dest: Path
    settings: AlignSettings
    devices: tuple[torch.device, ...]
    processes: int
    started: Any = None


def _work(chunks: Iterable[list[_Job]], plan: _Plan) -> Iterator[list[Row]]:
    """The rows of each chunk, in their order."""
    if plan.processes >= 2:
        plan = replace(plan, started=multiprocessing.get_context("spawn").Value("i", 0))
    try:
        with _keeping_memory():
            yield from parallel_map(_work_on, plan, chunks, plan.processes, fork=False)
    except OSError as error:
        raise RunError(
            f"{plan.dest}: an aligned face cannot be written ({error}); run the same command again to go on"
        ) from None


def _work_on(plan: _Plan, jobs: list[_Job]) -> list[Row]:
    return _aligner(plan)(jobs)


@lru_cache(maxsize=1)
def _aligner(plan: _Plan) -> _Aligner:
    """The one of this process. Each has its share of the cores, and the GPUs in turn."""
    number = 0
    if plan.started is not None:
        with plan.started.get_lock():
            number, plan.started.value = plan.started.value, plan.started.value + 1
        torch.set_num_threads(max(1, num_cpus() // plan.processes))
    return _Aligner(plan.source, plan.dest, plan.settings, plan.devices[number % len(plan.devices)])


@contextmanager
def _keeping_memory() -> Iterator[None]:
    """Processes started within keep the memory that they free: glibc would give it back to the system and fetch it
    again for every large tensor, which costs up to half of a network's time. Settings of the user go first."""
    names = [name for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_") if name not in os.environ]
    os.environ.update(dict.fromkeys(names, str(256 * 2**20)))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
