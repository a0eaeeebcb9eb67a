"""validation.py, run as a user runs it, with networks and sets whose accuracies are known."""

import json
import math
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import validation
from model.backbone import build_backbone
from model.super_resolution import RCAN
from util.errors import DataError, UsageError
from util.pairs.bcolz import write_carray
from util.public_networks import PublicNetwork, read_public_network

ROOT = Path(__file__).parents[1]
PAIRS = 43  # 86 images: the last of batches of 64 has 22, of batches of 7 two


class RedAngle(nn.Module):
    """A unit vector whose angle is the image's mean red: an embedding known beforehand. Blue is not looked at."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        angle = (images[:, 0].mean(dim=(1, 2)) + 1) * math.pi / 4
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def flat(red: int, blue: int) -> np.ndarray:
    return np.broadcast_to(np.array([red, 90, blue], np.uint8), (112, 112, 3))


def colored_pairs(wrong: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Same pairs have one red and different blues, different pairs the reverse; the last `wrong` pairs lie."""
    issame = np.arange(PAIRS) % 2 == 0
    images = []
    for pair, same in enumerate(issame):
        lie = pair >= PAIRS - wrong
        one_red = same != lie
        images += [flat(40, 40), flat(40, 215)] if one_red else [flat(40, 40), flat(215, 40)]
    return images, issame


@pytest.fixture
def known_sets(tmp_path) -> Path:
    """LFW without a lie, CFP_FF with 4 lies in 43 pairs, AgeDB as LFW but stored with its channels swapped."""
    for place, wrong in (("lfw_align_112/lfw", 0), ("cfp_align_112/cfp_ff", 4), ("agedb_30", 0)):
        images, issame = colored_pairs(wrong)
        if place == "agedb_30":
            images = [image[:, :, ::-1] for image in images]
        write_carray(tmp_path / place, images, issame)
    return tmp_path


