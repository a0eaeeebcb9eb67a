"""Find, compare and name drawn faces, from Python and with the programs verify and identify."""

import csv
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from applications.align import align, detect
from applications.demo.data_set import Face as DrawnFace
from applications.demo.data_set import render
from applications.export.graph import Deployed, copy_onnx, write_onnx
from applications.identify.__main__ import main as identify
from applications.identify.media import find_probes
from applications.recognizer import Recognizer
from applications.verify.__main__ import main as verify
from util.annotate import GREEN, ORANGE, draw_face
from util.calibration import calibrate
from util.embedding_table import EmbeddingTable
from util.errors import DataError, UsageError
from util.gallery import Gallery
from util.image_io import write_image

STRANGERS = 60


class Pixels(nn.Module):
    """A network that tells drawn people apart: small images without their mean."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        small = nn.functional.avg_pool2d(images[:, :, 16:96, 16:96], 8).flatten(1)
        return small - small.mean(1, keepdim=True)


def photo(*people: int, shift: int = 0, scale: float = 1.3) -> np.ndarray:
    """Draw a photograph with one face of each person, the first the largest, (240, 220 each, 3)."""
    image = np.full((240, 220 * len(people), 3), 130, np.uint8)
    for place, person in enumerate(people):
        size = round(112 * (scale - 0.3 * place))
        face = cv2.resize(render(DrawnFace(7, person, 0, "frontal")), (size, size), interpolation=cv2.INTER_AREA)
        left = 220 * place + 20 + shift
        image[30 + shift : 30 + shift + size, left : left + size] = face
    return image


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with net.onnx, which holds a calibration, plain.onnx without one, photographs, and a gallery."""
    root = tmp_path_factory.mktemp("recognizer")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(STRANGERS, 300)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    calibration, _ = calibrate(vectors, np.arange(STRANGERS), source="60 images of noise", network="x")
    module = Deployed(Pixels(), "whole", preprocessing=False, flip=False)
    write_onnx(module, {"crop": "whole", "calibration": calibration.to_json()}, root / "net.onnx")
    copy_onnx(root / "net.onnx", {"crop": "whole"}, root / "plain.onnx")
    for person in (1, 2):
        for number in range(2):
            write_image(root / "people" / f"P{person}" / f"{number}.jpg", photo(person, shift=5 * number))
    write_image(root / "probes" / "one.jpg", photo(1, shift=12, scale=1.5))
    write_image(root / "probes" / "more" / "group.png", photo(2, 3, shift=3))
    write_image(root / "empty.jpg", np.full((200, 200, 3), 128, np.uint8))
    (root / "text.jpg").write_text("no image")
    return root


@pytest.fixture(scope="module")
def recognizer(place) -> Recognizer:
    return Recognizer(place / "net.onnx")


