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
from util.progress import progress

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
INDEX_FILE = ".images.npz"
MIN_INDEXED = 100_000  # images; smaller sets are listed in a second or two, and get no index file
_FORMAT = f"1 {' '.join(IMAGE_SUFFIXES)}"
_CLOCK_TICK = 2_000_000_000  # nanoseconds: the coarsest clock of a file system, FAT's
_SLOW = 5  # seconds

FolderStat = tuple[int, int, int]  # a folder's inode, mtime_ns and ctime_ns
_UNKNOWN: FolderStat = (0, 0, 0)


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
    """The P folders in ROOT and the N images in them, both in alphabetical order.

    `people`: the folders' names, also of folders without images; `stats`: of each folder; `counts` (P,) int64: images
    in each folder; `images` (N,): the packed names of all images, folder by folder.
    """

    people: list[str]
    stats: list[FolderStat]
    counts: np.ndarray
    images: np.ndarray


def list_images(root: Path) -> FolderIndex:
    """List the images in ROOT. Raise DataError, naming the folder, if one cannot be read."""
    start_time = time.perf_counter()
    people, stats = _list_people(root)
    stored = _load(root / INDEX_FILE)
    known: dict[tuple[str, FolderStat], np.ndarray] = {}
    if stored is not None:
        if (stored.people, stored.stats) == (people, stats):
            return stored
        images_by_folder = np.split(stored.images, np.cumsum(stored.counts)[:-1])
        known = dict(zip(zip(stored.people, stored.stats, strict=True), images_by_folder, strict=False))
    found = [pack_names([])]
    for folder in progress(list(zip(people, stats, strict=True)), f"listing {root.name}", "folders"):
        if folder in known:
            found.append(known[folder])
        else:
            found.append(_list_folder(f"{root}/{folder[0]}"))
    counts = np.array([len(images) for images in found[1:]], np.int64)
    index = FolderIndex(people, stats, counts, np.concatenate(found))
    if len(index.images) >= MIN_INDEXED:
        _save(root, index, time.perf_counter() - start_time)
    return index


def _list_people(root: Path) -> tuple[list[str], list[FolderStat]]:
    try:
        with os.scandir(root) as entries:
            folders = sorted((entry.name, entry.stat()) for entry in entries if entry.name[0] != "." and entry.is_dir())
    except OSError as error:
        raise _unreadable(error, str(root)) from None
    # Inodes of some file systems need all 64 bits, and int64 has 63 for them.
    stats = [(stat.st_ino & (2**63 - 1), stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in folders]
    return [name for name, _ in folders], stats


def _list_folder(folder: str) -> np.ndarray:
    """Return the packed names of a folder's images, without hidden files such as macOS's `._0001.jpg`."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    except OSError as error:
        raise _unreadable(error, folder) from None
    return pack_names(sorted(names))


def _unreadable(error: OSError, folder: str) -> DataError:
    return DataError(f"{error.filename or folder}: cannot be read ({error.strerror}). Change that, or move it away.")


def _join(names: Iterable[str]) -> np.ndarray:
    """Join packed names to one uint8 array, with a zero byte, which no file name has, after each name."""
    return np.frombuffer("".join(f"{name}\0" for name in names).encode("latin-1"), np.uint8)


def _split(array: np.ndarray) -> list[str]:
    """Split an array of _join() to packed names."""
    return array.tobytes().decode("latin-1").split("\0")[:-1]


def _load(path: Path) -> FolderIndex | None:
    """Load the index file, or return None if it is missing, damaged, inconsistent or of another version."""
    try:
        with np.load(path) as arrays:
            version, people, stats = arrays["format"], arrays["people"], arrays["stamps"]
            counts, images = arrays["counts"], arrays["images"]
        folders = [unpack_name(name) for name in _split(people)]
        names = np.array(_split(images), dtype=np.dtypes.StringDType())
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
        return None
    return FolderIndex(folders, list(map(tuple, stats.tolist())), counts, names) if is_valid else None


def _save(root: Path, index: FolderIndex, seconds: float) -> None:
    """Write the index file atomically if ROOT is writable. `seconds`: how long it took to list the images.

    A folder that changed during the listing, or shortly before it, is stored as unknown: a later change in the same
    tick of the clock would leave the same times.
    """
    partial = root / f"{INDEX_FILE}.{os.getpid()}.partial"  # one for each process: all ranks open the set at once
    try:
        with partial.open("wb") as file:
            start_ns = os.fstat(file.fileno()).st_mtime_ns - int(seconds * 1e9)  # by the clock of the file system
            stats = [stat if max(stat[1:]) < start_ns - _CLOCK_TICK else _UNKNOWN for stat in index.stats]
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
            logger.info(
                f"note: listing {root} took {seconds:.0f} s; the next start would be faster if {INDEX_FILE} could be "
                f"kept there ({error.strerror})"
            )
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
