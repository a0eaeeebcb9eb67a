"""SHA-256 of files."""

import hashlib
from pathlib import Path

from util.errors import DataError


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. DataError names one that cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); name the right file") from None
