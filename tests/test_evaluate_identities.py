"""Evaluation on identities: made sets whose answers are known by hand, and figures that are computed again slowly."""

import json
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import nn

from applications.evaluate_identities.__main__ import IdentitySettings, main
from applications.evaluate_identities.folder import confused_people, evaluate_folder, sample_pairs, split_gallery
from applications.evaluate_identities.ijb import IjbSet
from applications.evaluate_identities.report import Evaluation
from applications.evaluate_identities.tinyface import TinyFaceSet
from model.backbone import build_backbone
from util.data.image_folder import ImageFolder
from util.embedding import EmbeddedImages, embed_images
from util.errors import DataError
from util.face import ARCFACE_TEMPLATE
from util.html_page import write_page
from util.identification import SearchResult, search
from util.public_networks import PublicNetwork


class MeanColor(nn.Module):
    """A backbone whose embedding is the mean color in [-1, 1]: an image of one color has a known embedding."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


MEAN_COLOR = PublicNetwork(
    name="MeanColor",
    family="test",
    embedding_size=3,
    network=MeanColor(),
    channel_order="RGB",
    input_scale="-1..1",
    crop="whole",
)


def write_color(file: Path, vector: tuple[float, float, float], shape: tuple[int, int] = (112, 112)) -> None:
    """Write an image of one color, exactly (a PNG, whatever its name), whose embedding is `vector`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    color = np.rint((np.array(vector[::-1]) + 1) * 127.5).astype(np.uint8)
    file.write_bytes(cv2.imencode(".png", np.full((*shape, 3), color))[1].tobytes())


def embed(images) -> EmbeddedImages:
    return embed_images(MEAN_COLOR, images, [torch.device("cpu")], strict=True)


# Folders of people


def embedded_people(labels: np.ndarray, noise: float) -> EmbeddedImages:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(labels.max() + 1, 16))[labels] + noise * rng.normal(size=(len(labels), 16))
    norms = np.linalg.norm(vectors, axis=1)
    vectors = (vectors / norms[:, None]).astype(np.float32)
    return EmbeddedImages(np.arange(len(labels)), vectors, norms.astype(np.float32), {})


class MadeImages:
    def __init__(self, labels: np.ndarray):
        self.root = Path("made")
        self.labels = labels
        self.classes = [f"person {number}" for number in range(labels.max() + 1)]


