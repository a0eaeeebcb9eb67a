"""Atomic writes, readers with one-line errors, checks of destinations, and `Provenance`."""

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import DataError, RunError, UsageError

_PLOT_SUFFIXES = (".png", ".pdf", ".svg")
_TEMPORARY = re.compile(r"\.(\d+)\.(?:partial|ready)")  # the process that wrote the file

# What a disk that cannot be written to answers, and what to do.
_DISK_ERRORS = {
    errno.ENOSPC: ("no space left on the disk", "Free some space"),
    errno.EDQUOT: ("the quota of the disk is used up", "Free some space"),
    errno.EROFS: ("the disk is read-only", "Make it writable"),
}


@contextmanager
def atomic_write(path: Path, sync: bool = True, then: str = "start the same command again") -> Iterator[Path]:
    """Yield a temporary file name next to `path`; the file replaces `path` if the block ends without an error.

    with atomic_write(path) as partial:
        partial.write_text(...)

    The arguments are those of atomic_write_all().
    """
    with atomic_write_all([path], sync, then) as (partial,):
        yield partial


@contextmanager
def atomic_write_all(
    paths: Sequence[Path], sync: bool = True, then: str = "start the same command again"
) -> Iterator[list[Path]]:
    """Yield temporary names for files that belong together: at the end all files replace `paths`, or none.

    All files are on the disk, and not only in memory, before the first is renamed. If the process is killed between the
    first rename and the last, finish_writes() does the rest.

    Args:
        paths: files of one folder, in the order in which they are renamed.
        sync: wait for the disk. False is for files that are many and can be made again.
        then: what a user can do after room was made on a full disk.

    Raises:
        RunError: the disk is full, read-only or broken.
    """
    paths = [path.resolve() for path in paths]  # a link stays a link, and the file it points to is replaced
    # The process id keeps two writers apart.
    partials = [path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}") for path in paths]
    ready = paths[0]
    if len(paths) > 1:
        ready = partials[-1].with_name(partials[-1].name.replace(".partial", ".ready"))
    try:
        yield partials
        if sync:
            for partial in partials:
                _sync(partial)
        partials[-1].replace(ready)
    except BaseException as error:
        if len(paths) == 1 or not ready.exists():
            for partial in partials:
                partial.unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
            raise
        reason, remedy = _DISK_ERRORS[error.errno]
        raise RunError(f"{paths[0]}: {reason} ({error.strerror}). {remedy}, and {then}.") from None
    if sync:
        _sync(paths[0].parent)
    if len(paths) > 1:
        for partial, path in zip([*partials[:-1], ready], paths, strict=True):
            partial.replace(path)
        if sync:
            _sync(paths[0].parent)


def finish_writes(folder: Path) -> None:
    """Rename what an atomic_write_all() that was killed has left to rename. Only one process may write the folder."""
    for ready in folder.glob(".*.ready*"):
        if pid := _TEMPORARY.search(ready.name):
            for file in [*folder.glob(f".*.{pid[1]}.partial*"), ready]:
                file.replace(folder / _TEMPORARY.sub("", file.name)[1:])
            _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do that
            raise
    finally:
        os.close(descriptor)


def open_regular(path: Path, max_bytes: int | None = None) -> tuple[int, int]:
    """Return a descriptor of a file, for reading, and the size of the file.

    Raises:
        OSError: the file is larger than `max_bytes`, or a FIFO or a device, which may never end.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    reason = ""
    if not stat.S_ISREG(status.st_mode):
        reason = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    elif max_bytes is not None and status.st_size > max_bytes:
        reason = f"{status.st_size} bytes, and at most {max_bytes} are read"
    if reason:
        os.close(descriptor)
        raise OSError(errno.EINVAL, reason, str(path))
    return descriptor, status.st_size


def read_bytes(path: Path, fix: str, max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file of at most `max_bytes`. Raise DataError, ending in `fix`, if that fails."""
    try:
        descriptor, size = open_regular(path, max_bytes)
        try:
            content = os.read(descriptor, size)
            while len(content) < size and (more := os.read(descriptor, size - len(content))):
                content += more  # beyond 2 GiB
        finally:
            os.close(descriptor)
        return content
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {fix}") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raise DataError if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Name the right file.") from None


