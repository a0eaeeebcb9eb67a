"""The weights of the detector come from the published files, and no other file is loaded."""

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
    """An object whose pickle writes a file when a trusting loader loads it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("network", ["pnet", "rnet", "onet"])
def test_arrays_equal_those_that_joblib_loads_from_the_file(network):
    path = weights.weights_file(network)
    ours, theirs = weights.load_weights(network), joblib.load(path)
    assert len(ours) == len(theirs) > 10
    for array, expected in zip(ours, theirs, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected)


def test_neither_the_package_nor_tensorflow_is_imported():
    program = (
        "import sys; from applications.align import weights; weights.load_weights('onet');"
        "print(sorted({'mtcnn', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_in_the_current_folder_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "pnet.lz4").write_bytes(b"trap")
    (tmp_path / "mtcnn" / "assets" / "weights").mkdir(parents=True)
    (tmp_path / "mtcnn" / "assets" / "weights" / "pnet.lz4").write_bytes(b"trap")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(weights.load_weights("pnet")) == 13


@pytest.mark.parametrize("length", [0, 1, 1000, -1])
def test_a_file_cut_short_is_refused(tmp_path, monkeypatch, length):
    (tmp_path / "pnet.lz4").write_bytes(weights.weights_file("pnet").read_bytes()[:length])
    monkeypatch.setattr(weights, "weights_file", lambda network: tmp_path / "pnet.lz4")
    with pytest.raises(DataError, match=r"pnet\.lz4: not the published weights"):
        weights.load_weights("pnet")


def test_a_file_with_another_checksum_is_refused(tmp_path, monkeypatch):
    content = bytearray(weights.weights_file("pnet").read_bytes())
    content[1000] ^= 1
    (tmp_path / "pnet.lz4").write_bytes(content)
    monkeypatch.setattr(weights, "weights_file", lambda network: tmp_path / "pnet.lz4")
    with pytest.raises(
        DataError, match=r"pnet\.lz4: not the published weights .*SHA-256.*pip install --force-reinstall"
    ):
        weights.load_weights("pnet")


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    joblib.dump(np.array([Gadget(marker)], dtype=object), tmp_path / "array")
    monkeypatch.setattr(weights, "weights_file", lambda network: tmp_path / "pnet.lz4")
    for content in (pickle.dumps([Gadget(marker)]), (tmp_path / "array").read_bytes()):
        (tmp_path / "pnet.lz4").write_bytes(lz4.frame.compress(content))
        with pytest.raises(DataError, match=r"pnet\.lz4: not the published weights"):
            weights.load_weights("pnet")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Gadget(marker)))
    assert marker.exists()  # a trusting loader would have run it


def test_a_missing_package_or_file_is_named_with_the_fix(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"pip install mtcnn==1\.0\.0"):
        weights.load_weights("pnet")
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(tmp_path / "x.dist-info"))
    with pytest.raises(DataError, match=r"pnet\.lz4: missing\. Run `pip install --force-reinstall"):
        weights.load_weights("pnet")