@pytest.mark.parametrize(("limit", "counts"), [(10_000, (28, 92)), (20, (20, 20)), (1, (1, 1))])
def test_sample_pairs_are_different_and_of_both_kinds(limit, counts):
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 3], [6, 5, 3, 2]))  # 15 + 10 + 3 + 1 same pairs
    first, second = sample_pairs(np.delete(labels, np.flatnonzero(labels == 3)[0]), limit, np.random.default_rng(2))
    labels = np.delete(labels, np.flatnonzero(labels == 3)[0])
    pairs = {tuple(sorted(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    assert len(pairs) == len(first) and all(a != b for a, b in pairs)
    same = labels[first] == labels[second]
    expected = sum(labels[a] == labels[b] for a, b in combinations(range(len(labels)), 2))
    assert (limit < 10_000 or counts[0] == expected) and 15 * 14 // 2 - expected >= counts[1] - 15
    assert same.sum() == min(limit, expected) and (~same).sum() == min(limit, 15 * 14 // 2 - expected)


def test_sample_pairs_of_one_kind_are_equally_likely():
    labels = np.array([0, 0, 0, 1, 1, 2])
    seen = {}
    for seed in range(600):
        first, second = sample_pairs(labels, 1, np.random.default_rng(seed))
        for pair in zip(first.tolist(), second.tolist(), strict=True):
            key = tuple(sorted(pair))
            seen[key] = seen.get(key, 0) + 1
    assert set(seen) == set(combinations(range(6), 2))
    for (a, b), count in seen.items():
        expected = 600 / 4 if labels[a] == labels[b] else 600 / 11
        assert abs(count - expected) < 5 * expected**0.5


def test_split_gallery_has_no_image_twice_and_strangers():
    labels = np.repeat(np.arange(10), [1, 1, 1, 2, 3, 4, 5, 6, 2, 2])
    gallery, probes = split_gallery(labels, 0.3, 2, np.random.default_rng(0))
    used = np.concatenate([*gallery, probes])
    assert sorted(used.tolist()) == list(range(len(labels)))
    in_gallery = {int(labels[rows[0]]) for rows in gallery}
    assert len(in_gallery) == len(gallery) == 7
    for rows in gallery:
        assert len(set(labels[rows])) == 1
        total = int((labels == labels[rows[0]]).sum())
        assert len(rows) == max(1, min(2, total - 1))
    assert set(labels[probes]) - in_gallery == set(range(10)) - in_gallery


def test_folder_figures_equal_loops_over_images():
    labels = np.repeat(np.arange(12), [4, 3, 5, 1, 2, 6, 4, 3, 1, 2, 5, 4])
    embedded = embedded_people(labels, noise=1.0)
    settings = IdentitySettings(data="made", network="x", unknown=0.5, gallery_images=2, seed=3)
    found = evaluate_folder(MadeImages(labels), embedded, settings).figures

    cosines = {True: [], False: []}
    for a, b in combinations(range(len(labels)), 2):
        cosines[bool(labels[a] == labels[b])].append(float(embedded.embeddings[a] @ embedded.embeddings[b]))
    verification = found["verification"]
    assert [verification["same_pairs"], verification["different_pairs"]] == [len(cosines[True]), len(cosines[False])]
    assert [point["far"] for point in verification["at_far"]] == [1e-1, 1e-2]
    for point in verification["at_far"]:
        accepted = [cosine for cosine in cosines[False] if cosine > point["cosine"] + 1e-6]
        assert len(accepted) == int(point["far"] * len(cosines[False]))
        assert point["tar"] == pytest.approx(np.mean([cosine > point["cosine"] + 1e-6 for cosine in cosines[True]]))
        assert point["threshold"] == pytest.approx(2 - 2 * point["cosine"])

    rng = np.random.default_rng(3)
    sample_pairs(labels, settings.pairs, rng)  # takes the same random numbers
    gallery, probes = split_gallery(labels, 0.5, 2, rng)
    ranks, correct, strangers = [], [], []
    for probe in probes:
        scores = {}
        for rows in gallery:
            mean = embedded.embeddings[rows].mean(axis=0)
            scores[int(labels[rows[0]])] = float(embedded.embeddings[probe] @ mean / np.linalg.norm(mean))
        order = sorted(scores, key=lambda person: -scores[person])
        if labels[probe] in scores:
            ranks.append(order.index(labels[probe]) + 1)
            correct.append(scores[order[0]] if ranks[-1] == 1 else -1.0)
        else:
            strangers.append(max(scores.values()))
    identification = found["identification"]["all"]
    assert identification["mated_probes"] == len(ranks) and identification["non_mated_probes"] == len(strangers)
    for rank in (1, 5, 20):
        assert identification["ranks"][str(rank)] == pytest.approx(np.mean(np.array(ranks) <= rank))
    (point,) = identification["at_fpir"]  # too few strangers for 1e-2
    threshold = sorted(strangers, reverse=True)[int(0.1 * len(strangers))]
    assert point["fpir"] == 0.1 and point["cosine"] == pytest.approx(threshold, abs=1e-6)
    assert point["tpir"] == pytest.approx(np.mean(np.array(correct) > threshold + 1e-6))


def test_confused_people_are_sorted_by_number_of_images():
    found = SearchResult(
        mate_ranks=np.array([2, 1, 3, 0, 5]),
        mates=np.array([0, 0, 0, -1, 1]),
        mate_scores=np.float32([0.3, 0.9, 0.2, np.nan, 0.1]),
        average_precisions=np.zeros(5),
        others=np.array([1, 1, 1, 1, 0]),
        other_scores=np.float32([0.5, 0.4, 0.7, 0.9, 0.6]),
    )
    confused = confused_people(found, np.array([7, 7, 7, 9, 8]), np.array([7, 8]))
    assert [(key, count) for key, (count, _) in confused] == [((7, 8), 2), ((8, 7), 1)]
    assert confused[0][1][1] == pytest.approx(0.7)


def test_folder_without_a_second_image_raises():
    labels = np.arange(5)
    settings = IdentitySettings(data="made", network="x")
    with pytest.raises(DataError, match=r"made: 5 people, of whom 0 have two images"):
        evaluate_folder(MadeImages(labels), embedded_people(labels, 0.1), settings)


# TinyFace


@pytest.fixture
def tinyface(tmp_path) -> Path:
    """Write two people with two images each, a probe of each, and two distractors, in TinyFace's layout."""
    place = tmp_path / "tinyface" / "Testing_Set"
    mates = {"1_a.jpg": (1, 0, 0), "1_b.jpg": (0.6, 0, 0.8), "2_a.jpg": (0, 1, 0), "2_b.jpg": (0, -1, 0)}
    for name, vector in mates.items():
        write_color(place / "Gallery_Match" / name, vector)
    write_color(place / "Gallery_Distractor" / "more" / "d1.jpg", (0.8, 0, 0.6))
    write_color(place / "Gallery_Distractor" / "d2.jpg", (0, 0.8, -0.6))
    write_color(place / "Probe" / "1_p.jpg", (1, 0, 0))
    write_color(place / "Probe" / "2_p.jpg", (0, 0.6, -0.8))

    def cells(names):
        return np.array([[np.array([name])] for name in names], object).reshape(-1, 1)

    savemat(
        place / "gallery_match_img_ID_pairs.mat",
        {"gallery_set": cells(mates), "gallery_ids": np.array([[1], [1], [2], [2]])},
    )
    savemat(
        place / "probe_img_ID_pairs.mat",
        {"probe_set": cells(["1_p.jpg", "2_p.jpg"]), "probe_ids": np.array([[1], [2]], np.uint16)},
    )
    return place.parent


def test_tinyface_answer_is_known(tinyface):
    """Probe 1: 1_a (1.0), d1 (0.8), 1_b (0.6). Probe 2: d2 (0.96), 2_a (0.6), 1_a (0), d1 (-0.48), 2_b (-0.6)."""
    protocol = TinyFaceSet.find(tinyface, None)
    figures = protocol.evaluate(embed(protocol)).figures
    found = figures["identification"]["TinyFace"]
    assert found["mated_probes"] == 2 and found["non_mated_probes"] == 0
    assert found["ranks"] == {"1": 0.5, "5": 1.0, "20": 1.0}
    # Mates at ranks 1 and 3; at 2 and 5.
    first = ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    second = ((0 / 1 + 1 / 2) / 2 + (1 / 4 + 2 / 5) / 2) / 2
    assert figures["mean_average_precision"] == pytest.approx((first + second) / 2)


def test_tinyface_takes_aligned_images_from_another_folder(tinyface, tmp_path):
    aligned = tmp_path / "aligned"
    (tinyface / "Testing_Set" / "Probe").rename(tmp_path / "probes_moved")
    for name in ("Gallery_Match", "Gallery_Distractor"):
        (aligned / name).parent.mkdir(exist_ok=True)
        (tinyface / "Testing_Set" / name).rename(aligned / name)
    with pytest.raises(DataError, match=r"Probe: no images in it"):
        TinyFaceSet.find(tinyface, aligned)
    write_color(aligned / "Probe" / "1_p.png", (0, 1, 0))
    with pytest.raises(DataError, match=r"probe_img_ID_pairs.mat: 1 of its images are not in .*Probe, first 2_p.jpg"):
        TinyFaceSet.find(tinyface, aligned)
    write_color(aligned / "Probe" / "2_p.png", (0, 1, 0))
    protocol = TinyFaceSet.find(tinyface / "Testing_Set", aligned)
    assert protocol.evaluate(embed(protocol)).figures["identification"]["TinyFace"]["ranks"]["1"] == 0.5


def test_tinyface_warns_of_images_that_are_not_square(tinyface):
    write_color(tinyface / "Testing_Set" / "Probe" / "1_p.jpg", (1, 0, 0), shape=(20, 16))
    protocol = TinyFaceSet.find(tinyface, None)
    assert any("1 images are not square" in fact for fact in protocol.evaluate(embed(protocol)).facts)


def test_tinyface_with_a_damaged_list_raises(tinyface):
    file = tinyface / "Testing_Set" / "probe_img_ID_pairs.mat"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"probe_img_ID_pairs.mat: not a list of TinyFace"):
        TinyFaceSet.find(tinyface, None)
    savemat(file, {"probe_set": np.array([["a"]], object)})
    with pytest.raises(DataError, match=r"probe_ids"):
        TinyFaceSet.find(tinyface, None)


# IJB

# Image: template, medium, embedding, score of the detector.
IJB_IMAGES = [
    (10, 1, (1, 0, 0), 1.0),
    (20, 2, (0, 1, 0), 0.9),
    (30, 5, (1, 0, 0), 1.0),  # two frames of a video …
    (30, 5, (0, 0, 1), 1.0),
    (30, 6, (1, 0, 0), 0.5),  # … and a photograph of half the weight
    (40, 7, (0, 1, 0), 1.0),
    (40, 8, (1, 0, 0), 0.25),
    (50, 9, (0, 0, 1), 1.0),
]
# (10) x; (20) y; (30) (0.5, 0, 0.5) + (0.5, 0, 0) = (1, 0, 0.5); (40) (0.25, 1, 0); (50) z


@pytest.fixture
def ijbc(tmp_path) -> Path:
    folder = tmp_path / "IJBC"
    meta = folder / "meta"
    meta.mkdir(parents=True)
    points = " ".join(f"{x + 30:.3f} {y + 40:.3f}" for x, y in ARCFACE_TEMPLATE)
    landmarks, media = "", ""
    for number, (template, medium, vector, score) in enumerate(IJB_IMAGES, 1):
        write_color(folder / "loose_crop" / f"{number}.jpg", vector, shape=(200, 180))
        landmarks += f"{number}.jpg {points} {score}\n"
        media += f"{number}.jpg {template} {medium}\n"
    (meta / "ijbc_name_5pts_score.txt").write_text(landmarks)
    (meta / "ijbc_face_tid_mid.txt").write_text(media)
    (meta / "ijbc_template_pair_label.txt").write_text("10 30 1\n20 40 1\n10 40 0\n20 30 0\n10 20 0\n30 50 0\n")
    header = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n"
    (meta / "ijbc_1N_gallery_G1.csv").write_text(f"{header}10,1,img/1.png,3\n20,2,img/2.png,4\n")
    (meta / "ijbc_1N_gallery_G2.csv").write_text(f"{header}50,5,img/8.png,9\n20,6,img/2.png,4\n")
    (meta / "ijbc_1N_probe_mixed.csv").write_text(f"{header}30,1,a,1\n30,1,b,1\n40,2,c,1\n50,5,d,1\n")
    return folder


def test_ijb_answer_is_known(ijbc):
    protocol = IjbSet.find(ijbc)
    figures = protocol.evaluate(embed(protocol)).figures

    # Cosines of the pairs: 10-30 0.894, 20-40 0.970 (same); 10-40 0.243, 20-30 0, 10-20 0, 30-50 0.447 (different).
    verification = figures["verification"]
    assert verification["auc"] == 1 and verification["eer"] == 0
    assert verification["at_far"] == []  # four pairs cannot show a FAR of 0.1

    # Gallery 1 holds x (1) and y (2). Probe 30 finds 1 (0.894), probe 40 finds 2; probe 50 is a stranger with 0.
    # Gallery 2 holds z (5) and y (6). Probe 50 finds 5. Probes 30 and 40 are strangers with 0.447 and 0.970.
    found = figures["identification"]
    assert found["G1"]["ranks"]["1"] == found["G2"]["ranks"]["1"] == 1
    assert [found[name]["mated_probes"] for name in ("G1", "G2", "mean")] == [2, 1, 3]
    assert [found[name]["non_mated_probes"] for name in ("G1", "G2")] == [1, 2]


def test_ijb_templates_and_scores_are_known(ijbc, monkeypatch):
    protocol = IjbSet.find(ijbc)
    monkeypatch.setattr("util.analysis.FAR_LEVELS", (0.5, 0.25))
    monkeypatch.setattr("applications.evaluate_identities.ijb.FPIRS", (0.5,))
    figures = protocol.evaluate(embed(protocol)).figures
    points = figures["verification"]["at_far"]
    assert [point["tar"] for point in points] == [1, 1]
    # The first different pairs that are refused: 0.447 and 0.243 are accepted at 0.5, and 0.447 alone at 0.25.
    assert [point["cosine"] for point in points] == pytest.approx([0, 0.25 / 1.0625**0.5], abs=0.02)
    (point,) = figures["identification"]["G2"]["at_fpir"]
    assert point["cosine"] == pytest.approx(1 / 5**0.5, abs=0.01) and point["tpir"] == 1


def test_ijb_without_lists_of_search_verifies_only(ijbc):
    for name in ("gallery_G1", "gallery_G2"):
        (ijbc / "meta" / f"ijbc_1N_{name}.csv").unlink()
    with pytest.raises(DataError, match=r"ijbc_1N_gallery_G1.csv: missing"):
        IjbSet.find(ijbc)
    (ijbc / "meta" / "ijbc_1N_probe_mixed.csv").unlink()
    protocol = IjbSet.find(ijbc)
    assert "without the lists of 1:N" in protocol.describe()
    assert "identification" not in protocol.evaluate(embed(protocol)).figures


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ijbc_template_pair_label.txt", "10 99 1\n10 20 0\n", "template 99 has no image"),
        ("ijbc_template_pair_label.txt", "10 20 1\n10 30 1\n20 30 0\n", "lacks same or different pairs"),
        ("ijbc_template_pair_label.txt", "10 20\n", "cannot be read as a list of IJB"),
        ("ijbc_template_pair_label.txt", "", "empty"),
        ("ijbc_face_tid_mid.txt", "1.jpg 10 1\n", "8 images in ijbc_name_5pts_score.txt and 1 in"),
        ("ijbc_name_5pts_score.txt", "missing", "ijbc_name_5pts_score.txt: missing"),
        ("ijbc_name_5pts_score.txt", "1.jpg 1 2 3\n", "cannot be read as a list of IJB"),
    ],
)
def test_ijb_with_a_damaged_list_raises(ijbc, name, text, message):
    (ijbc / "meta" / name).write_text(text)
    if text == "missing":
        (ijbc / "meta" / name).unlink()
    with pytest.raises(DataError, match=message):
        IjbSet.find(ijbc)


def test_ijb_with_a_missing_or_cut_image_raises(ijbc):
    image = ijbc / "loose_crop" / "3.jpg"
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(DataError, match=r"3.jpg: not an image that can be decoded"):
        embed(IjbSet.find(ijbc))
    image.unlink()
    with pytest.raises(DataError, match=r"loose_crop: 1 images are missing, first 3.jpg"):
        IjbSet.find(ijbc)


# The program


@pytest.fixture(scope="module")
def network_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("network") / "Backbone.pth"
    torch.save(build_backbone("MobileFaceNet_025", embedding_size=16).state_dict(), file)
    return file


def test_program_writes_the_figures_and_a_page(people_folder, network_file, tmp_path, capsys):
    (people_folder / "Bob" / "Bob_0000.jpg").write_bytes(b"cut")
    outputs = [f"--json={tmp_path}/figures.json", f"--report={tmp_path}/report.html", "--gpu_num=cpu", "--unknown=0.4"]
    main([f"--data={people_folder}", f"--network={network_file}", *outputs])
    printed = capsys.readouterr().out
    assert "1 of 7 images cannot be used" in printed and "6 images of 3 people" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["verification"]["different_pairs"] == 6 * 5 // 2 - 1 - 3
    assert {"all"} == set(figures["identification"])
    page = (tmp_path / "report.html").read_text()
    assert "Verification (1:1)" in page and "data:image/jpeg" in page and "Ann" in page
    assert ImageFolder(people_folder).classes == ["Ann", "Bob", "Cid"]


def test_page_opens_in_a_browser(tmp_path, open_in_chromium):
    rng = np.random.default_rng(0)
    evaluation = Evaluation("Made", intro="A network.", facts=["A fact & more."])
    evaluation.add_pairs(
        "made pairs", np.append(rng.normal(0.6, 0.2, 500), rng.normal(0, 0.2, 500)), np.arange(1000) < 500
    )
    labels = np.repeat(np.arange(30), 8)
    faces = embedded_people(labels, noise=1.5).embeddings
    gallery = np.arange(0, 160, 8)  # the first image of 20 people
    evaluation.add_searches(
        {
            name: search(faces[start::3], labels[start::3], faces[gallery], labels[gallery])
            for start, name in ((1, "G1"), (2, "G2"))
        },
        ranks=(1, 5),
        fpirs=(0.1,),
    )
    evaluation.pictures["Errors"] = [(np.zeros((112, 336, 3), np.uint8), "Ann/1.jpg\nfound: <Bob>")]
    write_page(tmp_path / "page.html", evaluation.page())
    shown = open_in_chromium(tmp_path / "page.html", "--dump-dom")
    for text in ("A network.", "A fact &amp; more.", "made pairs", "non-mated probes", "mean", "&lt;Bob&gt;", "<svg"):
        assert text in shown, text


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"data": "/nowhere"}, 3, "error: /nowhere: "),
        ({"network": "/nowhere.pth"}, 3, "error: --network=/nowhere.pth: no such file"),
        ({"unknown": "1"}, 2, "error: --unknown: '1' is not a number from 0 to below 1"),
        ({"json": "/proc/none/x.json"}, 2, "error: --json=/proc/none: cannot be written"),
        ({"report": "/"}, 2, "error: --report=/: is a folder"),
    ],
)
def test_program_ends_in_one_line(people_folder, network_file, end_of, change, code, message):
    flags = {"data": people_folder, "network": network_file, "gpu_num": "cpu"} | change
    found, line = end_of(main, [f"--{name}={value}" for name, value in flags.items()])
    assert found == code and line.startswith(message) and line.count("\n") == 1
