"""Cleaning: errors that are put into a made set are found, and nothing else."""

import csv
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from applications.prepare.clean import main
from applications.prepare.clean_find import Thresholds, TrainingSet, are_copies
from applications.prepare.clean_list import (
    COLUMNS,
    DUPLICATE,
    MISLABELED,
    OUTLIER,
    TWO_NAMES,
    VERIFICATION,
    Row,
    image_name,
    read_list,
    write_list,
)
from applications.prepare.clean_report import FingerprintedImages, open_verification
from util import identification
from util.data.image_folder import ImageFolder
from util.data.record_dataset import RecordImages
from util.data.recordio import write_identities
from util.embedding import EmbeddedImages
from util.errors import DataError
from util.public_networks import PublicNetwork

PEOPLE, IMAGES, SIZE = 150, 6, 64


def made_faces(people: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return embeddings (N, SIZE) around a random center for each person: cosines of one person are about 0.7."""
    rng = np.random.default_rng(seed)
    vectors = np.random.default_rng(9).normal(size=(1000, SIZE))[people] + 0.65 * rng.normal(size=(len(people), SIZE))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.repeat(np.arange(PEOPLE), IMAGES)


def test_training_set_equals_loops(labels, monkeypatch):
    monkeypatch.setattr(identification, "_BLOCK_SCORES", 1000)
    rng = np.random.default_rng(1)
    shuffled = rng.permutation(labels)[:400]
    _, shuffled = np.unique(shuffled, return_inverse=True)
    faces = made_faces(shuffled)
    found = TrainingSet(faces, shuffled, own_far=1e-3)
    assert (found.own[np.isfinite(found.own)] >= found.own_threshold).all()  # so all images make the centers
    centers = np.stack([faces[shuffled == person].sum(axis=0) for person in range(shuffled.max() + 1)])
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    np.testing.assert_allclose(found.centers, centers, atol=1e-5)
    for image in range(0, 400, 7):
        rest = np.flatnonzero((shuffled == shuffled[image]) & (np.arange(400) != image))
        cosines = centers @ faces[image]
        cosines[shuffled[image]] = -2
        assert found.others[image] == cosines.argmax()
        assert found.other_scores[image] == pytest.approx(cosines.max(), abs=1e-5)
        if len(rest):
            total = faces[rest].sum(axis=0)
            assert found.own[image] == pytest.approx(faces[image] @ total / np.linalg.norm(total), abs=1e-5)
        else:
            assert np.isnan(found.own[image])


def test_thresholds_are_measured_and_extrapolated():
    """Cosines of random directions in 64 dimensions are close to a normal distribution of deviation 1/8."""
    faces = made_faces(np.arange(1000), seed=2)
    cosines = (faces @ faces.T)[~np.eye(1000, dtype=bool)]
    found = Thresholds(cosines, (1e-2, 1e-3))
    assert found.at(1e-2) == pytest.approx(np.quantile(cosines, 0.99), abs=1e-4)
    assert found.at(1e-3) == pytest.approx(np.quantile(cosines, 0.999), abs=1e-4)
    assert np.mean(cosines > found.at(1e-4)) == pytest.approx(1e-4, rel=0.5)
    assert found.at(1e-12) > found.at(1e-6) > found.at(1e-3) and found.at(1e-300) <= 0.99


def test_find_mislabeled_finds_wrong_labels_and_their_people(labels):
    rng = np.random.default_rng(3)
    wrong = rng.choice(len(labels), 60, replace=False)
    given = labels.copy()
    given[wrong] = (given[wrong] + rng.integers(1, PEOPLE, 60)) % PEOPLE
    findings, threshold = TrainingSet(made_faces(labels), given, own_far=1e-3).find_mislabeled(None)
    found = {finding.image: finding for finding in findings if finding.kind == MISLABELED}
    assert len(found.keys() & set(wrong.tolist())) >= 57 and len(found.keys() - set(wrong.tolist())) <= 1
    for image in found.keys() & set(wrong.tolist()):
        assert found[image].other_person == labels[image] and found[image].person == given[image]
        assert found[image].cosine >= threshold > found[image].own_cosine
        assert labels[found[image].other_image] == labels[image]


def test_find_mislabeled_finds_strangers_as_outliers(labels):
    people = labels.copy()
    strangers = np.arange(0, len(people), 100)
    people[strangers] = 700 + np.arange(len(strangers))  # nobody of the set
    findings, _ = TrainingSet(made_faces(people), labels, own_far=1e-3).find_mislabeled(None)
    assert [finding.image for finding in findings] == strangers.tolist()
    assert sum(finding.kind == OUTLIER for finding in findings) >= len(strangers) - 2  # one false accept is expected


def test_find_mislabeled_of_two_images(labels):
    """Of two images that differ, the one that fits another person is wrong; if none does, both are doubtful."""
    people = np.concatenate([labels, [500, 3, 501, 502, 503]])
    given = np.concatenate([labels, [PEOPLE, PEOPLE, PEOPLE + 1, PEOPLE + 1, PEOPLE + 2]])
    findings, _ = TrainingSet(made_faces(people), given, own_far=1e-3).find_mislabeled(None)
    first = len(labels)
    assert [(finding.image, finding.kind) for finding in findings] == [
        (first + 1, MISLABELED),
        (first + 2, OUTLIER),
        (first + 3, OUTLIER),
    ]


def test_far_sets_the_threshold_of_a_search(labels):
    found = TrainingSet(made_faces(labels), labels, own_far=1e-3)
    assert found.find_two_names(1e-4)[1] == pytest.approx(found.thresholds.at(1e-4))
    assert found.find_mislabeled(1e-5)[1] == pytest.approx(found.thresholds.at(1e-5))
    assert found.find_mislabeled(None)[1] == found.own_threshold  # few images are doubtful: one false accept is a lot
    assert found.find_two_names(None)[1] == pytest.approx(found.thresholds.at(2 / (PEOPLE * (PEOPLE - 1))))


def test_find_two_names_finds_split_people(labels):
    given = labels.copy()
    split = np.arange(0, PEOPLE, 15)
    for number, person in enumerate(split):
        given[np.flatnonzero(labels == person)[:2]] = PEOPLE + number
    findings, _ = TrainingSet(made_faces(labels), given, own_far=1e-3).find_two_names(None)
    expected = {(PEOPLE + number, int(person)) for number, person in enumerate(split)}  # two images, and four
    assert {(finding.person, finding.other_person) for finding in findings} == expected


def test_find_duplicates_finds_copies_of_files_and_faces(labels):
    faces = made_faces(labels)
    rng = np.random.default_rng(4)
    thumbnails = rng.integers(0, 256, (len(labels), 16, 16), dtype=np.uint8)
    hashes = np.arange(len(labels), dtype=np.uint64)
    hashes[[700, 5]] = 13  # equal files of two people, 5 and 700, whatever their faces
    faces[8], thumbnails[8] = faces[7], (thumbnails[7] * 0.7).astype(np.uint8)  # the same person, darker
    faces[801], thumbnails[801] = faces[20], thumbnails[20][:, ::-1]  # another person, mirrored
    faces[33] = faces[32]  # equal faces of different photographs
    findings = TrainingSet(faces, labels, own_far=1e-3).find_duplicates(hashes, thumbnails)
    assert [(finding.image, finding.other_image) for finding in findings] == [(8, 7), (13, 5), (700, 5), (801, 20)]


def test_find_duplicates_keeps_one_of_several(labels):
    faces, hashes = made_faces(labels), np.arange(len(labels), dtype=np.uint64)
    hashes[[3, 4, 5]] = 2
    thumbnails = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16), dtype=np.uint8)
    findings = TrainingSet(faces, labels, own_far=1e-3).find_duplicates(hashes, thumbnails)
    assert [(finding.image, finding.other_image) for finding in findings] == [(3, 2), (4, 2), (5, 2)]


def test_are_copies_of_flat_thumbnails():
    flat = np.full((16, 16), 7, np.uint8)
    assert are_copies(flat, flat) and not are_copies(flat, np.full((16, 16), 8, np.uint8))


def test_find_verification_people(labels):
    training = TrainingSet(made_faces(labels), labels, own_far=1e-3)
    people = np.concatenate([np.arange(0, PEOPLE, 10), np.arange(600, 700)])
    findings, _ = training.find_verification_people(made_faces(people, seed=8), np.arange(len(people)) + 70, None)
    found = {finding.person: finding for finding in findings}
    expected = set(range(0, PEOPLE, 10))
    assert expected <= found.keys() and len(found) <= len(expected) + 2  # one false accept is expected
    assert all(people[found[person].other_image - 70] == person for person in expected)


def test_training_set_without_similar_images_raises():
    faces = made_faces(np.arange(40))
    faces[1::2] = -faces[::2]
    with pytest.raises(DataError, match="no image is similar to the others of its person"):
        TrainingSet(faces, np.arange(40) // 2, own_far=1e-3)


def test_verification_templates_join_same_pairs(made_pairs):
    path, _, issame = made_pairs
    others = open_verification(str(path))
    assert len(others) == 46
    vectors = made_faces(np.arange(46))
    kept = np.delete(np.arange(46), [0, 3])  # two images that cannot be read
    templates, shown = others.templates(EmbeddedImages(kept, vectors[kept], np.ones(44, np.float32), {}))
    expected = []
    for pair in range(23):
        rows = [row for row in (2 * pair, 2 * pair + 1) if row in kept]
        groups = [rows] if issame[pair] else [[row] for row in rows]
        expected += [vectors[group].mean(axis=0) / np.linalg.norm(vectors[group].mean(axis=0)) for group in groups]
    np.testing.assert_allclose(templates, expected, atol=1e-5)
    assert len(shown) == len(templates) and others.name(3) == "made, pair 2, image 2"


def test_fingerprints_are_of_the_file_and_the_pixels(people_folder):
    images = ImageFolder(people_folder)
    (people_folder / "Cid" / "Cid_0000.jpg").write_bytes((people_folder / "Ann" / "Ann_0000.jpg").read_bytes())
    fingerprinted = FingerprintedImages(images)
    for index in range(7):
        np.testing.assert_array_equal(fingerprinted.image(index), images.image(index))
    assert fingerprinted.hashes[0] == fingerprinted.hashes[6] and len(set(fingerprinted.hashes.tolist())) == 6
    gray = cv2.cvtColor(images.image(2), cv2.COLOR_RGB2GRAY).astype(float)
    np.testing.assert_allclose(fingerprinted.thumbnails[2], gray.reshape(16, 7, 16, 7).mean(axis=(1, 3)), atol=1)


# The program


class Grid(nn.Module):
    """A backbone that returns a 7x7 grid of gray levels, centered: what the faces below are made of."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grid = nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 16)
        grid = (grid + grid.flip(3)).flatten(1)
        return grid - grid.mean(1, keepdim=True)


@pytest.fixture
def network_file(tmp_path, monkeypatch) -> Path:
    """Return a file that stands for the network Grid."""
    network = PublicNetwork(
        name="Grid",
        family="test",
        embedding_size=49,
        network=Grid(),
        channel_order="RGB",
        input_scale="-1..1",
        crop="whole",
    )
    monkeypatch.setattr("util.public_networks.read_public_network", lambda *arguments, **more: network)
    file = tmp_path / "network.pth"
    file.write_bytes(b"")
    return file


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write 12 people of 3 images; Cid has a copy of an image of Ann, and the name of one is not UTF-8."""
    root = tmp_path / "people"
    rng = np.random.default_rng(0)
    odd = b"D\xe9".decode("utf-8", "surrogateescape")
    for person in ("Ann", "Bob", "Cid", odd, *(f"P{number}" for number in range(8))):
        (root / person).mkdir(parents=True)
        base = rng.integers(40, 216, (7, 7))
        for number in range(3):
            grid = np.clip(base + rng.normal(0, 20, (7, 7)), 0, 255).astype(np.uint8)
            pixels = cv2.imencode(".png", np.kron(grid, np.ones((16, 16), np.uint8)))[1]
            (root / person / f"{number}.png").write_bytes(pixels.tobytes())
    (root / "Cid" / "copy.png").write_bytes((root / "Ann" / "1.png").read_bytes())
    return root


def test_program_writes_findings_and_a_page(folder, network_file, tmp_path, capsys):
    findings, page = tmp_path / "findings.csv", tmp_path / "findings.html"
    (folder / "P7" / "0.png").write_bytes(b"cut")
    flags = [f"--data={folder}", f"--network={network_file}", "--gpu_num=cpu", f"--against={folder}"]
    main([*flags, f"--findings={findings}", f"--report={page}", f"--copy_to={tmp_path}/copy", "--remove=duplicate"])
    rows = read_list(findings)
    copies = [(row.person, row.image, row.other_image, row.cosine) for row in rows if row.kind == DUPLICATE]
    assert copies == [("Cid", "Cid/copy.png", "Ann/1.png", "1.0000")]
    wrong = [(row.person, row.image, row.other_person) for row in rows if row.kind == MISLABELED]
    assert wrong == [("Cid", "Cid/copy.png", "Ann")]
    assert {row.person for row in rows if row.kind == VERIFICATION} == {path.name for path in folder.iterdir()}
    text = page.read_text()
    assert "Copies of an image" in text and "data:image/jpeg" in text and "D\\udce9" in text
    copied = sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.png"))
    every = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert copied == sorted(every - {"Cid/copy.png"})
    printed = capsys.readouterr().out
    assert "1 of 37 images cannot be used" in printed and "left out: 1 images, and 0 people completely" in printed


def test_program_copies_without_a_shortened_list(folder, tmp_path, capsys):
    file = tmp_path / "findings.csv"
    odd = b"D\xe9".decode("utf-8", "surrogateescape")
    write_list(
        file,
        [
            Row(MISLABELED, "Ann", "Ann/0.png", "Bob", "Bob/2.png", "0.7", "0.1"),
            Row(TWO_NAMES, odd, "", "Bob", "Bob/2.png", "0.8", ""),
        ],
    )
    main([f"--data={folder}", f"--from_findings={file}", f"--copy_to={tmp_path}/copy"])
    kept = {path.name for path in folder.iterdir()} - {odd}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == kept
    assert sorted(path.name for path in (tmp_path / "copy" / "Ann").iterdir()) == ["1.png", "2.png"]
    assert (tmp_path / "copy/Ann/1.png").read_bytes() == (folder / "Ann/1.png").read_bytes()
    assert "left out: 4 images, and 1 people completely" in capsys.readouterr().out
    rows = [
        Row(DUPLICATE, "Bob", "Bob/0.png", "Ann", "Ann/0.png", "1.0", ""),  # Ann/0.png is in the copy …
        Row(DUPLICATE, "Bob", "Bob/1.png", odd, f"{odd}/1.png", "1.0", ""),  # … and this person is not
        Row(TWO_NAMES, odd, "", "Bob", "Bob/2.png", "0.8", ""),
    ]
    write_list(file, rows)
    main([f"--data={folder}", f"--from_findings={file}", f"--copy_to={tmp_path}/kept"])
    assert sorted(path.name for path in (tmp_path / "kept" / "Bob").iterdir()) == ["1.png", "2.png"]
    file.write_text(",".join(COLUMNS) + "\n")  # all lines deleted
    main([f"--data={folder}", f"--from_findings={file}", f"--copy_to={tmp_path}/all"])
    assert len(list((tmp_path / "all").rglob("*.png"))) == 37


def test_program_copies_a_rec_file(folder, network_file, tmp_path, capsys):
    people = sorted(path for path in folder.iterdir())
    contents = [[file.read_bytes() for file in sorted(person.iterdir())] for person in people]
    contents[3].insert(1, b"no image")
    write_identities(tmp_path / "train.rec", contents)
    images = RecordImages(tmp_path / "train.rec")
    findings = tmp_path / "findings.csv"
    flags = [f"--data={tmp_path}/train.rec", f"--network={network_file}", "--gpu_num=cpu"]
    main([*flags, f"--findings={findings}"])
    rows = read_list(findings)
    copied = [image for person in contents for image in person].index(contents[0][1])
    repeated = len(contents[0]) + len(contents[1]) + sorted(path.name for path in people[2].iterdir()).index("copy.png")
    duplicates = [(row.person, row.image, row.other_image) for row in rows if row.kind == DUPLICATE]
    assert duplicates == [("0000002", f"record {repeated + 1}", f"record {copied + 1}")]
    write_list(findings, [*rows, Row(TWO_NAMES, "0000001", "", "0000000", "record 1", "0.8", "")])

    main([f"--data={tmp_path}/train.rec", f"--from_findings={findings}", f"--copy_to={tmp_path}/clean"])
    assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == ["property", "train.idx", "train.rec"]
    removed = {row.image for row in rows if row.image}
    kept = [index for index in range(len(images)) if image_name(images, index) not in removed]
    expected = [
        [images.encoded(index) for index in kept if images.labels[index] == label] for label in range(len(people))
    ]
    del expected[1]  # named twice
    copy = RecordImages(tmp_path / "clean" / "train.rec")
    assert [copy.encoded(index) for index in range(len(copy))] == list(itertools.chain(*expected))
    assert np.bincount(copy.labels).tolist() == [len(person) for person in expected]
    assert (tmp_path / "clean" / "property").read_text() == f"{len(expected)},112,112"
    assert "1 people completely" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "findings.csv: its first line is not kind,person"),
        ("", "findings.csv: its first line is not"),
        (",".join(COLUMNS) + "\nwrong,a,b,c,d,1,2\n", "findings.csv, line 2: not a finding"),
        (",".join(COLUMNS) + "\noutlier,a\n", "findings.csv, line 2: not a finding"),
        (",".join(COLUMNS) + "\noutlier,Eve,Eve/1.jpg,,,1,\n", "findings.csv: not in .*: Eve/1.jpg"),
        (",".join(COLUMNS) + '\n"', "findings.csv: cannot be read as CSV"),
    ],
)
def test_program_refuses_another_list(folder, tmp_path, text, message):
    (tmp_path / "findings.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        main([f"--data={folder}", f"--from_findings={tmp_path}/findings.csv", f"--copy_to={tmp_path}/copy"])
    assert not list(tmp_path.glob("*copy*"))


def test_copy_is_complete_or_absent(folder, tmp_path, monkeypatch, end_of):
    file = tmp_path / "findings.csv"
    write_list(file, [])

    def fail(source: Path, dest: Path) -> None:
        if source.parent.name == "Cid":
            raise OSError(28, "No space left on device")
        dest.write_bytes(b"")

    monkeypatch.setattr("shutil.copyfile", fail)
    flags = [f"--data={folder}", f"--from_findings={file}", f"--copy_to={tmp_path}/copy"]
    code, line = end_of(main, flags)
    assert code == 1 and line.startswith(f"error: --copy_to={tmp_path}/copy: cannot be written (No space left")
    assert not list(tmp_path.glob("*copy*"))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--network=x.pth"], 3, "error: --network=x.pth: no such file or folder"),
        ([], 2, "error: --network: give either a network or --from_findings"),
        (["--from_findings=x.csv"], 2, "error: --from_findings: is used with --copy_to"),
        (["--network=x.pth", "--copy_to=/tmp"], 2, "error: --copy_to=/tmp: is there already"),
        (["--network=x.pth", "--findings=/proc/none/x"], 2, "error: --findings=/proc/none: cannot be written to"),
        (["--network=x.pth", "--remove=all"], 2, "error: --remove: ['all'] is not a list of mislabeled"),
        (["--network=x.pth", "--own_far=0"], 2, "error: --own_far: '0' is not a number above 0 and below 1"),
    ],
)
def test_program_ends_in_one_line(folder, end_of, flags, code, message):
    found, line = end_of(main, [f"--data={folder}", *flags])
    assert found == code and line.startswith(message) and line.count("\n") == 1


def test_list_is_plain_csv(tmp_path):
    row = Row(OUTLIER, "A, B", 'A, B/"1".jpg', "", "", "0.1000", "")
    write_list(tmp_path / "findings.csv", [row])
    with (tmp_path / "findings.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [list(COLUMNS), [OUTLIER, "A, B", 'A, B/"1".jpg', "", "", "0.1000", ""]]
    assert read_list(tmp_path / "findings.csv") == [row]


def test_clean_finds_known_errors_of_lfw(shared, monkeypatch):
    """Photographs that LFW is known to have under two names, by their thumbnails and files alone."""
    folder = shared / "lfw" / "aligned_112"
    pairs = [("Carlos_Beltran", "Raul_Ibanez"), ("Bart_Hendricks", "Ricky_Ray"), ("Emmy_Rossum", "Eva_Amurri")]
    thumbnails = {}
    for names in pairs:
        for name in names:
            image = cv2.imread(str(folder / name / f"{name}_0001.jpg"), cv2.IMREAD_GRAYSCALE)
            thumbnails[name] = cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA)
    for first, second in pairs:
        assert are_copies(thumbnails[first], thumbnails[second])
    assert not are_copies(thumbnails["Carlos_Beltran"], thumbnails["Ricky_Ray"])