def test_embedding_is_that_of_the_aligned_face(recognizer):
    image = photo(1)
    aligned = align(image, detect([image])[0][0].landmarks)
    pixels = torch.from_numpy(aligned.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = Pixels()(pixels) + Pixels()(pixels.flip(3))
    expected = (expected / expected.norm()).numpy()
    np.testing.assert_allclose(recognizer.embed([image]), expected, atol=1e-5)
    assert recognizer.embed([]).shape == (0, 300)


def test_compare_gives_cosine_and_far(recognizer, place):
    same = recognizer.compare(place / "people/P1/0.jpg", str(place / "probes/one.jpg"))
    other = recognizer.compare(place / "people/P1/0.jpg", place / "people/P2/0.jpg")
    assert same.cosine > 0.9 > other.cosine
    assert same.cosine == pytest.approx(float(same.first.embedding @ same.second.embedding))
    assert same.squared_distance == pytest.approx(2 - 2 * same.cosine)
    assert same.far == 0 == recognizer.calibration.far(same.cosine)
    assert Recognizer(place / "plain.onnx").compare(photo(1), photo(1)).far is None


def test_selected_face_is_taken_among_several(place):
    group = photo(2, 3)
    largest, central = (Recognizer(place / "net.onnx", select=select) for select in ("largest", "central"))
    assert largest.compare(group, photo(2)).cosine > 0.9
    assert largest.compare(group, photo(2)).first.faces == 2
    assert central.compare(np.hstack([photo(2, 3), photo(2)[:, :100]]), photo(3, scale=1.0)).cosine > 0.85


def test_aligned_faces_need_no_detector(place):
    recognizer = Recognizer(place / "net.onnx", aligned=True)
    face = render(DrawnFace(7, 1, 0, "frontal"))
    assert recognizer.compare(face, cv2.resize(face, (224, 224))).cosine > 0.99
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert recognizer.embed([noise]).shape == (1, 300)


def test_search_names_people_and_leaves_strangers_unknown(recognizer, place):
    gallery = recognizer.enroll(place / "people")
    assert gallery.names == ["P1", "P1", "P2", "P2"]
    matches = recognizer.search(place / "probes/more/group.png", gallery, threshold=0.9)
    assert sorted((match.name or "-") for match in matches) == ["-", "P2"]
    for match in matches:
        assert (match.cosine >= 0.9) == (match.name is not None) and match.nearest in ("P1", "P2")
    assert recognizer.search(place / "empty.jpg", gallery, threshold=0.9) == []


def test_threshold_counts_the_faces_of_the_gallery(recognizer):
    assert recognizer.threshold(0.1, faces=10) == recognizer.calibration.threshold(0.01)
    with pytest.raises(
        UsageError, match=r"--far=0.01: with 1000 faces .* 1,770 pairs .* below 0.0006. Give 0.56 or more"
    ):
        recognizer.threshold(0.01, faces=1000)


def test_nearest_is_exact():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(500, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gallery = Gallery([f"face {number}" for number in range(400)], vectors[:400])
    cosines = vectors[400:].astype(float) @ vectors[:400].astype(float).T
    for (name, cosine), row in zip(gallery.nearest(vectors[400:]), cosines, strict=True):
        assert name == f"face {row.argmax()}" and cosine == pytest.approx(row.max(), abs=1e-6)


def test_gallery_of_embeddings_is_that_of_the_photographs(recognizer, place, tmp_path):
    photographs = recognizer.enroll(place / "people")
    names = ["P1/0.jpg", "P1/1.jpg", "P2/0.jpg", "P2/1.jpg"]
    for suffix, sha256 in (("npz", recognizer.sha256), ("parquet", "other")):
        table = EmbeddingTable(
            names, photographs.embeddings, quality=np.ones(4, np.float32), metadata={"sha256": sha256}
        )
        table.write(tmp_path / f"e.{suffix}")
    stored = recognizer.enroll(tmp_path / "e.npz")
    assert stored.names == photographs.names
    np.testing.assert_array_equal(stored.embeddings, photographs.embeddings)
    with pytest.raises(DataError, match=r"e.parquet: was made with another network than .*net.onnx"):
        recognizer.enroll(tmp_path / "e.parquet")


def test_enroll_names_what_it_leaves_out(recognizer, place, tmp_path, capsys):
    write_image(tmp_path / "people/Ann/a.jpg", photo(1))
    write_image(tmp_path / "people/Ann/empty.jpg", np.full((200, 200, 3), 128, np.uint8))
    (tmp_path / "people/Ann/notes.txt").write_text("text")
    assert recognizer.enroll(tmp_path / "people").names == ["Ann"]
    text = capsys.readouterr().out
    assert "warning: left out: " in text and "empty.jpg: no face found" in text
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: no face to enroll. Lay the photographs out as"):
        recognizer.enroll(tmp_path / "none")


# verify


def test_verify_prints_the_cosine_and_how_rare_it_is(recognizer, place, tmp_path, capsys):
    pair = [str(place / "probes/more/group.png"), str(place / "people/P2/1.jpg")]
    verify([*pair, f"--network={place}/net.onnx", f"--plot={tmp_path}/both.png", "--gpu_num=cpu"])
    lines = capsys.readouterr().out.splitlines()
    cosine = recognizer.compare(*pair).cosine
    assert lines[0].endswith("group.png: 2 faces, taking the largest one (--select)")
    assert lines[1] == f"cosine: {cosine:.4f} (squared distance: {2 - 2 * cosine:.4f})"
    assert lines[2] == recognizer.calibration.describe(cosine)
    assert lines[2] == "fewer than 1 in 1,770 strangers looks this alike to the network"
    plot = cv2.imread(str(tmp_path / "both.png"))[:, :, ::-1]
    assert plot.shape[0] > 420 and plot.shape[1] > 800
    assert ((plot == GREEN).all(axis=2)).sum() > 1000  # two boxes


def test_verify_without_a_calibration_says_how_to_get_one(place, capsys):
    pair = [str(place / f"people/P{person}/0.jpg") for person in (1, 2)]
    verify([*pair, f"--network={place}/plain.onnx", "--gpu_num=cpu"])
    assert "Make one with python -m applications.calibrate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["A"], 2, "A.jpg B.jpg: ['A'] is not two photographs"),
        (["one.jpg", "one.jpg", "one.jpg"], 2, "is not two photographs"),
        (["people/P1/0.jpg", "empty.jpg"], 3, "empty.jpg: no face found. Take a larger"),
        (["people/P1/0.jpg", "text.jpg"], 3, "text.jpg: not an image in spite of its name"),
        (["people/P1/0.jpg", "gone.jpg"], 3, "gone.jpg: cannot be read (No such file or directory)"),
        (["people/P1/0.jpg", "probes"], 3, "probes: cannot be read (a folder)"),
    ],
)
def test_verify_ends_in_one_line(place, end_of, words, code, message):
    paths = [str(place / word) if "." in word or word == "probes" else word for word in words]
    found, text = end_of(verify, [*paths, f"--network={place}/net.onnx", "--gpu_num=cpu"])
    assert found == code and message in text.replace(f"{place}/", "") and text.count("\n") == 1


# identify


