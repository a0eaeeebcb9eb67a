"""The lock of a run: one process at a time writes checkpoints/RUN."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from util.console import logger
from util.errors import RunError

LOCK_FILE = "run.lock"
_held: set[Path] = set()  # by this process


@contextmanager
def lock_folder(checkpoints: Path, wait: float = 0) -> Iterator[None]:
    """Hold the lock of checkpoints/RUN. It ends with the process, however that ends, and forked processes lack it.

    Raise RunError if another process still holds it after `wait` seconds.
    """
    path = checkpoints.resolve() / LOCK_FILE
    if path in _held:  # to open and close the file once more would release the lock
        yield
        return
    deadline = time.monotonic() + wait
    while (file := _open_locked(path)) is None:
        if time.monotonic() >= deadline:
            holder = path.read_text() if path.exists() else "another process"
            raise RunError(f"{checkpoints}: {holder} writes this run. Stop it, or wait for it.")
        time.sleep(0.1)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)
            path.unlink(missing_ok=True)


def _open_locked(path: Path) -> TextIO | None:
    """Open and lock a file. Return None if another process holds the lock, or has just removed the file."""
    file = path.open("a+")
    with suppress(FileNotFoundError):
        if _try_to_lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    file.close()
    return None


def _try_to_lock(file: TextIO) -> bool:
    """Return False if another process holds the lock. Warn if the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning(
            f"{file.name}: cannot be locked ({error.strerror}). Start no second process that writes this run."
        )
    return True
