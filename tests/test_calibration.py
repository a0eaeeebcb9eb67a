"""Thresholds and false accept rates from pairs of different people, compared with a slow count of all pairs."""

import json

import numpy as np
import pytest

from util.calibration import Calibration, calibrate, find_calibration, from_json, read_calibration
from util.errors import DataError, UsageError

RNG = np.random.default_rng(0)
IDENTITIES = RNG.integers(0, 40, 150)
EMBEDDINGS = RNG.normal(size=(150, 8)).astype(np.float32)
EMBEDDINGS /= np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)


def slow_cosines() -> list[float]:
    """Return the cosines of all pairs of different identities, one after the other."""
    cosines = []
    for first in range(len(IDENTITIES)):
        for second in range(first):
            if IDENTITIES[first] != IDENTITIES[second]:
                cosines.append(float(EMBEDDINGS[first].astype(float) @ EMBEDDINGS[second].astype(float)))
    return sorted(cosines)


COSINES = np.array(slow_cosines())


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(EMBEDDINGS, IDENTITIES, source="noise", network="abc")[0]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("util.calibration._ROWS", 32)


@pytest.mark.parametrize("far", [0.5, 0.1, 0.01, 1e-3, 1e-4])
def test_threshold_accepts_at_most_that_many_strangers(calibration, far):
    threshold = calibration.threshold(far)
    accepted = np.mean(threshold <= COSINES)
    assert accepted <= far
    # 6 % from one kept count to the next, a step of the cosine, and rounding down to whole pairs.
    assert accepted >= far / 1.13 - 2 / len(COSINES)


@pytest.mark.parametrize("cosine", [-0.2, 0.0, 0.3, 0.6, 0.8, 0.95])
def test_far_is_the_fraction_of_pairs_or_slightly_more(calibration, cosine):
    exact = np.mean(cosine <= COSINES)
    assert exact <= calibration.far(cosine) <= 1.07 * exact + 2 / len(COSINES)


def test_every_pair_of_different_people_is_counted_once(calibration, small_blocks):
    in_blocks, closest = calibrate(EMBEDDINGS, IDENTITIES, source="noise", network="abc")
    assert in_blocks == calibration
    assert calibration.pairs == len(COSINES)
    assert EMBEDDINGS[closest[0]] @ EMBEDDINGS[closest[1]] == pytest.approx(COSINES[-1])
    assert IDENTITIES[closest[0]] != IDENTITIES[closest[1]]


def test_far_is_never_extrapolated(calibration):
    assert calibration.far(COSINES[-1] + 0.001) == 0
    assert calibration.far(COSINES[-1] - 0.001) >= 1 / len(COSINES)
    assert calibration.describe(1.0) == f"fewer than 1 in {len(COSINES):,} strangers looks this alike to the network"
    with pytest.raises(UsageError, match=r"1e-07.*shows rates from 9e-05 to 1. Name such a rate, or"):
        calibration.threshold(1e-7)


def test_describe_gives_two_digits():
    made = Calibration((0.0, 0.5, 0.9), (1_000_000, 293, 0), 1_000_000, source="", network="")
    assert made.describe(0.6) == "1 in 3,400 strangers looks this alike to the network"
    assert made.describe(0.2) == "100% of strangers look this alike to the network"


def test_calibration_is_the_same_after_writing(calibration, tmp_path):
    calibration.write(tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json") == calibration
    assert from_json(calibration.to_json(), tmp_path) == calibration
    assert len(calibration.to_json()) < 20_000  # it travels in the metadata of a network


@pytest.mark.parametrize(
    "damage",
    [
        {"cosines": []},
        {"counts": "text"},
        {"pairs": 0},
        {"pairs": "nan"},
        {"cosines": [0.2, 0.1], "counts": [1, 0]},
        {"cosines": [0.1, 0.2], "counts": [1, 1]},
        {"cosines": [0.1, float("nan")], "counts": [1, 0]},
    ],
)
def test_damaged_calibrations_are_refused(calibration, tmp_path, damage):
    content = json.loads(calibration.to_json()) | damage
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"c.json: not a calibration that can be read. Make one with python -m"):
        read_calibration(tmp_path / "c.json")


def test_other_files_are_no_calibration(tmp_path):
    for content in ("", "[]", "{}", "[" * 100_000, "\xff"):
        (tmp_path / "c.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match="not a calibration"):
            read_calibration(tmp_path / "c.json")
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        read_calibration(tmp_path / "gone.json")


def test_one_identity_cannot_be_calibrated():
    with pytest.raises(DataError, match="no two images of different people"):
        calibrate(EMBEDDINGS, np.zeros(150, int), source="own", network="abc")


def test_calibration_of_another_network_is_refused(calibration, tmp_path):
    calibration.write(tmp_path / "c.json")
    network = tmp_path / "net.onnx"
    assert find_calibration(None, network, {}, "abc") is None
    assert find_calibration(tmp_path / "c.json", network, {}, "abc") == calibration
    assert find_calibration(tmp_path / "c.json", network, {"source_sha256": "abc"}, "other") == calibration
    assert find_calibration(None, network, {"calibration": calibration.to_json()}, "other") == calibration
    with pytest.raises(DataError, match=r"c.json: was made with another network than .*net.onnx"):
        find_calibration(tmp_path / "c.json", network, {}, "other")
