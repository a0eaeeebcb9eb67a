"""Fetches published files over the network, and unpacks archives: whole, checked, and never outside their folder."""

import contextlib
import shutil
import socket
import tarfile
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from applications.prepare.checksum import sha256_of
from util.errors import DataError, RunError

TRIES = 3
PAUSE = 2.0  # seconds before the second try, and twice as long before each further one
_PATIENCE = 30  # seconds without a byte after which a server counts as silent


@dataclass(frozen=True)
class Remote:
    """A file on a server. `sha256`: of its content."""

    name: str
    url: str
    sha256: str


def fetch(remote: Remote, folder: Path) -> Path:
    """The file in `folder`, downloaded unless it is there already. It appears under its name when it is whole.

    Raises RunError after TRIES fruitless ones, or at once where another will not help, with what to do by hand.
    """
    from torch.hub import download_url_to_file

    path = folder / remote.name
    if path.is_file() and sha256_of(path) == remote.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{remote.name}.*.partial"):  # of a run that was killed
        leftover.unlink()
    for attempt in range(TRIES):
        try:
            print(f"downloading {remote.url} to {path}", flush=True)
            with _impatient():
                download_url_to_file(remote.url, str(path), remote.sha256)
            return path
        except (OSError, RuntimeError) as error:  # RuntimeError: the checksum
            reason = " ".join(str(error).split())
            if attempt + 1 == TRIES or (isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500):
                break
            print(f"{remote.name}: {reason}; trying again", flush=True)
            time.sleep(PAUSE * 2**attempt)
    raise RunError(
        f"{remote.url}: cannot be downloaded ({reason}); try later, or put {remote.name} (SHA-256 {remote.sha256}) "
        f"into {folder} by hand, or name what you have with --source"
    )


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """urllib waits for ever by default."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def unpack(archive: Path, top: str, folder: Path) -> Path:
    """FOLDER/TOP out of a .tgz whose files lie in TOP/. It appears when it is whole.

    DataError for an archive that is damaged, or has files that would lie elsewhere.
    """
    if (folder / top).is_dir():
        return folder / top
    partial = folder / f"{top}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tqdm(tar, f"unpacking {archive.name}", unit="file"):
                tar.extract(member, partial, filter="data")
        (partial / top).rename(folder / top)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{archive}: cannot be unpacked into {folder} ({' '.join(str(error).split())}); remove it and run the same "
            f"command again"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / top
