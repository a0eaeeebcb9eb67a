"""Read and write verification sets in the bcolz format, in which InsightFace and face.evoLVe publish them.

    lfw/meta/storage   JSON: type, images per chunk (chunklen), settings of the compression
    lfw/meta/sizes     JSON: shape, bytes before and after compression
    lfw/data/__N.blp   chunk N: a bloscpack header of 16 bytes, and a Blosc buffer
    lfw/__attrs__      JSON, empty
    lfw_list.npy       (P,) bool: True for a pair of the same person

numcodecs decompresses the chunks. The package bcolz is not needed; the tests compare with it where it is installed.
"""

import io
import json
import os
import shutil
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numcodecs import blosc

from util.errors import DataError
from util.face import FACE_SIZE
from util.pairs.images import PairSet, check_shape, read_regular

_SHAPE = (3, FACE_SIZE, FACE_SIZE)
_IMAGE_BYTES = 4 * 3 * FACE_SIZE * FACE_SIZE  # float32
_BLOSCPACK_HEADER = b"blpk\x01\0\0\0" + struct.pack("<q", 1)  # version 1, no checksum, one chunk
_BLOSCPACK_SIZE = len(_BLOSCPACK_HEADER)
_HEADER = struct.Struct("<20xI4xI")  # both headers: bytes after and before decompression
_MAX_META = 1 << 20  # bytes of a file in meta/, which has 200
_MAX_LIST = 1 << 26  # bytes of a list, which has one for each pair
_MAX_CHUNK = 1 << 31  # bytes of a chunk: the limit of Blosc
_FIX = "Copy the set again, or make it again."