@pytest.fixture
def known_backbone(monkeypatch):
    """Make every file hold RedAngle. It is shown the crop that is given, or the one of 128 pixels."""

    def read(file: Path, channel_order: None, input_scale: None, *, crop: str | None) -> PublicNetwork:
        return PublicNetwork(
            name="RedAngle",
            family="this toolkit",
            embedding_size=2,
            network=RedAngle(),
            channel_order="RGB",
            input_scale="-1..1",
            crop=crop or "128",
        )

    monkeypatch.setattr("util.public_networks.read_public_network", read)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A best folder with two runs of real backbone files; the newer one has the name that sorts first."""
    best = tmp_path_factory.mktemp("best")
    for name, backbone in (
        ("LRTRAIN_LRx4_2022-07-28-19-15", "iresnet18"),
        ("HRTRAIN_2022-08-01-00-00", "MobileFaceNet"),
    ):
        (best / name).mkdir()
        network = build_backbone(backbone, embedding_size=32)
        torch.save(
            {f"module.{key}": value for key, value in network.state_dict().items()}, best / name / "Backbone_Best.pth"
        )
    torch.save({"weight": torch.zeros(3, 32)}, best / "HRTRAIN_2022-08-01-00-00" / "Head_Best.pth")
    return best


@pytest.mark.parametrize("batch_size", [64, 7, 1])
def test_known_accuracies_whatever_the_batch(known_sets, known_backbone, tmp_path, batch_size, capsys):
    (tmp_path / "Backbone.pth").touch()
    validation.main(
        [
            f"--data_dir={known_sets}",
            "--gpu_num=cpu",
            f"--batch_size={batch_size}",
            f"--json={tmp_path}/out/r.json",
            f"--resume_dir={tmp_path}/Backbone.pth",
            f"--plot={tmp_path}/out/roc.png",
        ]
    )
    sets = json.loads((tmp_path / "out" / "r.json").read_text())["views"]["HR"]["sets"]
    assert sets["LFW"]["accuracy"] == 1.0 and sets["LFW"]["eer"] == 0.0 and sets["LFW"]["tar_at_far"]["1e-3"] == 1.0
    # The last fold has four pairs, which all lie; the other nine, where none does, choose the threshold.
    assert sets["CFP_FF"]["fold_accuracies"] == [1.0] * 9 + [0.0]
    # With red and blue swapped every pair lies, and the best that a threshold can do is to take or refuse all.
    assert sets["AgeDB"]["accuracy"] < 0.6 and sets["AgeDB"]["auc"] == 0.0
    printed = capsys.readouterr().out
    assert re.search(
        r"^Evaluation: LFW Acc: 1\.0000, CFP_FF Acc: 0\.9000, AgeDB Acc: 0\.\d{4}, Avg Acc: 0\.\d{4}$", printed, re.M
    )
    assert "left out: CFP_FP" in printed
    assert (tmp_path / "out" / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_table_names_what_it_shows(known_sets, known_backbone, tmp_path, capsys):
    (tmp_path / "Backbone.pth").touch()
    validation.main([f"--data_dir={known_sets}", "--gpu_num=cpu", f"--load_dir={tmp_path}/Backbone.pth", "--LR_eval"])
    lines = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("set "))
    columns = ["set", "accuracy", "threshold", "AUC", "EER", "TAR@FAR=1e-3", "TAR@FAR=1e-2", "pairs", "images/s"]
    assert lines[header].split() == columns
    rows = [line.split("  ")[0] for line in lines[header + 1 :]]
    assert rows == ["LFW", "CFP_FF", "AgeDB", "LFW LR", "CFP_FF LR", "AgeDB LR"]
    assert any(
        line.startswith("Evaluation LR: LFW Acc: 1.0000") for line in lines
    )  # flat colours have no detail to lose
    assert any("28x28" in line for line in lines)


def test_newest_run_is_taken_and_named(trained, tiny_data, capsys):
    validation.main([f"--data_dir={tiny_data}", "--gpu_num=cpu", f"--best_checkpoint_dir={trained}"])
    assert "HRTRAIN_2022-08-01-00-00/Backbone_Best.pth: MobileFaceNet (" in capsys.readouterr().out


def test_backbone_is_recognized_from_its_file(trained, tiny_data):
    found = read_public_network(trained / "LRTRAIN_LRx4_2022-07-28-19-15" / "Backbone_Best.pth")
    assert found.name == "iresnet18"
    assert found.network.eval()(torch.zeros(1, 3, 112, 112)).shape == (1, 32)


def test_another_backbone_than_the_files_is_an_error(trained):
    file = trained / "HRTRAIN_2022-08-01-00-00" / "Backbone_Best.pth"
    with pytest.raises(DataError, match="holds MobileFaceNet, not --backbone=IR_50"):
        validation.main([f"--resume_dir={file}", "--backbone=IR_50", "--gpu_num=cpu"])


def test_a_head_file_is_no_backbone(trained):
    with pytest.raises(DataError, match=r"Head_Best.pth: not a backbone's state dict .*Give a Backbone file"):
        read_public_network(trained / "HRTRAIN_2022-08-01-00-00" / "Head_Best.pth")


def test_no_verification_set_is_an_error(trained, tmp_path):
    with pytest.raises(DataError, match="no verification set in it"):
        validation.main([f"--data_dir={tmp_path}", "--gpu_num=cpu", f"--best_checkpoint_dir={trained}"])


def test_table_shows_what_super_resolution_recovers(known_sets, known_backbone, tmp_path, capsys):
    (tmp_path / "Backbone.pth").touch()
    best = tmp_path / "best"
    for scale in (2, 4):
        (best / f"SR_x{scale}_2024-01-01-00-00").mkdir(parents=True)
        state = RCAN(scale, num_features=8, num_rg=1, num_rcab=1, reduction=4).state_dict()
        torch.save(state, best / f"SR_x{scale}_2024-01-01-00-00" / "SR_Best.pth")
    arguments = [f"--data_dir={known_sets}", "--gpu_num=cpu", f"--resume_dir={tmp_path}/Backbone.pth", "--SR_eval"]
    arguments += [f"--best_checkpoint_dir={best}", "--LR_scale", "2", "4", f"--json={tmp_path}/r.json"]
    arguments.append(f"--report={tmp_path}/r.html")
    validation.main(arguments)
    printed = capsys.readouterr().out
    assert f"super resolution x4: {best}/SR_x4_2024-01-01-00-00/SR_Best.pth" in printed
    assert "low resolution x2: down to 56x56 pixels and up again" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["set", "scale", "HR", "LR", "SR", "lost", "won", "back"] in rows
    # Flat colours lose nothing at low resolution, so there is nothing to win back.
    (row,) = [row for row in rows if row[:2] == ["CFP_FF", "x4"]]
    assert row[2] == row[3] and row[5:] == ["0.0000", "n/a"]
    page = (tmp_path / "r.html").read_text()
    assert ">won back<" in page and "<h2>Pairs of CFP_FF SRx4</h2>" in page
    assert tuple(row) in re.findall(r"<td[^>]*>(CFP_FF|x4|0\.\d{4}|n/a)</td>" * 7, page)
    written = json.loads((tmp_path / "r.json").read_text())
    assert list(written["views"]) == ["HR", "LRx2", "LRx4", "SRx2", "SRx4"] and written["LR_scale"] == [2, 4]
    file = best / "SR_x2_2024-01-01-00-00" / "SR_Best.pth"
    with pytest.raises(DataError, match="enlarges 2 times, but scale 4 is requested"):
        validation.main([*arguments[:4], "--LR_scale=4", f"--sr_checkpoint_dir={file}"])
    with pytest.raises(DataError, match=r"no super resolution network for scale 8 in it\. Train one with"):
        validation.main([*arguments[:5], "--LR_scale=8"])


def test_unwritable_results_are_refused_before_the_work(tmp_path):
    with pytest.raises(UsageError, match=r"is a folder or a device\. Name a file"):
        validation.main(["--gpu_num=cpu", f"--json={tmp_path}"])


def test_a_plot_of_an_unknown_kind_is_refused_before_the_work():
    with pytest.raises(UsageError, match=r"--plot=roc.xyz: must end in .png"):
        validation.main(["--gpu_num=cpu", "--plot=roc.xyz"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--best_checkpoint_dir=no/such"], 3, "no/such: no run with a Backbone file in it"),
        (["--SR_eval=True", "--LR_scale=3"], 2, "--LR_scale=3: super resolution enlarges 2, 4, 8 times only"),
        (["--resume_dir=README.md"], 3, "README.md: not a checkpoint"),
        (["--LR_eval=maybe"], 2, "--LR_eval: 'maybe' is not True or False"),
    ],
)
def test_a_bad_command_line_ends_in_one_line_and_its_exit_code(arguments, code, message, end_of):
    ended, printed = end_of(validation.main, ["--gpu_num=cpu", *arguments])
    assert ended == code
    assert printed.count("\n") == 1 and printed.startswith("error: ") and message in printed


@pytest.fixture
def named_formats(tmp_path) -> list[str]:
    """The pairs of LFW in `known_sets`, 4 of them lies, as words for --val_data: a .bin, a carray and a list."""
    images, issame = colored_pairs(4)
    encoded = [cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() for image in images]
    root = tmp_path / "named"
    (root / "faces").mkdir(parents=True)
    (root / "own.bin").write_bytes(pickle.dumps((encoded, issame.tolist())))
    write_carray(root / "array", images, issame)
    for index, image in enumerate(encoded):
        (root / "faces" / f"{index}.png").write_bytes(image)
    lines = [f"{2 * pair} {2 * pair + 1} {int(same)}\n" for pair, same in enumerate(issame)]
    (root / "pairs.txt").write_text("".join(lines))
    return [f"{root}/own.bin", f"a.1={root}/array", f"B={root}/pairs.txt:{root}/faces"]


def test_named_sets_of_every_format_are_evaluated(named_formats, known_sets, known_backbone, tmp_path, capsys):
    (tmp_path / "Backbone.pth").touch()
    arguments = ["--gpu_num=cpu", f"--load_dir={tmp_path}/Backbone.pth", f"--json={tmp_path}/results.json"]
    validation.main([f"--data_dir={known_sets}", *arguments, "--val_data", *named_formats])
    assert "own Acc: 0.9000, a.1 Acc: 0.9000, B Acc: 0.9000, Avg Acc: " in capsys.readouterr().out
    sets = json.loads((tmp_path / "results.json").read_text())["views"]["HR"]["sets"]
    assert list(sets) == ["LFW", "CFP_FF", "AgeDB", "own", "a.1", "B"]
    numbers = [{name: value for name, value in sets[key].items() if name != "images_per_second"} for key in sets]
    assert numbers[3] == numbers[4] == numbers[5] == numbers[1]


def test_named_sets_alone_are_enough(named_formats, known_backbone, tmp_path, capsys):
    (tmp_path / "Backbone.pth").touch()
    arguments = ["--gpu_num=cpu", f"--load_dir={tmp_path}/Backbone.pth"]
    validation.main([f"--data_dir={tmp_path}/nothing", *arguments, "--val_data", *named_formats[:1]])
    out = capsys.readouterr().out
    assert "Evaluation: own Acc: 0.9000, Avg Acc: 0.9000" in out and "left out" not in out
