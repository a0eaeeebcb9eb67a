"""Load the trained weights of MTCNN's three networks from the PyPI package `mtcnn` (1.0.0, MIT license).

Only its files are used. The package is never imported: it would import tensorflow.
"""

import hashlib
import importlib.metadata
import io
from pathlib import Path

import joblib
import lz4.frame
import numpy as np

from util.errors import DataError
from util.files import read_bytes

PACKAGE = "mtcnn==1.0.0"
SHA256 = {
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}
_REINSTALL = f"Run `pip install --force-reinstall --no-deps {PACKAGE}`."


def load_weights(network: str) -> list[np.ndarray]:
    """Load the arrays of "pnet", "rnet" or "onet", float32, in the order of their layers and in Keras' layout.

    A convolution is a kernel (height, width, in, out), a bias and the slopes of its PReLU; a dense layer has (in, out).
    Raises DataError if the package is missing or its file is not the published one.
    """
    path = weights_file(network)
    content = read_bytes(path, _REINSTALL)
    # joblib executes what a file tells it to, so only the published file may reach it.
    if hashlib.sha256(content).hexdigest() != SHA256[network]:
        raise DataError(f"{path}: not the published weights (its SHA-256 differs). {_REINSTALL}")
    return joblib.load(io.BytesIO(lz4.frame.decompress(content)))


def weights_file(network: str) -> Path:
    """Return where the installed package has the weights of a network, without importing the package."""
    try:
        path = Path(str(importlib.metadata.distribution("mtcnn").locate_file(f"mtcnn/assets/weights/{network}.lz4")))
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"mtcnn: the face detector needs the weights in this package. Run `pip install {PACKAGE}`."
        ) from None
    if not path.is_file():
        raise DataError(f"{path}: missing. {_REINSTALL}")
    return path
