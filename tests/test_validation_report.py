"""The report of validation.py: every number in it is computed again from the embeddings, slowly."""

import base64
import html
import io
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import validation
from tests.test_analysis import wilson
from util.pairs import find_pair_sets
from util.public_networks import PublicNetwork
from util.transform import degrade, eval_crop

PAIRS = 200
FOLDS = np.repeat(np.arange(10), PAIRS // 10)
VIEWS = {"": None, " LRx4": 28, " LRx8": 14}


class Coarse(nn.Module):
    """A fixed projection of a coarse view of the face: (N, 3, 112, 112) -> (N, 24)."""

    def __init__(self, seed: int):
        super().__init__()
        self.weight = torch.randn(24, 3 * 8 * 8, generator=torch.Generator().manual_seed(seed))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images, 14).flatten(1) @ self.weight.T + 0.5


NETWORKS = {"first": Coarse(0), "second": Coarse(1)}


@dataclass(eq=False)
class Set:
    """The pairs of the list on the disk, and what networks make of them."""

    images: np.ndarray  # (2P, 112, 112, 3)
    issame: np.ndarray
    groups: np.ndarray


@cache
def embed(made: Set, network: nn.Module, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return distances (P,) and the smaller norm of each pair (P,)."""
    crops = eval_crop(made.images)
    crops = crops if size is None else degrade(crops, size)
    both = [torch.from_numpy(side.transpose(0, 3, 1, 2) / 127.5 - 1).float() for side in (crops, crops[:, :, ::-1])]
    vectors = (network(both[0]) + network(both[1])).double().numpy() / 2
    norms = np.linalg.norm(vectors, axis=1)
    unit = vectors / norms[:, None]
    return ((unit[::2] - unit[1::2]) ** 2).sum(axis=1), norms.reshape(-1, 2).min(axis=1)


@cache
def thresholds(made: Set, network: nn.Module, size: int | None) -> np.ndarray:
    """Return the threshold (P,) of each pair: the first best one on the other folds."""
    distances, _ = embed(made, network, size)
    grid = np.arange(0, 4, 0.01)
    best = []
    for fold in range(10):
        others = fold != FOLDS
        correct = [np.sum((distances[others] < threshold) == made.issame[others]) for threshold in grid]
        best.append(grid[np.argmax(correct)])
    return np.array(best)[FOLDS]


def correct_pairs(made: Set, network: nn.Module, size: int | None) -> np.ndarray:
    return (embed(made, network, size)[0] < thresholds(made, network, size)) == made.issame


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Set]:
    """A list of pairs with groups and its images: people are coarse patterns, images of a person differ by noise."""
    root = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(4)
    issame = np.arange(PAIRS) % 2 == 0
    groups = np.array(["north", "south", "west"])[rng.integers(0, 3, PAIRS)]
    images, lines = [], []
    for pair, same in enumerate(issame):
        people = rng.normal(128, 40, (2, 8, 8, 3))
        for side in (0, 1):
            coarse = people[0 if same else side] + rng.normal(0, 34, (8, 8, 3))
            fine = rng.normal(0, 40, (28, 28, 3))
            image = sum(cv2.resize(part, (112, 112), interpolation=cv2.INTER_CUBIC) for part in (coarse, fine))
            images.append(np.clip(image, 0, 255).astype(np.uint8))
            cv2.imwrite(str(root / f"{2 * pair + side:03d}.png"), images[-1][:, :, ::-1])
        lines.append(f"{2 * pair:03d} {2 * pair + 1:03d} {int(same)} {groups[pair]}\n")
    (root / "pairs.txt").write_text("".join(lines))
    return root, Set(np.stack(images), issame, groups)


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    """Return a function that runs validation.py on the pairs: (page, JSON, console)."""
    root, _ = pairs
    out = tmp_path_factory.mktemp("out")

    def read(file: Path, channel_order: None, input_scale: None, *, crop: str | None) -> PublicNetwork:
        return PublicNetwork(
            name="Coarse",
            family="this toolkit",
            embedding_size=24,
            network=NETWORKS[file.stem],
            channel_order="RGB",
            input_scale="-1..1",
            crop=crop or "128",
        )

    for name in NETWORKS:
        (out / f"{name}.pth").touch()

    def validate(*arguments: str) -> tuple[str, dict, str]:
        files = [f"--report={out}/page.html", f"--json={out}/numbers.json", f"--plot={out}/roc.png"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(out)
            patch.setattr("util.public_networks.read_public_network", read)
            sets = ["--data_dir=nothing", f"--val_data=faces={root}/pairs.txt"]
            console = io.StringIO()
            patch.setattr("sys.stdout", console)
            validation.main(["--gpu_num=cpu", *sets, *files, *arguments])
        return (out / "page.html").read_text(), json.loads((out / "numbers.json").read_text()), console.getvalue()

    return validate


@pytest.fixture(scope="module")
def single(run) -> tuple[str, dict, str]:
    return run("--load_dir=first.pth", "--LR_eval", "--LR_scale", "4", "8")


@pytest.fixture(scope="module")
def compared(run) -> tuple[str, dict, str]:
    return run("--compare", "first.pth", "B=second.pth")


def sections(page: str) -> dict[str, str]:
    """Return {heading: HTML} of a page."""
    parts = re.split(r'<section id="[^"]*">\s*<h2>(.*?)</h2>', page)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(section: str) -> list[list[str]]:
    """Return the cells of the rows of a section's table, without its heading."""
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]
    return [[html.unescape(cell) for cell in row] for row in found if row]


