"""Verification sets as bcolz arrays: read, and written so that InsightFace and face.evoLVe read them too."""

import json
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from util.errors import DataError
from util.pairs.images import FACE_SIZE, check_shape

_BLOSCPACK_HEADER = 16  # bytes before the Blosc frame in each chunk file of a carray


class CarrayPairs:
    """A bcolz carray of float32 BGR NCHW images in [-1, 1] (InsightFace's convention), beside PATH_list.npy.

    Everything that can be seen without decompressing is checked when the set is opened: a carray that bcolz would
    crash on, or whose pairs do not match its list, raises DataError here and not after an epoch of training.
    """

    def __init__(self, path: Path):
        self.name = path.name
        self._path = path
        self.issame = _read_truth(path.with_name(f"{path.name}_list.npy"))
        _check_storage(path, images=2 * len(self.issame))
        self._opened = threading.local()
        for index in (0, 2 * len(self.issame) - 1):
            image = self._carray()[index]
            low, high = float(image.min()), float(image.max())
            if not -1.01 <= low <= high <= 1.01:
                raise DataError(
                    f"{path}: image {index} has values from {low:g} to {high:g}, and they must lie in [-1, 1]; "
                    f"store (pixel - 127.5) / 127.5"
                )

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        try:
            bgr = self._carray()[start:stop]  # (n, 3, 112, 112) float32 in [-1, 1]
        except RuntimeError as error:
            raise DataError(
                f"{self._path}: images {start} to {stop} cannot be read ({error}); make the set anew"
            ) from None
        pixels = np.empty((len(bgr), FACE_SIZE, FACE_SIZE, 3), np.uint8)
        for place, image in zip(pixels, bgr, strict=True):
            place[:] = cv2.merge(_levels(image)[::-1])
        return pixels

    def _carray(self) -> Any:
        """The carray, opened once in each thread: it keeps what it last decompressed, and knows of no other thread."""
        if not hasattr(self._opened, "carray"):
            self._opened.carray = import_bcolz().carray(rootdir=str(self._path), mode="r")
        return self._opened.carray


def _levels(image: np.ndarray) -> np.ndarray:
    """(3, S, S) float32 in [-1, 1] -> uint8, rounded, in one pass: a tenth of the time that numpy's steps take."""
    flat = image.reshape(-1, image.shape[-1])
    return cv2.addWeighted(flat, 127.5, flat, 0, 127.5, dtype=cv2.CV_8U).reshape(image.shape)


def write_carray(path: str | Path, images: Iterable[np.ndarray], issame: Iterable[bool]) -> None:
    """Writes RGB uint8 (112, 112, 3) images, two for each entry of `issame`, as the carray `path` + `path`_list.npy.

    The carray is written under a temporary name and renamed, so that a set that exists is a whole one.
    """
    path = Path(path)
    truth = np.asarray(list(issame), dtype=bool)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    bcolz = import_bcolz()
    try:
        carray = bcolz.carray(
            np.empty((0, 3, FACE_SIZE, FACE_SIZE), np.float32),
            rootdir=str(partial),
            mode="w",
            chunklen=1,
            cparams=bcolz.cparams(clevel=5, cname="lz4"),
        )
        for index, image in enumerate(images):
            check_shape(image.shape, f"{path}: image {index} (from 0)")
            bgr = image[:, :, ::-1].transpose(2, 0, 1).astype(np.float32)
            carray.append(((bgr - 127.5) / 127.5)[None])
        carray.flush()
        if len(carray) != 2 * len(truth):
            raise DataError(f"{path}: {len(carray)} images for {len(truth)} pairs; a pair is two images")
        shutil.rmtree(path, ignore_errors=True)
        np.save(path.with_name(f"{path.name}_list.npy"), truth)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_truth(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path}: missing; the list of same (True) and different (False) pairs belongs beside its set")
    try:
        truth = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a numpy array of booleans ({error})") from None
    if truth.ndim != 1 or len(truth) == 0 or not np.isin(truth, (0, 1)).all():
        raise DataError(
            f"{path}: must hold one True or False a pair, and has shape {truth.shape} and type {truth.dtype}"
        )
    return truth.astype(bool)


def _check_storage(path: Path, images: int) -> None:
    try:
        storage = json.loads((path / "meta" / "storage").read_text())
        shape = json.loads((path / "meta" / "sizes").read_text())["shape"]
        dtype, chunklen = storage["dtype"], max(1, storage["chunklen"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: meta/ is damaged ({error!r}); make the set anew") from None
    if dtype != "float32":
        raise DataError(f"{path}: holds {dtype!r}, and a verification set holds 'float32'")
    if list(shape) != [images, 3, FACE_SIZE, FACE_SIZE]:
        raise DataError(
            f"{path}: shape {tuple(shape)} does not fit its list of {images // 2} pairs, which needs "
            f"{(images, 3, FACE_SIZE, FACE_SIZE)}"
        )
    for index in range(-(-images // chunklen)):
        _check_chunk(path / "data" / f"__{index}.blp")


def _check_chunk(path: Path) -> None:
    """Compares a chunk's length to the one in its Blosc header: bcolz crashes the process on a chunk cut short."""
    try:
        with path.open("rb") as file:
            header = file.read(_BLOSCPACK_HEADER + 16)
    except OSError:
        raise DataError(f"{path}: missing; copy the set again, or make it anew") from None
    whole = _BLOSCPACK_HEADER + int.from_bytes(header[-4:], "little")
    if len(header) < _BLOSCPACK_HEADER + 16 or path.stat().st_size != whole:
        raise DataError(f"{path}: cut short; copy the set again, or make it anew")


def import_bcolz() -> ModuleType:
    """The package bcolz. Raises DataError, with the remedy, where it is not installed."""
    try:
        import bcolz
    except ImportError:
        raise DataError(
            "verification sets in bcolz form need the package bcolz: pip install bcolz-zipline (it has wheels for "
            "Python 3.11 and 3.12; use one of those)"
        ) from None
    return bcolz