class CarrayPairs(PairSet):
    """A bcolz array of float32 BGR NCHW images in [-1, 1] (InsightFace's convention), with PATH_list.npy next to it.

    Opening checks all that can be checked without decompressing. Several threads may read at the same time.
    """

    def __init__(self, path: Path):
        self.name = path.name
        self.issame = _read_truth(_list_file(path))
        self._path = path
        self._count = 2 * len(self.issame)
        self._images_per_chunk = _read_meta(path, self._count)
        for chunk in range(-(-self._count // self._images_per_chunk)):
            self._read_file(chunk, length=_HEADER.size)
        # A chunk may hold more images than one, and the threads of an evaluation read different chunks.
        self._read_chunk = lru_cache(maxsize=8)(self._decompress)
        for index in (0, self._count - 1):
            image = self._read(index)
            low, high = float(image.min()), float(image.max())
            if not -1.01 <= low <= high <= 1.01:
                raise DataError(
                    f"{path}: image {index} has values from {low:g} to {high:g}, and they must lie in [-1, 1]. "
                    f"Store (pixel - 127.5) / 127.5."
                )

    def _image(self, index: int) -> np.ndarray:
        # One pass to uint8: ten times as fast as the same steps in numpy.
        flat = self._read(index).reshape(-1, FACE_SIZE)
        rounded = cv2.addWeighted(src1=flat, alpha=127.5, src2=flat, beta=0, gamma=127.5, dtype=cv2.CV_8U)
        return cv2.merge(list(rounded.reshape(_SHAPE)[::-1]))  # planes in the order R, G, B

    def _read(self, index: int) -> np.ndarray:
        """Return an image in its stored form: (3, 112, 112) float32 BGR."""
        chunk, position = divmod(index, self._images_per_chunk)
        return self._read_chunk(chunk)[position]

    def _decompress(self, chunk: int) -> np.ndarray:
        """Return the images of a chunk, (n, 3, 112, 112) float32 BGR."""
        content = self._read_file(chunk)
        try:
            values = blosc.decompress(content[_BLOSCPACK_SIZE:])
        except RuntimeError as error:
            raise DataError(f"{self._chunk_file(chunk)}: cannot be decompressed ({error}). {_FIX}") from None
        return np.frombuffer(values, np.float32).reshape(-1, *_SHAPE)

    def _read_file(self, chunk: int, length: int = -1) -> bytes:
        """Return the file of a chunk, or its start. Compare the sizes in its header first: Blosc trusts them."""
        file = self._chunk_file(chunk)
        content = read_regular(file, _MAX_CHUNK, fix=_FIX, length=length)
        size = len(content) if length < 0 else file.stat().st_size
        nbytes, cbytes = _HEADER.unpack_from(content.ljust(_HEADER.size, b"\0"))
        if size != _BLOSCPACK_SIZE + cbytes:
            raise DataError(f"{file}: cut short. {_FIX}")
        images = min(self._images_per_chunk, self._count - chunk * self._images_per_chunk)
        if nbytes != images * _IMAGE_BYTES:
            raise DataError(f"{file}: holds {nbytes} bytes, which are not {images} images. {_FIX}")
        return content

    def _chunk_file(self, chunk: int) -> Path:
        return self._path / "data" / f"__{chunk}.blp"


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
    partial = path.with_name(f"{path.name}.partial")
    truth = np.asarray(list(issame), dtype=bool)
    path.parent.mkdir(parents=True, exist_ok=True)
    _finish_writing(path, partial)  # what a killed program left
    try:
        (partial / "data").mkdir(parents=True)
        (partial / "meta").mkdir()
        count = 0
        compressed_bytes = 0
        for image in images:
            check_shape(image.shape, f"{path}: image {count} (from 0)")
            bgr = image[:, :, ::-1].transpose(2, 0, 1).astype(np.float32, order="C")
            buffer = blosc.compress((bgr - 127.5) / 127.5, cname=b"lz4", clevel=5, shuffle=1)
            (partial / "data" / f"__{count}.blp").write_bytes(_BLOSCPACK_HEADER + buffer)
            compressed_bytes += len(buffer)
            count += 1
        if count != 2 * len(truth):
            raise DataError(f"{path}: {count} images for {len(truth)} pairs. A pair is two images.")
        compression = {"clevel": 5, "shuffle": 1, "cname": "lz4", "quantize": 0}
        storage = {"dtype": "float32", "cparams": compression, "chunklen": 1, "expectedlen": 0, "dflt": 0.0}
        # bcolz counts its buffer of one chunk among the compressed bytes.
        sizes = {"shape": [count, *_SHAPE], "nbytes": count * _IMAGE_BYTES, "cbytes": compressed_bytes + _IMAGE_BYTES}
        (partial / "meta" / "storage").write_text(json.dumps(storage) + "\n")
        (partial / "meta" / "sizes").write_text(json.dumps(sizes) + "\n")
        (partial / "__attrs__").write_text("{}\n")
        np.save(partial / "list.npy", truth)
        os.sync()  # one call, as a set has thousands of files
        (partial / "list.npy").rename(_list_file(partial))
    finally:
        _finish_writing(path, partial)


def _finish_writing(path: Path, partial: Path) -> None:
    """Give the set `partial` the name `path` if it is complete, which is if it has a list. Otherwise remove it.

    A kill at any point leaves the old or the new set complete with its list, at `path` or `partial`, and the folder of
    one is never next to the list of the other. The next call then continues.
    """
    new_list = _list_file(partial)
    if new_list.exists() and partial.exists():
        if path.is_symlink():
            path.unlink()  # the set that it points to stays
        elif path.exists():
            path.rename(partial / "old")
        copy = shutil.copyfile(new_list, partial / "list.npy")
        os.sync()
        copy.replace(_list_file(path))
        partial.rename(path)
    for folder in (path / "old", partial):
        shutil.rmtree(folder, ignore_errors=True)
    new_list.unlink(missing_ok=True)


def _list_file(path: Path) -> Path:
    return path.with_name(f"{path.name}_list.npy")


def _read_truth(path: Path) -> np.ndarray:
    """Read the list of a set, (P,) bool."""
    content = read_regular(path, _MAX_LIST, fix="Put the list of True (same person) and False next to its set.")
    try:
        truth = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy raises errors of many classes for a crafted header
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: not a numpy array of booleans ({reason}). {_FIX}") from None
    is_list = truth.ndim == 1 and len(truth) > 0 and truth.dtype.kind in "biuf"
    if not is_list or not np.isin(truth, (0, 1)).all():
        found = f"shape {truth.shape} and type {truth.dtype!s:.200}"
        raise DataError(f"{path}: must hold one True or False a pair, and has {found}. {_FIX}")
    return truth.astype(bool)


def _read_meta(path: Path, count: int) -> int:
    """Return the images per chunk. Raise DataError unless the array holds `count` images of float32."""
    contents = [read_regular(path / "meta" / name, _MAX_META, fix=_FIX) for name in ("storage", "sizes")]
    try:
        storage, sizes = map(json.loads, contents)
        dtype = storage["dtype"]
        images_per_chunk = storage["chunklen"]
        shape = sizes["shape"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: meta/ is damaged ({type(error).__name__}: {error}). {_FIX}") from None
    if dtype != "float32":
        raise DataError(f"{path}: holds {dtype!r:.200}, but a verification set holds 'float32'. Make the set again.")
    if shape != [count, *_SHAPE]:
        found = tuple(shape) if isinstance(shape, list) else shape
        raise DataError(
            f"{path}: shape {found!r:.200} does not fit its list of {count // 2} pairs, which needs "
            f"{(count, *_SHAPE)}. {_FIX}"
        )
    if type(images_per_chunk) is not int or images_per_chunk < 1:
        raise DataError(f"{path}: meta/ is damaged (chunklen is {images_per_chunk!r:.200}). {_FIX}")
    return images_per_chunk
