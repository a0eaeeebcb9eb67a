"""Files of super resolution networks: identified, found, and rejected if they do not fit."""

import json
import re
from pathlib import Path

import pytest
import torch

from model.super_resolution import RCAN, identify_rcan, rcan_from_state_dict
from util.checkpoint import run_dir
from util.errors import DataError
from util.super_resolution import find_super_resolution, load_super_resolution

SIZES = {"num_features": 12, "num_rg": 2, "num_rcab": 3, "reduction": 4}


def save(path: Path, scale: int = 4, **sizes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(RCAN(scale, **{**SIZES, **sizes}).state_dict(), path)
    return path


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_identify_rcan_returns_scale_and_sizes(scale, prefix):
    network = RCAN(scale, **SIZES)
    state = {prefix + key: value for key, value in network.state_dict().items()}
    assert identify_rcan(state) == (scale, SIZES)
    loaded = rcan_from_state_dict(state)
    assert not loaded.training and loaded.scale == scale
    images = torch.rand(1, 3, 5, 5)
    assert torch.equal(loaded(images), network(images))


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_identify_rcan_knows_public_checkpoints(golden, scale):
    keys = json.loads((golden / "rcan_keys.json").read_text())[f"x{scale}"]
    state = {key: torch.empty(shape, device="meta") for key, shape in keys}
    assert identify_rcan(state) == (scale, {"num_features": 64, "num_rg": 10, "num_rcab": 20, "reduction": 16})


def test_identify_rcan_names_the_key_that_does_not_fit():
    state = RCAN(4, **SIZES).state_dict()
    for changed, message in (
        ({"rgs.1.module.2.module.2.weight": torch.zeros(12, 12, 1, 1)}, r"rgs\.1\.module\.2\.module\.2\.weight is"),
        ({"mean": torch.zeros(3)}, r"mean is \(3,\), but missing in the RCAN"),
        ({"conv2.bias": torch.zeros(4)}, r"conv2\.bias is \(4,\), but \(3,\)"),
        ({"sf.weight": 7}, "do not belong to RCAN"),
        (
            {"rgs.999999999.module.0.module.0.weight": torch.zeros(1)},
            r"rgs\.2\.module\.0\.module\.0\.weight is missing",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            identify_rcan({**state, **changed})
    del state["conv1.weight"]
    with pytest.raises(ValueError, match=r"conv1\.weight is missing"):
        identify_rcan(state)


@pytest.mark.parametrize(
    "state", [{}, {"weight": torch.zeros(2)}, {"state_dict": {"sf.weight": torch.zeros(1)}}, {1: 2}]
)
def test_identify_rcan_rejects_other_contents(state):
    with pytest.raises(ValueError, match="do not belong to RCAN"):
        identify_rcan(state)


def test_identify_rcan_rejects_impossible_sizes():
    state = RCAN(4, **SIZES).state_dict()
    without_doublings = {key: value for key, value in state.items() if not key.startswith("upscale")}
    with pytest.raises(ValueError, match="power of two"):
        identify_rcan(without_doublings)
    with pytest.raises(ValueError, match="do not belong to RCAN"):
        identify_rcan({**state, "rgs.0.module.0.module.3.module.1.weight": torch.zeros(0, 12, 1, 1)})


def test_find_super_resolution_prefers_best_then_newest(tmp_path):
    older = save(tmp_path / "SR_x4_2022-01-01-00-00" / "SR_Best.pth")
    newer = save(tmp_path / "SR_x4_2022-01-01-00-01_2" / "SR_Best.pth")
    save(tmp_path / "SR_x4_2022-01-01-00-01" / "SR_Best.pth")
    save(tmp_path / "SR_x2_2023-01-01-00-00" / "SR_Best.pth", scale=2)
    save(tmp_path / "HRTRAIN_2024-01-01-00-00" / "Backbone_Best.pth")
    (tmp_path / "SR_x4_2025-01-01-00-00").mkdir()  # nothing in it yet
    assert find_super_resolution(tmp_path, 4) == newer
    assert find_super_resolution(older, 4) == older
    assert find_super_resolution(older.parent, 4) == older
    for epoch in ("SR_9_90", "SR_10_100"):
        save(tmp_path / "run" / f"{epoch}.pth")
    assert find_super_resolution(tmp_path / "run", 4).name == "SR_10_100.pth"


@pytest.mark.parametrize("place", ["", "none", "HRTRAIN_2024-01-01-00-00"])
def test_no_network_for_the_scale_says_how_to_train_one(tmp_path, place):
    save(tmp_path / "SR_x2_2023-01-01-00-00" / "SR_Best.pth", scale=2)
    save(tmp_path / "HRTRAIN_2024-01-01-00-00" / "Backbone_Best.pth")
    expected = r"no super resolution network for scale 8 .*`python -m applications\.super_resolution\.train --scale 8 "
    with pytest.raises(DataError, match=expected):
        find_super_resolution(tmp_path / place, 8)


def test_another_scale_than_the_expected_one_names_both(tmp_path):
    file = save(tmp_path / "SR_Best.pth", scale=2)
    assert load_super_resolution(file, 2).scale == load_super_resolution(file, None).scale == 2
    with pytest.raises(DataError, match=r"SR_Best\.pth: enlarges 2 times, but scale 4 is requested. Name"):
        load_super_resolution(file, 4)


def test_files_that_hold_no_rcan_are_named(tmp_path):
    file = tmp_path / "SR_Best.pth"
    torch.save({"conv.weight": torch.zeros(2)}, file)
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}: not a super resolution network \(the 1 keys"):
        load_super_resolution(file, 4)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match="not a checkpoint of PyTorch, or damaged"):
        load_super_resolution(file, 4)


def test_runs_of_super_resolution_are_no_runs_of_recognition(tmp_path):
    save(tmp_path / "SR_x4_2022-01-01-00-00" / "SR_Best.pth")
    with pytest.raises(DataError, match="no run with a Backbone file"):
        run_dir.newest_run(tmp_path)