def test_accuracy_table_is_that_of_the_embeddings(single, pairs):
    made = pairs[1]
    found = rows(sections(single[0])["Accuracy"])
    assert [row[0] for row in found] == [f"faces{view}" for view in VIEWS]
    for row, size in zip(found, VIEWS.values(), strict=True):
        distances, _ = embed(made, NETWORKS["first"], size)
        accuracies = correct_pairs(made, NETWORKS["first"], size).reshape(10, -1).mean(axis=1)
        threshold = thresholds(made, NETWORKS["first"], size).mean()
        different = np.sort(distances[~made.issame])
        tars = [np.mean(distances[made.issame] < different[int(far * PAIRS / 2)]) for far in (1e-3, 1e-2)]
        assert row[1] == f"{accuracies.mean():.4f} ± {accuracies.std():.4f}" and accuracies.mean() > 0.7
        assert row[2:5] == [
            f"{threshold:.3f}",
            f"{1 - threshold / 2:.3f}",
            f"{roc_auc_score(made.issame, -distances):.4f}",
        ]
        assert row[6:9] == [f"{tars[0]:.4f}", f"{tars[1]:.4f}", str(PAIRS)]


def test_thresholds_at_far_are_those_of_the_embeddings(single, pairs):
    made = pairs[1]
    section = sections(single[0])["Thresholds for a false accept rate"]
    found = rows(section)
    assert [row[:2] for row in found] == [[far, f"faces{view}"] for view in VIEWS for far in ("1e-1", "1e-2")]
    assert "not shown: 1/100 (faces)" in section
    rng = np.random.default_rng(9)
    for index, row in enumerate(found):
        distances, _ = embed(made, NETWORKS["first"], list(VIEWS.values())[index // 2])
        far, same = float(row[0]), distances[made.issame]
        different = np.sort(distances[~made.issame])
        threshold = different[int(far * len(different))]  # the first one that must not be accepted
        tar = np.mean(same < threshold)
        assert [row[2], row[4], row[6]] == [f"{threshold:.4f}", f"{1 - threshold / 2:.4f}", f"{tar:.4f}"]
        draws = [np.sort(rng.choice(different, len(different)))[int(far * len(different))] for _ in range(2000)]
        rates = [np.mean(rng.choice(same, len(same)) < drawn) for drawn in draws]
        low, high = np.quantile(draws, (0.025, 0.975))
        bounds = [np.quantile(rates, (0.025, 0.975)), wilson(round(tar * len(same)), len(same))]
        expected = [
            (low, high),
            (1 - high / 2, 1 - low / 2),
            (min(lo for lo, _ in bounds), max(hi for _, hi in bounds)),
        ]
        for cell, ends in zip(row[3::2], expected, strict=True):
            np.testing.assert_allclose([float(end) for end in cell.split(" to ")], ends, atol=0.04)


def test_folds_and_quality_are_those_of_the_embeddings(single, pairs):
    made, found = pairs[1], sections(single[0])
    for index, size in enumerate(VIEWS.values()):
        _, norms = embed(made, NETWORKS["first"], size)
        correct = correct_pairs(made, NETWORKS["first"], size)
        accuracies = [f"{fold.mean():.4f}" for fold in np.split(correct, 10)]
        assert rows(found["Accuracy per fold"])[index][1:] == accuracies
        by_quality = correct[np.argsort(norms)]
        errors = [1 - by_quality[int(fraction * PAIRS) :].mean() for fraction in (0, 0.05, 0.1, 0.2, 0.3, 0.5)]
        np.testing.assert_allclose([float(cell) for cell in rows(found["Quality"])[index][1:]], errors, atol=6e-5)


def test_low_resolution_table_has_what_was_lost(single, pairs):
    made = pairs[1]
    high, *low = (correct_pairs(made, NETWORKS["first"], size).mean() for size in VIEWS.values())
    expected = [
        ["faces", f"x{scale}", high, accuracy, high - accuracy] for scale, accuracy in zip((4, 8), low, strict=True)
    ]
    for row, values in zip(rows(sections(single[0])["Low resolution"]), expected, strict=True):
        assert row == [*values[:2], *(f"{value:.4f}" for value in values[2:])]
    assert len({high, *low}) > 1


def test_groups_and_gap_are_those_of_the_embeddings(single, pairs):
    made = pairs[1]
    found = rows(sections(single[0])["Groups"])
    assert [row[0] for row in found] == ["north", "south", "west", "gap"] * 3
    for index, size in enumerate(VIEWS.values()):
        correct = correct_pairs(made, NETWORKS["first"], size)
        accuracies = []
        for row in found[4 * index : 4 * index + 3]:
            members = made.groups == row[0]
            accuracies.append(correct[members].mean())
            far, frr = (1 - correct[members & (made.issame == same)].mean() for same in (False, True))
            ends = wilson(correct[members].sum(), members.sum())
            assert row[2:5] == [str(members.sum()), f"{accuracies[-1]:.4f}", f"{ends[0]:.4f} to {ends[1]:.4f}"]
            assert row[5:7] == [f"{far:.4f}", f"{frr:.4f}"]
        assert found[4 * index + 3][3] == f"{max(accuracies) - min(accuracies):.4f}"


def test_pictures_are_the_worst_pairs_as_the_network_sees_them(single, pairs):
    made = pairs[1]
    for view, size in VIEWS.items():
        distances, _ = embed(made, NETWORKS["first"], size)
        wrong = ~correct_pairs(made, NETWORKS["first"], size)
        accepts = sorted(np.flatnonzero(wrong & ~made.issame), key=lambda pair: distances[pair])
        rejects = sorted(np.flatnonzero(wrong & made.issame), key=lambda pair: -distances[pair])
        mean = thresholds(made, NETWORKS["first"], size).mean()
        hardest = sorted(np.flatnonzero(~wrong), key=lambda pair: abs(distances[pair] - mean))
        section = sections(single[0])[f"Pairs of faces{view}"]
        assert f"False accepts: {len(accepts)} of 100 pairs" in section and len(accepts) > 3
        assert f"False rejects: {len(rejects)} of 100 pairs" in section and len(rejects) > 3
        expected = [*accepts[:10], *rejects[:10], *hardest[:10]]
        shown = re.findall(r'base64,([^"]+)".*?alt="([^"]*)"', section, re.S)
        assert len(shown) == len(expected)
        for pair, (data, text) in zip(expected, shown, strict=True):
            names = f"{2 * pair:03d}.png\n{2 * pair + 1:03d}.png"
            assert f"distance {distances[pair]:.3f}, cosine {1 - distances[pair] / 2:.3f}\n{names}\nnorms" in text
            jpeg = np.frombuffer(base64.b64decode(data), np.uint8)
            crops = eval_crop(made.images[2 * pair : 2 * pair + 2])
            seen = np.hstack(crops if size is None else degrade(crops, size)).astype(int)
            decoded = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)
            assert decoded.shape == (112, 224, 3) and np.abs(decoded - seen).mean() < 8  # JPEG


def test_json_has_thresholds_cosines_and_groups(single, pairs):
    page, numbers, _ = single
    table = {(row[0], row[1]): row for row in rows(sections(page)["Thresholds for a false accept rate"])}
    for view, key in zip(VIEWS, ("HR", "LRx4", "LRx8"), strict=True):
        found = numbers["views"][key]["sets"]["faces"]
        assert found["cosine"] == 1 - found["threshold"] / 2
        assert list(found["thresholds_at_far"]) == ["1e-1", "1e-2"]
        for far, point in found["thresholds_at_far"].items():
            row = table[far, f"faces{view}"]
            assert [f"{point[name]:.4f}" for name in ("threshold", "cosine", "tar")] == row[2::2]
            for name, cell in zip(("threshold", "cosine", "tar"), row[3::2], strict=True):
                assert "{:.4f} to {:.4f}".format(*point[f"{name}_interval"]) == cell
        accuracies = [group["accuracy"] for group in found["groups"].values()]
        assert list(found["groups"]) == ["north", "south", "west"]
        assert found["accuracy_gap"] == max(accuracies) - min(accuracies)


def test_comparison_is_that_of_the_embeddings(compared, pairs):
    made = pairs[1]
    first, second = (correct_pairs(made, network, None) for network in NETWORKS.values())
    losses, wins = np.sum(first & ~second), np.sum(second & ~first)
    tail = sum(math.comb(losses + wins, count) for count in range(min(losses, wins) + 1)) / 2 ** (losses + wins)
    page, numbers, _ = compared
    (row,) = rows(sections(page)["Comparison"])
    assert row[:5] == ["B", f"{second.mean():.4f}", "first", f"{first.mean():.4f}", "faces"]
    assert row[5] == f"{second.mean() - first.mean():+z.4f}"
    assert row[7:] == [f"{wins} : {losses}", f"{min(1, 2 * tail):.3g}"] and wins > 3 and losses > 3
    gains = second.astype(int) - first
    rng = np.random.default_rng(2)
    draws = [
        np.mean([fold[rng.integers(0, len(fold), len(fold))].mean() for fold in np.split(gains, 10)])
        for _ in range(2000)
    ]
    low, high = (float(end) for end in row[6].split(" to "))
    np.testing.assert_allclose((low, high), np.quantile(draws, (0.025, 0.975)), atol=0.01)
    (entry,) = numbers["comparisons"]
    assert (entry["baseline"], entry["network"], entry["set"], entry["view"]) == ("first", "B", "faces", "HR")
    assert (entry["comparison"]["only_first"], entry["comparison"]["only_second"]) == (losses, wins)
    assert entry["comparison"]["p_value"] == pytest.approx(min(1, 2 * tail))
    assert list(numbers["networks"]) == ["first", "B"]
    accuracies = [network["views"]["HR"]["sets"]["faces"]["accuracy"] for network in numbers["networks"].values()]
    np.testing.assert_allclose(accuracies, [first.mean(), second.mean()])
    assert f"first is right and B is wrong: {losses} pairs" in page
    assert f"B is right and first is wrong: {wins} pairs" in page


def test_console_prints_the_tables_of_the_report(compared):
    page, _, console = compared
    printed = [re.split(r"\s{2,}", line.strip()) for line in console.splitlines()]
    found = sections(page)
    expected = [*rows(found["Comparison"]), *rows(found["Thresholds of first"]), *rows(found["Thresholds of B"])]
    assert len(expected) == 5
    for row in expected:
        assert row in printed
    assert ["group", "set", "pairs", "accuracy", "95 % interval", "FAR", "FRR", "own threshold"] in printed


@pytest.mark.parametrize("kind", ["single", "compared"])
def test_chromium_opens_the_report_without_a_message(request, tmp_path, open_in_chromium, kind):
    (tmp_path / "page.html").write_text(request.getfixturevalue(kind)[0])
    for width, scheme in ((400, 0), (1400, 1)):
        shot = tmp_path / f"{width}.png"
        flags = [f"--window-size={width},2000", f"--blink-settings=preferredColorScheme={scheme}"]
        open_in_chromium(tmp_path / "page.html", *flags, f"--screenshot={shot}")
        pixels = cv2.imread(str(shot))
        assert pixels.shape == (2000, width, 3)
        assert (pixels[:, -8:] == pixels[0, -1]).all()  # nothing is wider than the page


def test_one_side_shows_the_second_image_in_full(run, pairs):
    page, *_ = run("--load_dir=first.pth", "--LR_eval", "--LR_scale=8", "--LR_oneside", "--batch_size=32")
    section = sections(page)["Pairs of faces LR"]
    data, text = re.search(r'base64,([^"]+)".*?alt="([^"]*)"', section, re.S).groups()
    pair = int(re.search(r"(\d+)\.png", text)[1]) // 2
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR_RGB).astype(int)
    crops = eval_crop(pairs[1].images[2 * pair : 2 * pair + 2])
    assert np.abs(decoded[:, :112] - degrade(crops[0], 14)).mean() < 8
    assert np.abs(decoded[:, 112:] - crops[1]).mean() < 8 < np.abs(decoded[:, :112] - crops[0]).mean()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--compare", "a.pth"], 2, "--compare=a=a.pth: is one network"),
        (["--compare", "a.pth", "b.pth", "--resume_dir=c"], 2, "--compare: names its networks itself"),
        (["--compare", "run/Backbone_Best.pth", "run/Backbone_1_2.pth"], 2, "'run' is there twice; write NAME=PATH"),
        (["--compare", "a=no.pth", "b=nothing.pth"], 3, "--compare=no.pth: "),
        (["--report=/proc/page.html"], 2, "--report=/proc: cannot be written to"),
        (["--report=tests"], 2, "--report=tests: is a folder"),
    ],
)
def test_mistakes_end_in_one_line(arguments, code, message, end_of):
    ended, printed = end_of(validation.main, ["--gpu_num=cpu", *arguments])
    assert ended == code
    assert printed.count("\n") == 1 and message in printed


def test_groups_survive_an_order_for_ten_folds(pairs, tmp_path):
    """A list with all same pairs first is interleaved; the groups and names go with the pairs."""
    root, made = pairs
    lines = (root / "pairs.txt").read_text().splitlines(keepends=True)
    (tmp_path / "blocks.txt").write_text("".join(lines[::2] + lines[1::2]))
    (found,), _ = find_pair_sets("nothing", {"faces": (str(tmp_path / "blocks.txt"), str(root))})
    for number in range(PAIRS):
        pair = int(found.image_name(2 * number)[:3]) // 2
        assert found.groups[number] == made.groups[pair] and found.issame[number] == made.issame[pair]
