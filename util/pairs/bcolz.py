"""Read and write verification sets in the bcolz format, in which InsightFace and face.evoLVe publish them.

    lfw/meta/storage   JSON: type, images per chunk (chunklen), settings of the compression
    lfw/meta/sizes     JSON: shape, bytes before and after compression
    lfw/data/__N.blp   chunk N: a bloscpack header of 16 bytes, and a Blosc buffer
    lfw/__attrs__      JSON, empty
    lfw_list.npy       (P,) bool: True for a pair of the same person

numcodecs decompresses the chunks. The package bcolz is not needed; the tests compare with it where it is installed.
"""

import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numcodecs import blosc

from util.errors import DataError
from util.face import FACE_SIZE
from util.files import read_bytes
from util.pairs.images import check_shape

_SHAPE = (3, FACE_SIZE, FACE_SIZE)
_IMAGE_BYTES = 4 * 3 * FACE_SIZE * FACE_SIZE  # float32
_BLOSCPACK_HEADER = b"blpk\x01\0\0\0" + struct.pack("<q", 1)  # version 1, no checksum, one chunk
_BLOSC_HEADER_SIZE = 16
_COMPRESSION = {"clevel": 5, "shuffle": 1, "cname": "lz4", "quantize": 0}
_FIX = "Copy the set again, or make it again."


