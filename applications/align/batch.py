"""Align a tree of photographs on all cores. Every file is recorded in a manifest, and a stopped run can continue."""

import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from applications.align.boxes import distance_to_center, sizes
from applications.align.detector import MIN_FACE, THRESHOLDS, Detector, Face
from applications.align.manifest import ALIGNED, NO_FACE, NOT_AN_IMAGE, UNREADABLE, Manifest, Row
from applications.align.warp import align
from util.cli.types import SELECT
from util.device import keep_freed_memory, num_cpus
from util.errors import RunError, UsageError
from util.face import FACE_SIZE
from util.files import check_source_and_dest, path_inside
from util.image_io import WRITE_FORMATS, NotAnImage, UnreadableImage, read_photo, write_image
from util.image_tree import printable, unique_output_names, walk
from util.parallel import parallel_map, worker_number, working_on

_FILES_AT_ONCE = 32  # files of one job of a process: enough to fill P-Net's canvases
_PIXELS_AT_ONCE = 4_000_000  # decoded pixels that a process holds
_MAX_PRINTED = 20  # unreadable files listed on the console; the manifest has all of them


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """The settings that determine the aligned faces.

    `select` is the face to keep: the one with the largest box, the one nearest to the center of the photograph, or the
    one with the best score. With `keep_all` the other faces are written too, as NAME.face2 and so on.
    """

    crop_size: int = FACE_SIZE
    select: str = "largest"
    keep_all: bool = False
    min_face: float = MIN_FACE
    thresholds: tuple[float, float, float] = THRESHOLDS
    format: str = "jpg"

    def __post_init__(self) -> None:
        if not 16 <= self.crop_size <= 4096:
            raise UsageError(f"--crop_size {self.crop_size}: must lie between 16 and 4096 pixels")
        for flag, value, known in (("select", self.select, SELECT), ("format", self.format, tuple(WRITE_FORMATS))):
            if value not in known:
                raise UsageError(f"--{flag} {value}: must be one of {', '.join(known)}")


@dataclass(frozen=True)
class AlignSummary:
    """Results of a run."""

    counts: Counter[str]  # files of this and earlier runs, by status
    new: int  # files of this run
    seconds: float


@dataclass(frozen=True)
class _Job:
    """A photograph, relative to the source, and its face, relative to the destination and without a suffix."""

    path: str
    output: str


@dataclass(frozen=True)
class _Plan:
    """What every process needs."""

    source: Path
    dest: Path
    settings: AlignSettings
    devices: tuple[torch.device, ...]
    processes: int


