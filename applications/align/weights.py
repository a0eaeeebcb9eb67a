"""The trained weights of MTCNN's three networks, as the PyPI package `mtcnn` carries them (1.0.0, MIT license).

Only its files are used. Its own loader is never called: that would import tensorflow, and unpickle whatever lies under
the right name in the current folder.
"""

import hashlib
import importlib.metadata
import io
import math
from pathlib import Path

import lz4.frame
import numpy as np

from util.errors import DataError
from util.pairs.pickles import NUMPY_GLOBALS, PickledArray, PickledDtype, SafeUnpickler, StandIn

PACKAGE = "mtcnn==1.0.0"
SHA256 = {
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}


def load_weights(network: str) -> list[np.ndarray]:
    """The arrays of "pnet", "rnet" or "onet", float32, in the order of their layers and in Keras' layout.

    A convolution is a kernel (height, width, in, out), a bias and the slopes of its PReLU; a dense layer has (in, out).
    Raises DataError where the package is missing or its file is another one.
    """
    path = weights_file(network)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256[network]:
        raise DataError(f"{path}: not the weights that were published (its SHA-256 differs); {_reinstall()}")
    return read_arrays(lz4.frame.decompress(content), path)


def weights_file(network: str) -> Path:
    """Where the installed package keeps the weights of a network; found without importing it."""
    try:
        path = Path(str(importlib.metadata.distribution("mtcnn").locate_file(f"mtcnn/assets/weights/{network}.lz4")))
    except importlib.metadata.PackageNotFoundError:
        raise DataError("face detection needs the weights in the package mtcnn; pip install " + PACKAGE) from None
    if not path.is_file():
        raise DataError(f"{path}: missing; {_reinstall()}")
    return path


def _reinstall() -> str:
    return f"pip install --force-reinstall --no-deps {PACKAGE}"


def read_arrays(pickled: bytes, source: Path) -> list[np.ndarray]:
    """A list of numeric arrays out of an uncompressed joblib pickle; DataError, naming `source`, for anything else."""
    arrays = _JoblibUnpickler(io.BytesIO(pickled), source, _GLOBALS).load()
    if type(arrays) is not list or not all(isinstance(array, PickledArray) for array in arrays):
        raise DataError(f"{source}: holds no list of arrays; {_reinstall()}")
    return [array.numpy() for array in arrays]


class _Wrapper(StandIn):
    """Stands for joblib's NumpyArrayWrapper: it announces an array whose bytes follow in the file."""

    def __setstate__(self, state: object) -> None:
        if type(state) is not dict or state.get("order") != "C" or "shape" not in state:
            raise ValueError("an array that is announced in an unknown form")
        self.shape, self.dtype = state["shape"], state.get("dtype")
        self.aligned = bool(state.get("numpy_array_alignment_bytes"))


class _JoblibUnpickler(SafeUnpickler):
    def load_build(self) -> None:
        super().load_build()
        if isinstance(self.stack[-1], _Wrapper):
            self.stack[-1] = self._array_that_follows(self.stack[-1])

    def _array_that_follows(self, wrapper: _Wrapper) -> PickledArray:
        """Joblib writes a byte with the length of a padding, the padding, and the array's bytes."""
        if wrapper.aligned:
            self.read(self.read(1)[0])
        if not isinstance(wrapper.dtype, PickledDtype):
            raise ValueError("an array that is announced without a type")
        array = PickledArray()
        size = math.prod(wrapper.shape) * wrapper.dtype.dtype.itemsize
        array.fill(self.read(size), wrapper.dtype, wrapper.shape, False)
        return array


_GLOBALS = {
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _Wrapper,
    ("numpy", "ndarray"): NUMPY_GLOBALS["numpy", "ndarray"],
    ("numpy", "dtype"): NUMPY_GLOBALS["numpy", "dtype"],
}