def format_names(names: Sequence[object], limit: int, separator: str = ", ") -> str:
    """Return the first `limit` names in one text: "a, b, c and 4 more"."""
    text = separator.join(str(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


@dataclass(frozen=True)
class Provenance:
    """A JSON file with the settings that the files next to it were made with.

    A later run with the same settings may continue there, a run with other settings may not. Only the keys of
    `settings` are compared: the file may hold more.
    """

    path: Path
    settings: Mapping[str, Any]
    indent: int | None = None

    def recorded(self) -> dict[str, Any] | None:
        """Return what the file holds, or None if it is missing or damaged."""
        try:
            content = json.loads(self.path.read_text("utf-8", "surrogateescape"))
        except (OSError, ValueError, RecursionError):
            return None
        return content if isinstance(content, dict) else None

    def matches(self) -> bool:
        """Return whether the file records the same settings."""
        recorded = self.recorded()
        return recorded is not None and all(recorded.get(name) == value for name, value in self.settings.items())

    def check(self, place: str | Path, fix: str) -> None:
        """Raise UsageError unless the file records the same settings.

        Args:
            place: the folder, with its flag, that the message begins with: "--out=faces".
            fix: the sentence that the message ends in: "Name another folder."
        """
        recorded = self.recorded()
        if recorded is None:
            raise UsageError(f"{place}: {self.path.name} is missing or damaged. {fix}")
        for name, value in self.settings.items():
            before = recorded.get(name)
            if before != value:
                # Long enough for paths, whose ends differ.
                change = f"{name} {before!s:.200}, not {value!s:.200}"
                raise UsageError(f"{place}: was made with other settings ({self.path.name}: {change}). {fix}")

    def write(self) -> None:
        """Write the settings to the file."""
        text = json.dumps(self.settings, indent=self.indent, ensure_ascii=False)
        with atomic_write(self.path) as partial:
            partial.write_text(text + "\n", "utf-8", "surrogateescape")

    def check_or_write(self, place: str | Path, fix: str) -> None:
        """Compare the settings with the file where it exists, as `check` does, and write the file where it does not."""
        if self.path.exists():
            self.check(place, fix)
        else:
            self.write()


def path_inside(folder: Path, relative: str | Path, list_file: str | Path = "") -> Path:
    """Return `folder / relative`, where a file is about to be written.

    Args:
        folder: may be reached through a link itself.
        relative: as it was read from a list or a name on disk; `a/../b` is the same as `b`.
        list_file: the file that gives the name, for the message.

    Raises:
        DataError: the place is not inside the folder: by `..`, by an absolute path, or by a link in the folder.
    """
    relative = os.path.normpath(relative)
    path = folder / relative
    root = os.path.realpath(folder)
    is_outside = os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir
    if is_outside or not Path(os.path.realpath(path)).is_relative_to(root):
        reason = "leads out of that folder" if is_outside else "is a link out of that folder, or lies behind one"
        fix = "Correct the name, or name a folder that holds all images" if is_outside else "Remove the link"
        name = f"{list_file}: {relative}" if list_file else relative
        name = name.encode("utf-8", "backslashreplace").decode()
        raise DataError(f"{name}: would be written into {folder}, but {reason}. {fix}.")
    return path


def require_writable_dir(flag: str, folder: str | Path) -> None:
    """Make the folder and write a test file into it, before the long work. Raise UsageError if that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag}={folder}: cannot be written to ({error.strerror}). Name another folder.") from None


def require_writable_file(flag: str, file: str | Path) -> None:
    """Raise UsageError if the file, which may exist already, cannot be written."""
    path = Path(file)
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag}={file}: is a folder or a device. Name a file.")
    require_writable_dir(flag, path.parent)


def check_source_and_dest(source_flag: str, source: Path, flag: str, folder: Path) -> None:
    """Check a source folder and a destination folder before the work.

    Args:
        source_flag: the flag that names the source, for the message.
        source: the folder to read from.
        flag: the flag that names the destination, for the message.
        folder: the folder to write into. It is made if it is missing.

    Raises:
        UsageError: the source is missing, the destination holds the source, or the destination cannot be written to.
    """
    if not source.is_dir():
        raise UsageError(f"{source_flag}={source}: no such folder. Name a folder with images.")
    if source.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{flag}={folder}: holds the source, whose images could be overwritten. Name another folder.")
    require_writable_dir(flag, folder)


def check_report_paths(json_file: str | None, plot: str | None, report: str | None = None) -> None:
    """Raise UsageError if a file of --json, --plot or --report cannot be written: before the work, not after it."""
    for flag, file in (("--json", json_file), ("--plot", plot), ("--report", report)):
        if file is not None:
            require_writable_file(flag, file)
    if plot is not None and Path(plot).suffix.lower() not in _PLOT_SUFFIXES:
        raise UsageError(f"--plot={plot}: must end in {', '.join(_PLOT_SUFFIXES)}. Rename it.")