class CarrayPairs:
    """A bcolz array of float32 BGR NCHW images in [-1, 1] (InsightFace's convention), with PATH_list.npy next to it.

    Everything that can be checked without decompressing is checked when the set is opened, so that a damaged set
    raises DataError here and not after an epoch of training. Several threads may read at the same time.
    """

    def __init__(self, path: Path):
        self.name = path.name
        self.issame = _read_truth(path.with_name(f"{path.name}_list.npy"))
        self._path = path
        self._count = 2 * len(self.issame)
        self._images_per_chunk = _read_meta(path, self._count)
        for chunk in range(-(-self._count // self._images_per_chunk)):
            self._check_chunk(chunk)
        # The last chunk that was decompressed: pairs are read two images at a time, and a chunk may hold more.
        self._cached: tuple[int, np.ndarray] | None = None
        for index in (0, self._count - 1):
            image = self._read(index, index + 1)
            low = float(image.min())
            high = float(image.max())
            if not -1.01 <= low <= high <= 1.01:
                raise DataError(
                    f"{path}: image {index} has values from {low:g} to {high:g}, and they must lie in [-1, 1]. "
                    f"Store (pixel - 127.5) / 127.5."
                )

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop (counted in images, 0 to 2P) as (n, 112, 112, 3) RGB uint8."""
        bgr = self._read(start, stop)  # (n, 3, 112, 112) float32 in [-1, 1]
        pixels = np.empty((len(bgr), FACE_SIZE, FACE_SIZE, 3), np.uint8)
        for target, image in zip(pixels, bgr, strict=True):
            target[:] = cv2.merge(list(_to_uint8(image)[::-1]))  # planes in the order R, G, B
        return pixels

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Return images start to stop as they are stored: (n, 3, 112, 112) float32 BGR."""
        stop = min(stop, self._count)
        parts = [np.empty((0, *_SHAPE), np.float32)]
        while start < stop:
            chunk, first = divmod(start, self._images_per_chunk)
            part = self._read_chunk(chunk)[first : first + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _read_chunk(self, chunk: int) -> np.ndarray:
        """Decompress one chunk: (n, 3, 112, 112) float32 BGR."""
        cached = self._cached  # another thread may replace it at any time
        if cached is not None and cached[0] == chunk:
            return cached[1]
        file = self._chunk_file(chunk)
        content = read_bytes(file, _FIX)
        self._check_sizes(chunk, content, len(content))
        try:
            values = blosc.decompress(content[len(_BLOSCPACK_HEADER) :])
        except RuntimeError as error:
            raise DataError(f"{file}: cannot be decompressed ({error}). {_FIX}") from None
        images = np.frombuffer(values, np.float32).reshape(-1, *_SHAPE)
        self._cached = (chunk, images)
        return images

    def _check_chunk(self, chunk: int) -> None:
        """Raise DataError if the file of a chunk is missing, or is shorter or longer than it should be."""
        file = self._chunk_file(chunk)
        try:
            with file.open("rb") as opened:
                header = opened.read(len(_BLOSCPACK_HEADER) + _BLOSC_HEADER_SIZE)
            size = file.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{file}: missing. {_FIX}") from None
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}). {_FIX}") from None
        self._check_sizes(chunk, header, size)

    def _check_sizes(self, chunk: int, content: bytes, size: int) -> None:
        """Compare the sizes in a chunk's header with the file: the Blosc library itself trusts the header."""
        header = content[len(_BLOSCPACK_HEADER) :][:_BLOSC_HEADER_SIZE]
        if len(header) < _BLOSC_HEADER_SIZE:
            raise DataError(f"{self._chunk_file(chunk)}: cut short. {_FIX}")
        nbytes, _, cbytes = struct.unpack("<III", header[4:])
        if size != len(_BLOSCPACK_HEADER) + cbytes:
            raise DataError(f"{self._chunk_file(chunk)}: cut short. {_FIX}")
        images = min(self._images_per_chunk, self._count - chunk * self._images_per_chunk)
        if nbytes != images * _IMAGE_BYTES:
            raise DataError(f"{self._chunk_file(chunk)}: holds {nbytes} bytes, which are not {images} images. {_FIX}")

    def _chunk_file(self, chunk: int) -> Path:
        return self._path / "data" / f"__{chunk}.blp"


def _to_uint8(image: np.ndarray) -> np.ndarray:
    """Round (3, S, S) float32 in [-1, 1] to uint8 in one pass: ten times as fast as the same steps in numpy."""
    flat = image.reshape(-1, image.shape[-1])
    return cv2.addWeighted(src1=flat, alpha=127.5, src2=flat, beta=0, gamma=127.5, dtype=cv2.CV_8U).reshape(image.shape)


def write_carray(path: str | Path, images: Iterable[np.ndarray], issame: Iterable[bool]) -> None:
    """Write a verification set in the bcolz format. An unfinished set never has the name `path`.

    Args:
        path: the folder to write; the truth goes to `path`_list.npy next to it. An earlier set is replaced.
        images: (112, 112, 3) RGB uint8, two for each entry of `issame`.
        issame: True for a pair of the same person.

    Raises:
        DataError: an image has another shape, or the number of images is not twice the number of pairs.
    """
    path = Path(path)
    truth = np.asarray(list(issame), dtype=bool)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "data").mkdir(parents=True)
        (partial / "meta").mkdir()
        count = 0
        compressed_bytes = 0
        for image in images:
            check_shape(image.shape, f"{path}: image {count} (from 0)")
            bgr = image[:, :, ::-1].transpose(2, 0, 1).astype(np.float32, order="C")
            buffer = blosc.compress(
                (bgr - 127.5) / 127.5,
                cname=str(_COMPRESSION["cname"]).encode(),
                clevel=_COMPRESSION["clevel"],
                shuffle=_COMPRESSION["shuffle"],
            )
            (partial / "data" / f"__{count}.blp").write_bytes(_BLOSCPACK_HEADER + buffer)
            compressed_bytes += len(buffer)
            count += 1
        if count != 2 * len(truth):
            raise DataError(f"{path}: {count} images for {len(truth)} pairs. A pair is two images.")
        storage = {"dtype": "float32", "cparams": _COMPRESSION, "chunklen": 1, "expectedlen": 0, "dflt": 0.0}
        # bcolz counts its buffer of one chunk among the compressed bytes.
        sizes = {"shape": [count, *_SHAPE], "nbytes": count * _IMAGE_BYTES, "cbytes": compressed_bytes + _IMAGE_BYTES}
        (partial / "meta" / "storage").write_text(json.dumps(storage) + "\n")
        (partial / "meta" / "sizes").write_text(json.dumps(sizes) + "\n")
        (partial / "__attrs__").write_text("{}\n")
        shutil.rmtree(path, ignore_errors=True)
        np.save(path.with_name(f"{path.name}_list.npy"), truth)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_truth(path: Path) -> np.ndarray:
    """Read the list of a set, (P,) bool."""
    if not path.is_file():
        raise DataError(f"{path}: missing. Put the list of same (True) and different (False) pairs next to its set.")
    try:
        with path.open("rb") as file:
            truth = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy raises errors of many classes for a crafted header
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a numpy array of booleans ({reason}). {_FIX}") from None
    is_list = truth.ndim == 1 and len(truth) > 0 and truth.dtype.kind in "biuf"
    if not is_list or not np.isin(truth, (0, 1)).all():
        raise DataError(
            f"{path}: must hold one True or False a pair, and has shape {truth.shape} and type {truth.dtype}. {_FIX}"
        )
    return truth.astype(bool)


def _read_meta(path: Path, count: int) -> int:
    """Return the images per chunk. Raise DataError unless the array holds `count` images of float32."""
    try:
        storage: Any = json.loads((path / "meta" / "storage").read_bytes())
        shape = json.loads((path / "meta" / "sizes").read_bytes())["shape"]
        dtype = storage["dtype"]
        images_per_chunk = storage["chunklen"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: meta/ is damaged ({type(error).__name__}: {error}). {_FIX}") from None
    if dtype != "float32":
        raise DataError(f"{path}: holds {dtype!r}, but a verification set holds 'float32'. Make the set again.")
    if shape != [count, *_SHAPE]:
        raise DataError(
            f"{path}: shape {tuple(shape) if isinstance(shape, list) else shape!r} does not fit its list of "
            f"{count // 2} pairs, which needs {(count, *_SHAPE)}. {_FIX}"
        )
    if type(images_per_chunk) is not int or images_per_chunk < 1:
        raise DataError(f"{path}: meta/ is damaged (chunklen is {images_per_chunk!r}). {_FIX}")
    return images_per_chunk
