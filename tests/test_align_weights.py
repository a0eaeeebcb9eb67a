"""The weights come from the files that were published, and from nothing that runs."""

import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import joblib
import lz4.frame
import numpy as np
import pytest

from applications.align import weights
from util.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


class Gadget:
    """A pickle of this writes a file when it is loaded by a loader that trusts it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("network", ["pnet", "rnet", "onet"])
def test_arrays_are_those_that_joblib_reads(network):
    path = weights.weights_file(network)
    ours, theirs = weights.load_weights(network), joblib.load(path)
    assert len(ours) == len(theirs) > 10
    for array, expected in zip(ours, theirs, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected)


def test_neither_the_package_nor_tensorflow_nor_joblib_is_imported():
    program = (
        "import sys; from applications.align import weights; weights.load_weights('onet');"
        "print(sorted({'mtcnn', 'tensorflow', 'joblib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_of_the_same_name_in_the_current_folder_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "pnet.lz4").write_bytes(b"trap")
    (tmp_path / "mtcnn" / "assets" / "weights").mkdir(parents=True)
    (tmp_path / "mtcnn" / "assets" / "weights" / "pnet.lz4").write_bytes(b"trap")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(weights.load_weights("pnet")) == 13


def test_a_file_with_another_checksum_is_refused(tmp_path, monkeypatch):
    content = bytearray(weights.weights_file("pnet").read_bytes())
    content[1000] ^= 1
    (tmp_path / "pnet.lz4").write_bytes(content)
    monkeypatch.setattr(weights, "weights_file", lambda network: tmp_path / "pnet.lz4")
    with pytest.raises(DataError, match=r"pnet\.lz4: not the weights .*SHA-256.*pip install --force-reinstall"):
        weights.load_weights("pnet")


def test_a_missing_package_or_file_is_named_with_the_remedy(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"pip install mtcnn==1\.0\.0"):
        weights.load_weights("pnet")
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(tmp_path / "x.dist-info"))
    with pytest.raises(DataError, match=r"pnet\.lz4: missing; pip install --force-reinstall"):
        weights.load_weights("pnet")


def pickled(value: object, tmp_path: Path) -> bytes:
    joblib.dump(value, tmp_path / "arrays", compress=False)
    return (tmp_path / "arrays").read_bytes()


def test_arrays_of_every_shape_are_read_back(tmp_path):
    arrays = [np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.zeros((0, 5), np.float32), np.float32([7])]
    for array, read in zip(arrays, weights.read_arrays(pickled(arrays, tmp_path), Path("w")), strict=True):
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    "value",
    [[1, 2], {"a": np.zeros(2)}, np.zeros(2), [np.array([None])], [np.array(["text"])]],
    ids=["numbers", "dictionary", "one array", "objects", "text"],
)
def test_anything_but_a_list_of_numeric_arrays_is_refused(value, tmp_path):
    with pytest.raises(DataError, match=r"^w: "):
        weights.read_arrays(pickled(value, tmp_path), Path("w"))


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(DataError, match=r"^w: wants to use 'pathlib"):
        weights.read_arrays(pickle.dumps([Gadget(marker)]), Path("w"))
    objects = np.array([Gadget(marker)], dtype=object)  # joblib would unpickle what follows the array's header
    with pytest.raises(DataError, match=r"^w: "):
        weights.read_arrays(pickled([objects], tmp_path), Path("w"))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Gadget(marker)))
    assert marker.exists()


def test_weights_cut_short_are_refused():
    whole = lz4.frame.decompress(weights.weights_file("pnet").read_bytes())
    for length in (0, 1, 300, 1000, len(whole) - 1):
        with pytest.raises(DataError, match=r"^w: "):
            weights.read_arrays(whole[:length], Path("w"))
