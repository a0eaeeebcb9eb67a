"""Test the curve of accuracy over resolution with embeddings of known results."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from applications.resolution_curve.__main__ import curve_table, main, parse_curve
from applications.resolution_curve.figure import curve_figure
from applications.resolution_curve.measure import Curve, measure
from model.backbone import build_backbone
from model.super_resolution import RCAN
from util.errors import DataError, UsageError
from util.evaluate import evaluate
from util.pairs import load_pairs
from util.pairs.bcolz import write_carray


class Pixels(nn.Module):
    """A backbone that returns a 7x7 grid of the green channel, centered."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grid = nn.functional.avg_pool2d(images[:, 1:2], 16).flatten(1)
        return grid - grid.mean(1, keepdim=True) + 1e-6


@pytest.fixture(scope="module")
def place(tmp_path_factory, made_pairs):
    """Return a folder with LFW and AgeDB, two runs, and networks for x2 and x8."""
    root = tmp_path_factory.mktemp("curve")
    _, images, issame = made_pairs
    for name in ("lfw_align_112/lfw", "AgeDB/agedb_30"):
        write_carray(root / "data" / name, images, issame)
    torch.manual_seed(0)
    for run in ("HRTRAIN_2024-01-01-00-00", "LRTRAIN_LRx4_2024-01-02-00-00"):
        (root / "best" / run).mkdir(parents=True)
        state = build_backbone("MobileFaceNet_025", embedding_size=16).state_dict()
        torch.save(state, root / "best" / run / "Backbone_Best.pth")
    for scale in (2, 8):
        (root / "best" / f"SR_x{scale}_2024-01-01-00-00").mkdir()
        state = RCAN(scale, num_features=8, num_rg=1, num_rcab=1, reduction=4).state_dict()
        torch.save(state, root / "best" / f"SR_x{scale}_2024-01-01-00-00" / "SR_Best.pth")
    return root


def arguments(place, *more: str) -> list[str]:
    run = place / "best" / "HRTRAIN_2024-01-01-00-00"
    return [f"--checkpoints=HR={run}", f"--data_dir={place}/data", "--gpu_num=cpu", *more]


def settings(*more: str):
    return parse_curve(["--checkpoints=x.pth", "--gpu_num=cpu", *more])


def test_each_size_equals_evaluation_at_that_scale(made_pairs):
    pairs = load_pairs(made_pairs[0])
    (curve,) = measure("P", Pixels(), [pairs], {}, settings("--sizes", "28", "56", "112", "9"), [torch.device("cpu")])
    assert list(curve.results) == [112, 56, 28, 9]
    expected = evaluate(Pixels(), [pairs], views=("HR", "LR"), lr_scale=(2, 4))
    for size, view in ((112, "HR"), (56, "LRx2"), (28, "LRx4")):
        np.testing.assert_array_equal(curve.results[size][pairs.name].distances, expected[view][pairs.name].distances)


def test_super_resolution_curve_has_the_sizes_with_a_network(made_pairs):
    pairs, network = load_pairs(made_pairs[0]), nn.Upsample(scale_factor=4)
    curves = measure("P", Pixels(), [pairs], {28: network}, settings(), [torch.device("cpu")])
    assert [(curve.title, list(curve.results)) for curve in curves] == [
        ("P, bicubic", [112, 56, 28, 21, 16, 14, 8]),
        ("P, SR", [112, 28]),
    ]
    expected = evaluate(Pixels(), [pairs], views=("SR",), super_resolution={4: network})["SR"][pairs.name]
    np.testing.assert_array_equal(curves[1].results[28][pairs.name].distances, expected.distances)


def test_oneside_degrades_the_first_image_only(made_pairs):
    pairs = load_pairs(made_pairs[0])
    given = settings("--sizes=14", "--LR_oneside")
    (curve,) = measure("P", Pixels(), [pairs], {}, given, [torch.device("cpu")], crop="whole")
    views = evaluate(Pixels(), [pairs], views=("HR", "LR"), lr_scale=8, first_image_only=True, crop="whole")
    expected = views["LR"][pairs.name]
    np.testing.assert_array_equal(curve.results[14][pairs.name].distances, expected.distances)


