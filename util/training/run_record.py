"""run.json: what a run was started with, where, and how it ended."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

from util.data.loader import TrainingImages
from util.files import atomic_write

_PACKAGES = ("torch", "torchvision", "numpy", "opencv-python", "Pillow", "scikit-learn")
_MAX_NAMES = 100_000


class RunRecord:
    """The file run.json of a run: {"sessions": [...]}, a session for the start and one for each resume.

    A `with` block is a session. A session whose `end` is null was killed, or is running.

    Args:
        path: the file. Sessions that it holds already stay.
        settings: of the program.
        data: what identifies the training data.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], data: Mapping[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._sessions = _read_sessions(path)
        self._session: dict[str, Any] = {
            "start": _now(),
            "end": None,
            "exit": None,
            "command": sys.orig_argv,
            "settings": dict(settings),
            "data": dict(data),
            "versions": _versions(),
            "revision": _git_revision(),
            "machine": _machine(),
        }
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Record that the session ends, and why: "finished", or the message of the error."""
        reason = "finished" if error is None else getattr(error, "message", "") or str(error) or type(error).__name__
        self._session |= {"end": _now(), "exit": reason}
        self._write()

    def _write(self) -> None:
        content = {"sessions": [*self._sessions, self._session]}
        with atomic_write(self._path) as partial:
            partial.write_text(json.dumps(content, indent=1, default=str) + "\n")


def describe_data(images: TrainingImages) -> dict[str, Any]:
    """Return what identifies a training set: where it is, its size, and the SHA-256 of its list of images.

    The list has the class of every image, and the names of up to 100,000 images, evenly spaced.
    """
    digest = hashlib.sha256("\0".join(images.classes).encode("utf-8", "surrogateescape"))
    digest.update(images.labels.astype("<i8").tobytes())
    root = str(images.root)
    for index in range(0, len(images), -(-len(images) // _MAX_NAMES)):
        digest.update(images.where(index).removeprefix(root).encode("utf-8", "surrogateescape"))
    return {"path": root, "images": len(images), "classes": len(images.classes), "sha256": digest.hexdigest()}


def _read_sessions(path: Path) -> list[Any]:
    """Return the sessions in a file, none if it is missing or damaged: a record never stops a run."""
    try:
        sessions = json.loads(path.read_text())["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sessions if isinstance(sessions, list) else []


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions | {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}


def _git_revision() -> str | None:
    """Return the commit of this code, with "+" if files differ from it; None outside of a git checkout."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus}