def align_tree(
    source: Path,
    dest: Path,
    settings: AlignSettings,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    processes: int | None = None,
    files: Iterable[str] | None = None,
    force: bool = False,
) -> AlignSummary:
    """Align the faces of all files below `source` into the same folders of `dest`.

    The result of each file is recorded in DEST/manifest.csv. Files that an earlier run finished are skipped. An
    unreadable photograph does not stop the run.

    Args:
        source: a folder of photographs.
        dest: created if missing.
        settings: what the aligned faces depend on; an earlier run into `dest` must have had the same.
        devices: the processes use them in turn.
        processes: number of processes; None: one for each core, 0 or 1: only this process.
        files: the photographs to align, relative to `source`; None: all files below it.
        force: remove what an earlier run aligned, and start over.

    Raises:
        UsageError: a folder cannot be used, or an earlier run had other settings.
        RunError: an aligned face cannot be written.
    """
    check_source_and_dest("-source_root", source, "-dest_root", dest)
    Detector(devices[0], settings.min_face, settings.thresholds)  # fail here once, not in every process
    recorded = {"source": str(source.resolve()), **asdict(settings), "thresholds": list(settings.thresholds)}
    with Manifest(dest, recorded, force) as manifest:
        folders = list(walk(source, dest) if files is None else _group_by_folder(files))
        total = sum(len(names) for _, names in folders)
        left = sum(job.path not in manifest.done for job in _jobs(folders))
        # Jobs are made again when they are needed: a tree may have millions of files.
        jobs = (job for job in _jobs(folders) if job.path not in manifest.done)
        chunks = iter(lambda: list(islice(jobs, _FILES_AT_ONCE)), [])
        if processes is None:
            processes = _default_processes(devices)
        processes = min(processes, -(-left // _FILES_AT_ONCE))  # no more processes than chunks
        plan = _Plan(source, dest, settings, devices=tuple(devices), processes=processes)

        started = time.perf_counter()
        unreadable = 0
        try:
            with (
                tqdm(total=total, initial=total - left, unit="image", desc="aligned", smoothing=0.05) as bar,
                parallel_map(_align_chunk, plan, chunks, processes, fork=False) as results,
            ):
                for rows in results:
                    manifest.add(rows)
                    bar.update(len({row.path for row in rows}))
                    for row in rows:
                        if row.status == UNREADABLE:
                            unreadable += 1
                            if unreadable <= _MAX_PRINTED:
                                bar.write(f"{printable(row.path)}: {row.reason}", file=sys.stderr)
        except OSError as error:
            raise RunError(
                f"{dest}: an aligned face cannot be written ({error}). Run the same command again to continue."
            ) from None
        if unreadable > _MAX_PRINTED:
            print(f"and {unreadable - _MAX_PRINTED} more that cannot be read; see the manifest", file=sys.stderr)
        return AlignSummary(manifest.counts, left, time.perf_counter() - started)


def _default_processes(devices: Sequence[torch.device]) -> int:
    """Return one process for each core, and at most 8 for each GPU: they decode while another one uses the GPU."""
    return num_cpus() if devices[0].type == "cpu" else min(num_cpus(), 8 * len(devices))


def _group_by_folder(files: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return (folder, sorted file names) for each folder, sorted."""
    folders: dict[str, set[str]] = defaultdict(set)
    for file in files:
        folder, name = os.path.split(os.path.normpath(file))
        folders[folder or "."].add(name)
    return sorted((folder, sorted(names)) for folder, names in folders.items())


def _jobs(folders: Iterable[tuple[str, list[str]]]) -> Iterator[_Job]:
    for folder, names in folders:
        for name, output in zip(names, unique_output_names(names), strict=True):
            path, stem = (os.path.normpath(os.path.join(folder, part)) for part in (name, output))
            yield _Job(path, stem)


def _align_chunk(plan: _Plan, jobs: Sequence[_Job]) -> list[Row]:
    """Read photographs, find their faces, write the aligned faces, and return the rows of the manifest."""
    rows: list[Row] = []
    held: list[tuple[_Job, np.ndarray]] = []
    for job in jobs:
        working_on(plan.source / job.path)
        try:
            held.append((job, read_photo(plan.source / job.path)))
        except NotAnImage:
            rows.append(Row(job.path, NOT_AN_IMAGE))
        except UnreadableImage as error:
            rows.append(Row(job.path, UNREADABLE, reason=str(error)))
        is_last = job is jobs[-1]
        if is_last or sum(image.size for _, image in held) > 3 * _PIXELS_AT_ONCE:  # size counts three channels
            faces_of_images = _process_detector(plan)([image for _, image in held])
            for (found_in, image), faces in zip(held, faces_of_images, strict=True):
                rows += _write_faces(plan, found_in, image, faces)
            held = []
    return sorted(rows, key=lambda row: row.path)


@lru_cache(maxsize=1)
def _process_detector(plan: _Plan) -> Detector:
    """Return the detector of this process. Processes divide the cores and use the devices in turn."""
    keep_freed_memory()
    if plan.processes >= 2:
        torch.set_num_threads(max(1, num_cpus() // plan.processes))
    device = plan.devices[worker_number() % len(plan.devices)]
    return Detector(device, plan.settings.min_face, plan.settings.thresholds)


def _write_faces(plan: _Plan, job: _Job, image: np.ndarray, faces: list[Face]) -> list[Row]:
    if not faces:
        return [Row(job.path, NO_FACE, reason="no face found; a lower --min_face or lower --thresholds find more")]
    selected = [select_face(faces, image, plan.settings.select)]
    if plan.settings.keep_all:
        selected += [face for face in faces if face is not selected[0]]
    rows = []
    for number, face in enumerate(selected, start=1):
        suffix = f".face{number}" if number > 1 else ""
        output = f"{job.output}{suffix}.{plan.settings.format}"
        path = path_inside(plan.dest, output, list_file=plan.source / job.path)
        write_image(path, align(image, face.landmarks, plan.settings.crop_size))
        rows.append(Row(job.path, ALIGNED, output, faces=len(faces), face=face))
    return rows


def select_face(faces: list[Face], image: np.ndarray, select: str) -> Face:
    """Return the "largest" or most "central" face of an image (H, W, 3), or the face with the "best" score.

    Of equal faces the first is returned.
    """
    boxes = np.stack([face.box for face in faces])
    height, width = image.shape[:2]
    if select == "largest":
        values = sizes(boxes).prod(axis=1)
    elif select == "central":
        values = -distance_to_center(boxes, width, height)
    else:
        values = np.array([face.score for face in faces])
    return faces[int(np.argmax(values))]