def test_program_prints_draws_and_writes_every_curve(place, tmp_path, capsys):
    more = [f"--json={tmp_path}/c.json", f"--plot={tmp_path}/c.png", "--sizes", "56", "28", "14"]
    runs = [str(place / "best" / "HRTRAIN_2024-01-01-00-00"), f"LR={place}/best/LRTRAIN_LRx4_2024-01-02-00-00"]
    sr = ["--SR_eval", f"--sr_checkpoint_dir={place}/best"]
    main(["--checkpoints", *runs, f"--data_dir={place}/data", "--gpu_num=cpu", *sr, *more, "--eval_crop=whole"])
    printed = capsys.readouterr().out
    assert "bicubic only, because there is no network: 28\n" in printed
    assert "accuracy on LFW (23 pairs)" in printed and "accuracy on AgeDB (23 pairs)" in printed
    assert f"LR: {place}/best/LRTRAIN_LRx4_2024-01-02-00-00/Backbone_Best.pth: MobileFaceNet_025 (" in printed
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["eval_crop"] == {"HRTRAIN_2024-01-01-00-00": "whole", "LR": "whole"}
    found = [(c["checkpoint"], c["enlarged_by"], list(c["sizes"])) for c in content["curves"]]
    first = "HRTRAIN_2024-01-01-00-00"
    assert found == [
        (first, "bicubic", ["112", "56", "28", "14"]),
        (first, "SR", ["112", "56", "14"]),
        ("LR", "bicubic", ["112", "56", "28", "14"]),
        ("LR", "SR", ["112", "56", "14"]),
    ]
    point = content["curves"][0]["sizes"]["14"]
    assert set(point["sets"]) == {"LFW", "AgeDB"}
    assert point["average"] == sum(result["accuracy"] for result in point["sets"].values()) / 2
    assert "average accuracy over the 2 sets" in printed
    assert "not in " in printed and "so left out: CFP_FF, CFP_FP\n" in printed
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_table_leaves_unmeasured_cells_empty(made_pairs):
    pairs = load_pairs(made_pairs[0])
    result = evaluate(Pixels(), [pairs])["HR"]
    curves = [Curve("A", "bicubic", {112: result, 20: result}), Curve("A", "SR", {112: result})]
    number = f"{result[pairs.name].accuracy:.4f}"
    assert curve_table(curves, lambda sets: sets[pairs.name].accuracy) == [
        ["", "112", "20"], ["A, bicubic", number, number], ["A, SR", number, ""],
    ]  # fmt: skip


@pytest.mark.parametrize("sets", [1, 3])
def test_figure_has_a_panel_per_set_and_a_line_per_curve(made_pairs, sets):
    pairs = load_pairs(made_pairs[0])
    result = evaluate(Pixels(), [pairs])["HR"][pairs.name]
    names = [f"set{index}" for index in range(sets)]
    points = {size: dict.fromkeys(names, result) for size in (112, 28, 14)}
    curves = [Curve(label, method, points) for label in "AB" for method in ("bicubic", "SR")]
    figure = curve_figure(curves, names)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == names
    for axes in shown:
        lines = [container[0] for container in axes.containers]
        assert len({line.get_color() for line in lines}) == 2
        assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["14", "28", "112"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["A, bicubic", "A, SR", "B, bicubic", "B, SR"]


def test_networks_are_named_by_the_user_or_by_their_run():
    given = ["HR=/runs/lr=0.1/A", "/runs/lr=0.1/B_v1.5", "/runs/C/Backbone_7_42.pth", "D/Backbone_Best.pth"]
    paths = parse_curve(["--checkpoints", *given]).paths
    assert {name: str(path) for name, path in paths.items()} == {
        "HR": "/runs/lr=0.1/A",
        "B_v1.5": "/runs/lr=0.1/B_v1.5",
        "C": "/runs/C/Backbone_7_42.pth",
        "D": "D/Backbone_Best.pth",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpu_num=cpu"], r"^--checkpoints: missing\. Give NAME=PATH: recognition networks"),
        (["--checkpoints", "a=x.pth", "a=y.pth"], r"--checkpoints: .*'a' is there twice"),
        (
            ["--checkpoints=x.pth", "--sizes", "3"],
            r"--sizes: '3' is not a list of different whole numbers from 4 to 112",
        ),
        (["--checkpoints=x.pth", "--sizes", "224"], r"--sizes: '224' is not"),
        (["--checkpoints=x.pth", "--sizes", "28", "28"], r"--sizes: "),
        (["--checkpoints=x.pth", "--plot=curve.doc"], r"^--plot=curve.doc: must end in .png, .pdf, .svg"),
        (["--checkpoints=x.pth", "--sr_checkpoint_dir=best"], r"^--sr_checkpoint_dir: is used with --SR_eval alone"),
        (["--checkpoints=x.pth", "--json=/"], r"^--json=/: is a folder"),
    ],
)
def test_mistakes_are_reported_before_the_work(given, message):
    with pytest.raises(UsageError, match=message):
        parse_curve(given)


def test_missing_files_are_reported(place, tmp_path):
    with pytest.raises(DataError, match=r"^--checkpoints=.*gone: no such file or folder"):
        main([f"--checkpoints={tmp_path}/gone", "--gpu_num=cpu"])
    with pytest.raises(DataError, match=r"no verification set in it"):
        main([*arguments(place)[:1], f"--data_dir={tmp_path}", "--gpu_num=cpu"])
    with pytest.raises(DataError, match=r"^--sr_checkpoint_dir=.*: no super resolution network for scale 8"):
        main([*arguments(place), "--SR_eval", f"--sr_checkpoint_dir={tmp_path}"])
    with pytest.raises(DataError, match=r"Networks enlarge from 56, 28 or 14"):
        main([*arguments(place), "--SR_eval", "--sizes=20"])