def test_identify_writes_names_images_and_records(place, tmp_path, capsys):
    probes = tmp_path / "probes"
    write_image(probes / "group.png", photo(2, 3, shift=3))
    (probes / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    video = cv2.VideoWriter(str(probes / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (220, 240))
    for shift in range(4):
        video.write(photo(1, shift=shift)[:, :, ::-1])
    video.release()
    arguments = [str(probes), f"--gallery={place}/people", f"--network={place}/net.onnx", f"--out={tmp_path}/named"]
    identify([*arguments, "--threshold=0.9", "--every=2", "--gpu_num=cpu"])
    text = capsys.readouterr().out
    assert "gallery: 4 faces of 2 people" in text and "damaged.jpg: not an image in spite of its name" in text
    assert "2 files, 3 faces with a name, 1 unknown faces, 1 files left out" in text

    faces = json.loads((tmp_path / "named/faces.json").read_text())["faces"]
    with (tmp_path / "named/faces.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [face["name"] or "" for face in faces]
    in_video = [face for face in faces if face["file"].endswith("clip.avi")]
    assert [(face["frame"], face["seconds"], face["name"]) for face in in_video] == [(0, 0.0, "P1"), (2, 0.2, "P1")]
    named = cv2.imread(str(tmp_path / "named/group.jpg"))[:, :, ::-1].astype(int)
    for color in (GREEN, ORANGE):
        assert (np.abs(named - color).max(axis=2) < 40).sum() > 100
    clip = cv2.VideoCapture(str(tmp_path / "named/clip.avi.mp4"))
    assert clip.get(cv2.CAP_PROP_FRAME_COUNT) == 4 and clip.get(cv2.CAP_PROP_FRAME_WIDTH) == 220


def test_identify_takes_the_threshold_of_the_far(recognizer, place, tmp_path, capsys):
    arguments = [str(place / "probes/one.jpg"), f"--gallery={place}/people", f"--out={tmp_path}", "--gpu_num=cpu"]
    identify([*arguments, f"--network={place}/net.onnx", "--far=0.1"])
    threshold = recognizer.calibration.threshold(0.1 / 4)
    assert (
        f"a name needs a cosine of {threshold:.4f}, which at most 10.00% of strangers reach" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "faces.json").read_text())["threshold"] == threshold


def test_identify_mistakes_end_in_one_line(place, tmp_path, end_of):
    base = [f"--gallery={place}/people", f"--out={tmp_path}/o", "--gpu_num=cpu"]
    probe = str(place / "probes/one.jpg")
    for arguments, code, message in (
        (
            [probe, f"--network={place}/plain.onnx"],
            2,
            "--calibration: missing, and plain.onnx holds none. Make one with",
        ),
        ([f"{place}/gone", f"--network={place}/net.onnx"], 3, "gone: no such file or folder"),
        ([f"{tmp_path}/o", f"--network={place}/net.onnx"], 3, "no photograph and no video in it"),
        ([f"{place}/text.jpg", f"--network={place}/net.onnx", "--far=0.1"], 3, "none of the photographs and videos"),
        ([probe, f"--network={place}/net.onnx", "--far=0.001"], 2, "--far=0.001: with 4 faces in the gallery"),
        ([f"--network={place}/net.onnx"], 2, "PROBE ...: missing"),
    ):
        found, text = end_of(identify, [*arguments, *base])
        assert found == code and message in text and text.count("\n") == 1, text


def test_probes_have_different_output_names(tmp_path):
    for name in ("a.jpg", "a.png", "b/a.jpg", "c.mp4", "notes.txt", "out/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_probes([tmp_path, tmp_path / "b/a.jpg", tmp_path / "a.jpg", tmp_path / "notes.txt"], tmp_path / "out")
    expected = {"a.jpg", "a.png", "b/a.jpg", "c.mp4", "notes.txt"}
    assert sorted(found.values()) == sorted(tmp_path / name for name in expected)
    elsewhere = find_probes([tmp_path / "a.jpg", tmp_path / "b/a.jpg"], tmp_path / "out")
    assert sorted(elsewhere.values()) == [tmp_path / "a.jpg", tmp_path / "b/a.jpg"]


def test_name_that_is_not_utf8_is_drawn_and_recorded(place, tmp_path, capsys):
    person = os.fsdecode(b"J\xfcrgen")
    write_image(tmp_path / "people" / person / "0.jpg", photo(1))
    odd = tmp_path / "probes" / os.fsdecode(b"\xe9t\xe9.jpg")
    write_image(odd, photo(1, shift=4))
    arguments = [str(odd.parent), f"--gallery={tmp_path}/people", f"--network={place}/net.onnx", "--gpu_num=cpu"]
    identify([*arguments, f"--out={tmp_path}/named", "--threshold=0.5"])
    (face,) = json.loads((tmp_path / "named/faces.json").read_text())["faces"]
    assert face["name"] == r"J\udcfcrgen" and face["file"].endswith(r"\udce9t\udce9.jpg")
    assert (tmp_path / "named" / odd.name).is_file()


def test_label_stays_inside_the_image():
    for box in ([0, 0, 20, 20], [180, 80, 199, 99], [-20, -20, 220, 120]):
        image = np.zeros((100, 200, 3), np.uint8)
        draw_face(image, np.array(box), np.full((5, 2), 50.0), "김철수 0.73", color=ORANGE)
        assert (image == ORANGE).all(axis=2).sum() > 300
