"""Files that are written whole or not at all, in places that were tried beforehand."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from util.errors import DataError, UsageError

_PLOT_SUFFIXES = (".png", ".pdf", ".svg")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, whose file takes the place of `path` if the block ends well.

    with replacing(path) as partial:
        partial.write_text(...)
    """
    path = path.resolve()  # a link stays one, and what it points to is replaced
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def path_inside(folder: Path, relative: str | Path, named_in: str | Path = "") -> Path:
    """Return `folder / relative`, where a file is about to be written.

    Args:
        folder: may be reached through a link itself.
        relative: as it was read from a list or a name on disk; `a/../b` is the same as `b`.
        named_in: the file that gives the name, for the message.

    Raises:
        DataError: the place is not inside the folder: by `..`, by an absolute path, or by a link in the folder.
    """
    relative = os.path.normpath(relative)
    path = folder / relative
    root = os.path.realpath(folder)
    is_outside = os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir
    if is_outside or not Path(os.path.realpath(path)).is_relative_to(root):
        reason = "leads out of that folder" if is_outside else "is a link out of that folder, or lies behind one"
        remedy = "Correct the name, or name a folder that holds all images" if is_outside else "Remove the link"
        name = f"{named_in}: {relative}" if named_in else relative
        name = name.encode("utf-8", "backslashreplace").decode()
        raise DataError(f"{name}: would be written into {folder}, but {reason}. {remedy}.")
    return path


def require_writable_dir(flag: str, folder: str | Path) -> None:
    """Makes the folder and tries to write into it; UsageError if that fails: before the work, not after it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag}={folder}: cannot be written to ({error.strerror}); name another folder") from None


def check_source_and_dest(source_flag: str, source: Path, flag: str, folder: Path) -> None:
    """Raises UsageError unless source is a folder and `folder` one to write into that does not hold it."""
    if not source.is_dir():
        raise UsageError(f"{source_flag}={source}: no such folder; name one with images")
    if source.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{flag}={folder}: holds the source, whose images could be overwritten; name another")
    require_writable_dir(flag, folder)


def check_report_paths(json: str | None, plot: str | None) -> None:
    """Raises UsageError for a file of --json or --plot that could not be written: before the work, not after it."""
    for flag, file in (("--json", json), ("--plot", plot)):
        if file is not None:
            require_writable_file(flag, file)
    if plot is not None and Path(plot).suffix.lower() not in _PLOT_SUFFIXES:
        raise UsageError(f"--plot={plot}: must end in {', '.join(_PLOT_SUFFIXES)}; rename it")


def require_writable_file(flag: str, file: str | Path) -> None:
    """The same for a file to be written, which may exist already."""
    path = Path(file)
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag}={file}: is a folder or a device; name a file")
    require_writable_dir(flag, path.parent)
