"""The list of images in a training folder, ROOT/PERSON/IMAGE, which large sets keep in a file for the next run.

Opening a hundred thousand folders takes minutes on some disks. Asking when each folder changed takes seconds. So the
list is kept in ROOT/.images.npz, with the inode and the times of change of each person's folder. Only folders that
differ in one of these are opened again. Adding, removing or renaming an image or a person changes them, and so does
copying the set. Writing into an image does not change them, and the list stays valid.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.console import logger
from util.errors import DataError
from util.files import open_regular
from util.progress import progress

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
INDEX_FILE = ".images.npz"
MIN_INDEXED = 100_000  # images; smaller sets are listed in a second or two, and get no index file
_FORMAT = f"1 {' '.join(IMAGE_SUFFIXES)}"
_CLOCK_TICK = 2_000_000_000  # nanoseconds: the coarsest clock of a file system, FAT's
_SLOW = 5  # seconds

FolderStat = tuple[int, int, int]  # a folder's inode, mtime_ns and ctime_ns; zeros if unknown


def pack_names(names: Iterable[str]) -> np.ndarray:
    """Return file names as one array (N,) of numpy's StringDType, each byte of a name as one character.

    Worker processes copy the memory that they write to. Reading a Python string writes its reference count, so a list
    of millions of names would be copied bit by bit. Bytes keep names that are not UTF-8, which StringDType refuses.
    """
    return np.array([os.fsencode(name).decode("latin-1") for name in names], dtype=np.dtypes.StringDType())


def unpack_name(packed: str) -> str:
    """Return an entry of pack_names() as the file name."""
    return os.fsdecode(packed.encode("latin-1"))


@dataclass(frozen=True)
class FolderIndex:
    """The P folders in ROOT and the N images in them, both in alphabetical order."""

    people: list[str]  # the folders' names, also of folders without images
    stats: list[FolderStat]
    counts: np.ndarray  # (P,) int64: images in each folder
    images: np.ndarray  # (N,) packed names of all images, folder by folder


def list_images(root: Path) -> FolderIndex:
    """List the images in ROOT. Raise DataError, naming the folder, if one cannot be read."""
    start_time = time.perf_counter()
    stored = _load(root / INDEX_FILE)
    found = []
    try:
        people, stats = _list_people(root)
        if (stored.people, stored.stats) == (people, stats):
            return stored
        stored_images = np.split(stored.images, np.cumsum(stored.counts)[:-1])
        known = dict(zip(zip(stored.people, stored.stats, strict=True), stored_images, strict=False))
        for folder in progress(list(zip(people, stats, strict=True)), f"listing {root.name}", "folders"):
            found.append(known[folder] if folder in known else _list_folder(f"{root}/{folder[0]}"))
    except OSError as error:
        place = error.filename or root
        raise DataError(f"{place}: cannot be read ({error.strerror}). Change that, or move it away.") from None
    counts = np.array([len(images) for images in found], np.int64)
    index = FolderIndex(people, stats, counts, np.concatenate([pack_names([]), *found]))
    if len(index.images) >= MIN_INDEXED:
        _save(root, index, time.perf_counter() - start_time)
    return index


def _list_people(root: Path) -> tuple[list[str], list[FolderStat]]:
    with os.scandir(root) as entries:
        folders = sorted((entry.name, entry.stat()) for entry in entries if entry.name[0] != "." and entry.is_dir())
    # Inodes of some file systems need all 64 bits, and int64 has 63 for them.
    stats = [(stat.st_ino & (2**63 - 1), stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in folders]
    return [name for name, _ in folders], stats


def _list_folder(folder: str) -> np.ndarray:
    """Return the packed names of a folder's images, without hidden files such as macOS's `._0001.jpg`."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    return pack_names(sorted(names))


def _load(path: Path) -> FolderIndex:
    """Load the index file, or return an empty index if it is missing, damaged, inconsistent or of another version."""
    try:
        descriptor, _ = open_regular(path)
        with open(descriptor, "rb") as file, np.load(file) as arrays:
            version, people, stats = arrays["format"], arrays["people"], arrays["stamps"]
            counts, images = arrays["counts"], arrays["images"]
        folders = [unpack_name(name) for name in people.tobytes().decode("latin-1").split("\0")[:-1]]
        names = np.array(images.tobytes().decode("latin-1").split("\0")[:-1], dtype=np.dtypes.StringDType())
        is_valid = (
            str(version) == _FORMAT
            and (people.dtype, images.dtype, stats.dtype, counts.dtype) == (np.uint8, np.uint8, np.int64, np.int64)
            and (stats.shape, counts.shape) == ((len(folders), 3), (len(folders),))
            # The limits come first, because a sum of huge counts could overflow to the right number.
            and 0 <= counts.min(initial=0) <= counts.max(initial=0) <= len(names)
            and len(names) == counts.sum()
            and images[-1:].sum() == 0  # the last name ends in its zero byte
            and not (images == ord("/")).any()
        )
    except Exception:  # numpy and zipfile raise all kinds for a damaged file, and listing again costs only time
        is_valid = False
    if not is_valid:
        return FolderIndex([], [], np.zeros(0, np.int64), pack_names([]))
    return FolderIndex(folders, list(map(tuple, stats.tolist())), counts, names)


def _join(names: Iterable[str]) -> np.ndarray:
    """Join packed names to one uint8 array, with a zero byte, which no file name has, after each name."""
    return np.frombuffer("".join(f"{name}\0" for name in names).encode("latin-1"), np.uint8)


def _save(root: Path, index: FolderIndex, seconds: float) -> None:
    """Write the index file atomically if ROOT is writable. `seconds`: how long it took to list the images.

    A folder that changed during the listing, or shortly before it, is stored as unknown: a later change in the same
    tick of the clock would leave the same times.
    """
    partial = root / f"{INDEX_FILE}.{os.getpid()}.partial"  # one for each process: all ranks open the set at once
    try:
        with partial.open("wb") as file:
            start_ns = os.fstat(file.fileno()).st_mtime_ns - int(seconds * 1e9)  # by the clock of the file system
            stats = [stat if max(stat[1:]) < start_ns - _CLOCK_TICK else (0, 0, 0) for stat in index.stats]
            np.savez(
                file,
                format=np.array(_FORMAT),
                people=_join(pack_names(index.people)),
                stamps=np.array(stats, np.int64).reshape(-1, 3),
                counts=index.counts,
                images=_join(index.images),
            )
        partial.replace(root / INDEX_FILE)
    except OSError as error:
        if seconds > _SLOW:
            faster = f"the next start would be faster if {INDEX_FILE} could be kept there ({error.strerror})"
            logger.info(f"note: listing {root} took {seconds:.0f} s; {faster}")
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
