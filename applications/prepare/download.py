"""Download published files with their checksums, and unpack archives safely."""

import shutil
import socket
import tarfile
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from util.errors import DataError, RunError
from util.files import sha256

MAX_BYTES, MAX_FILES = 2 * 2**30, 200_000  # that an archive may declare: ten times as much as LFW has
TRIES = 3
PAUSE = 2.0  # seconds before the second try, doubled for each further try
_TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Remote:
    """A file on a server, with the SHA-256 of its content."""

    name: str
    url: str
    sha256: str


def fetch(remote: Remote, folder: Path) -> Path:
    """Return the path of the file in `folder`. Download it atomically unless it is there with the right checksum.

    Raises RunError after TRIES tries, or at once if another try will not help.
    """
    from torch.hub import download_url_to_file

    path = folder / remote.name
    if path.is_file() and sha256(path) == remote.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{remote.name}.*.partial"):  # of a run that was killed
        leftover.unlink()
    timeout = socket.getdefaulttimeout()
    for attempt in range(TRIES):
        try:
            print(f"downloading {remote.url} to {path}", flush=True)
            socket.setdefaulttimeout(_TIMEOUT)  # urllib has none
            download_url_to_file(remote.url, str(path), remote.sha256)
            return path
        except (OSError, RuntimeError) as error:  # RuntimeError: the checksum
            reason = " ".join(str(error).split())
            if attempt + 1 == TRIES or (isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500):
                break
            print(f"{remote.name}: {reason}; trying again", flush=True)
            time.sleep(PAUSE * 2**attempt)
        finally:
            socket.setdefaulttimeout(timeout)
    raise RunError(
        f"{remote.url}: cannot be downloaded ({reason}). Try later, or put {remote.name} (SHA-256 {remote.sha256}) "
        f"into {folder} by hand, or name an existing copy with --source."
    )


def unpack(archive: Path, top: str, folder: Path) -> Path:
    """Unpack a .tgz whose files are in TOP/ and return FOLDER/TOP. The folder appears when it is complete.

    Raises DataError if the archive is damaged or too large, has a link or a device, or has files outside `top`.
    """
    if (folder / top).is_dir():
        return folder / top
    partial = folder / f"{top}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    declared = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for count, member in enumerate(tqdm(tar, f"unpacking {archive.name}", unit="file")):
                declared += member.size
                if declared > MAX_BYTES or count >= MAX_FILES:
                    raise DataError(f"declares more than {MAX_BYTES} bytes or {MAX_FILES} files")
                if not (member.isfile() or member.isdir()):
                    raise DataError(f"{member.name} is a link or a device")
                tar.extract(member, partial, filter="data")
        (partial / top).rename(folder / top)
    except Exception as error:  # tarfile raises many types for damaged archives
        raise DataError(
            f"{archive}: cannot be unpacked into {folder} ({' '.join(str(error).split())}). Remove it and run the same "
            f"command again."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / top
