"""Which images lie in a folder of people, ROOT/PERSON/IMAGE. A large set keeps the list from run to run.

Opening a hundred thousand folders takes minutes on some disks; asking when each of them changed takes seconds. So the
list is kept in ROOT/.images.npz, with the inode and the times of change of each person's folder, and only folders that
differ in one of these are opened again. Adding, removing or renaming an image or a person changes them, and so does
copying the set; what is written into an image does not, and need not.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from util.errors import DataError
from util.progress import progress

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
KEPT = ".images.npz"
KEPT_FROM = 100_000  # images; fewer are listed in a second or two, and their folder stays as it is
_FORMAT = f"1 {' '.join(IMAGE_SUFFIXES)}"
_TICK = 2_000_000_000  # nanoseconds: the coarsest clock of a file system, FAT's
_LONG = 5  # seconds

Stamp = tuple[int, int, int]  # a folder's inode, mtime_ns and ctime_ns
_ARRAYS = ("format", "people", "stamps", "counts", "images")
_UNKNOWN: Stamp = (0, 0, 0)


class Names:
    """Many names, as the file system has them, in one bytes object: worker processes, which copy what they touch,
    would copy millions of Python objects one by one as they count their references."""

    def __init__(self, joined: bytes):
        self.joined = joined  # a zero byte after each name, which no name can hold
        ends = np.flatnonzero(np.frombuffer(joined, np.uint8) == 0)
        self.starts = np.concatenate([[0], ends + 1])  # (N + 1,) int64

    @staticmethod
    def of(names: Iterable[str]) -> "Names":
        return Names(b"".join(os.fsencode(name) + b"\0" for name in names))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.joined[self.starts[index] : self.starts[index + 1] - 1]


@dataclass(frozen=True)
class FolderIndex:
    """The P folders in ROOT, in alphabetical order, and the N images in them, in alphabetical order in each.

    `people`: the folders' names, also of those without images; `stamps`: theirs; `counts` (P,) int64: how many images
    each has; `images`: the names of all images, one person's after another's.
    """

    people: list[str]
    stamps: list[Stamp]
    counts: np.ndarray
    images: Names

    def by_person(self) -> dict[tuple[str, Stamp], bytes]:
        """The names of the images of each person, joined."""
        limits = self.images.starts[np.concatenate([[0], np.cumsum(self.counts)])].tolist()
        parts = [self.images.joined[start:stop] for start, stop in pairwise(limits)]
        return dict(zip(zip(self.people, self.stamps, strict=True), parts, strict=True))


def list_images(root: Path) -> FolderIndex:
    """What lies in ROOT now. Raises DataError, naming the folder, if one cannot be read."""
    began = time.perf_counter()
    people, stamps = _people(root)
    kept = _read(root / KEPT)
    if kept is not None and (kept.people, kept.stamps) == (people, stamps):
        return kept
    known = {} if kept is None else kept.by_person()
    parts = []
    for folder in progress(list(zip(people, stamps, strict=True)), f"listing {root.name}", "folders"):
        part = known.get(folder)
        parts.append(_names_in(f"{root}/{folder[0]}") if part is None else part)
    counts = np.array([part.count(0) for part in parts], np.int64)
    listing = FolderIndex(people, stamps, counts, Names(b"".join(parts)))
    if len(listing.images) >= KEPT_FROM:
        _keep(root, listing, time.perf_counter() - began)
    return listing


def _people(root: Path) -> tuple[list[str], list[Stamp]]:
    """The names and the stamps of the folders in ROOT."""
    try:
        with os.scandir(root) as entries:
            folders = sorted((entry.name, entry.stat()) for entry in entries if entry.name[0] != "." and entry.is_dir())
    except OSError as error:
        raise _unreadable(error, str(root)) from None
    # Inodes of some file systems need all 64 bits; arrays of whole numbers that can be compared have 63.
    stamps = [(stat.st_ino & (2**63 - 1), stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in folders]
    return [name for name, _ in folders], stamps


def _names_in(folder: str) -> bytes:
    """The names of a folder's images, joined. Hidden files are none: macOS leaves `._0001.jpg` beside `0001.jpg`."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    except OSError as error:
        raise _unreadable(error, folder) from None
    return Names.of(sorted(names)).joined


def _unreadable(error: OSError, folder: str) -> DataError:
    return DataError(f"{error.filename or folder}: cannot be read ({error.strerror}); change that, or move it away")


def _read(path: Path) -> FolderIndex | None:
    """The list as it was kept, or None where there is none that holds together."""
    try:
        with np.load(path) as arrays:
            form, people, stamps, counts, images = (arrays[key] for key in _ARRAYS)
        folders = os.fsdecode(people.tobytes()).split("\0")[:-1]
        listing = FolderIndex(folders, list(map(tuple, stamps.tolist())), counts, Names(images.tobytes()))
        whole = (
            str(form) == _FORMAT
            and (people.dtype, images.dtype, stamps.dtype, counts.dtype) == (np.uint8, np.uint8, np.int64, np.int64)
            and (stamps.shape, counts.shape) == ((len(folders), 3), (len(folders),))
            and 0 <= counts.min(initial=0) <= counts.max(initial=0) <= len(images)
            and len(listing.images) == counts.sum()
            and listing.images.starts[-1] == len(images)
            and b"/" not in listing.images.joined
        )
    except Exception:  # numpy and zipfile raise all kinds for a damaged file, and each only costs time
        return None
    return listing if whole else None


def _keep(root: Path, listing: FolderIndex, seconds: float) -> None:
    """Writes the list, whole or not at all, where ROOT can be written to. `seconds`: how long it took to make it.

    A folder that changed while it was listed, or so shortly before that its times could not tell, goes in as unknown.
    """
    partial = root / f"{KEPT}.{os.getpid()}.partial"  # of each process its own: those of a run open the set at once
    try:
        with partial.open("wb") as file:
            began = os.fstat(file.fileno()).st_mtime_ns - int(seconds * 1e9)  # by the clock of the file system
            stamps = [stamp if max(stamp[1:]) < began - _TICK else _UNKNOWN for stamp in listing.stamps]
            content = (
                np.array(_FORMAT),
                np.frombuffer(Names.of(listing.people).joined, np.uint8),
                np.array(stamps, np.int64).reshape(-1, 3),
                listing.counts,
                np.frombuffer(listing.images.joined, np.uint8),
            )
            np.savez(file, **dict(zip(_ARRAYS, content, strict=True)))
        partial.replace(root / KEPT)
    except OSError as error:
        if seconds > _LONG:
            print(
                f"note: listing {root} took {seconds:.0f} s; the next start would be faster if {KEPT} could be kept "
                f"there ({error.strerror})",
                flush=True,
            )
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
