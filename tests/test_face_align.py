"""Run the alignment command as a user types it."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from applications.align import contact_sheet, face_align
from applications.align.manifest import NO_FACE, Row, read_manifest
from applications.demo.data_set import Face, render
from config import parse_train
from util.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw two photographs each of two people. One of the four shows no face."""
    root = tmp_path_factory.mktemp("photos") / "raw"
    for person in (1, 2):
        for image in range(2):
            picture = np.full((220, 260, 3), 120, np.uint8)
            if (person, image) != (2, 1):
                picture[50:162, 70:182] = render(Face(5, person, image, "frontal"))
            path = root / f"person_{person}" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), picture[:, :, ::-1])
    return root


def run(*arguments: object, module: bool = False) -> subprocess.CompletedProcess:
    program = ["-m", "applications.align.face_align"] if module else ["applications/align/face_align.py"]
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("module", [False, True])
def test_face_align_command_of_the_older_toolkit(raw, tmp_path, module):
    dest = tmp_path / "aligned"
    done = run("-source_root", raw, "-dest_root", dest, "-crop_size", 112, module=module)
    assert done.returncode == 0, done.stderr
    assert f"{raw}: 3 aligned, 1 no face" in done.stdout
    assert "4 files in" in done.stdout and "images/s" in done.stdout and f"{dest / 'manifest.csv'}" in done.stdout
    faces = sorted(path.relative_to(dest).as_posix() for path in dest.rglob("*.jpg"))
    assert faces == ["person_1/0.jpg", "person_1/1.jpg", "person_2/0.jpg"]
    assert cv2.imread(str(dest / faces[0])).shape == (112, 112, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-source_root", "{raw}", "-dest_root", "{dest}"),
        ("--source_root={raw}", "--dest_root={dest}", "--crop_size=112"),
        ("-source_root={raw}", "--dest_root", "{dest}", "--gpu_num=cpu", "--processes", "0"),
    ],
)
def test_face_align_accepts_dashes_and_equals(raw, tmp_path, capsys, arguments):
    face_align.main([part.format(raw=raw, dest=tmp_path / "out") for part in arguments])
    assert "3 aligned, 1 no face" in capsys.readouterr().out


def test_contact_sheet_shows_photographs_and_faces(raw, tmp_path, capsys):
    sheet = tmp_path / "sheets" / "page.png"
    face_align.main(["-source_root", str(raw), "-dest_root", str(tmp_path / "out"), "--contact_sheet", str(sheet)])
    page = cv2.imread(str(sheet), cv2.IMREAD_COLOR_RGB)
    assert page is not None and page.shape[1] > 4 * 2 * 168
    green = (np.abs(page.astype(int) - (40, 200, 90)).sum(axis=2) < 90).sum()
    assert green > 3 * 150  # boxes and landmarks of three faces
    aligned = cv2.resize(cv2.imread(str(tmp_path / "out" / "person_1" / "0.jpg"), cv2.IMREAD_COLOR_RGB), (168, 168))
    shown = page[8 : 8 + 168, 8 + 168 + 8 : 8 + 168 + 8 + 168]
    assert np.abs(shown.astype(int) - aligned).mean() < 6


def test_contact_sheet_of_an_earlier_run(raw, tmp_path):
    arguments = ["-source_root", str(raw), "-dest_root", str(tmp_path / "out")]
    face_align.main(arguments)
    face_align.main([*arguments, "--contact_sheet", str(tmp_path / "page.png")])
    assert cv2.imread(str(tmp_path / "page.png")) is not None


def test_contact_sheet_with_a_removed_photograph(raw, tmp_path):
    copy = tmp_path / "raw"
    for file in raw.rglob("*.png"):
        (copy / file.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / file.parent.name / file.name).write_bytes(file.read_bytes())
    arguments = ["-source_root", str(copy), "-dest_root", str(tmp_path / "out")]
    face_align.main(arguments)
    (copy / "person_1" / "0.png").unlink()
    face_align.main([*arguments, "--contact_sheet", str(tmp_path / "page.png")])
    assert cv2.imread(str(tmp_path / "page.png")) is not None


def test_face_align_settings_reach_the_detector(raw, tmp_path):
    arguments = ["-source_root", str(raw), "-dest_root", str(tmp_path / "out"), "--format", "png", "-crop_size", "64"]
    face_align.main(
        [*arguments, "--select", "central", "--keep_all", "--min_face", "40", "--thresholds", "0.7", "0.8", "0.9"]
    )
    (row, *_) = read_manifest(tmp_path / "out")
    assert row.output == "person_1/0.png" and row.face.score > 0.9
    assert cv2.imread(str(tmp_path / "out" / row.output)).shape == (64, 64, 3)


def test_face_align_without_faces_is_bad_data(tmp_path):
    (tmp_path / "raw").mkdir()
    cv2.imwrite(str(tmp_path / "raw" / "grey.png"), np.full((100, 100, 3), 90, np.uint8))
    with pytest.raises(DataError, match=r"no face was aligned\. The manifest has the reasons\."):
        face_align.main(["-source_root", str(tmp_path / "raw"), "-dest_root", str(tmp_path / "out")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no face was aligned"):
        face_align.main(["-source_root", str(tmp_path / "empty"), "-dest_root", str(tmp_path / "out2")])


@pytest.mark.parametrize(
    ("extra", "rule"),
    [
        (
            ["--gpu_num", "none"],
            r"--gpu_num: 'none' is not a list of different GPU numbers, like 0 .* the word cpu or auto\.",
        ),
        (["--gpu_num", "1,1"], "--gpu_num: '1,1' is not a list of different GPU numbers"),
        (["--gpu_num", "0]1["], r"--gpu_num: '0\]1\[' is not a list"),
        (["--processes", "-1"], "--processes: '-1' is not a whole number from 0 to 256"),
        (["--contact_sheet", "sheet.jpg"], r"--contact_sheet: 'sheet\.jpg' is not a PNG file, .*\.png"),
        (
            ["--contact_sheet", "/proc/none/sheet.png"],
            "--contact_sheet=/proc/none/sheet.png: cannot be written|--contact_sheet=/proc/none",
        ),
        (["--crop_size", "two"], "--crop_size: 'two' is not a whole number from 16 to 4096"),
        (["--thresholds", "0.5"], "--thresholds: '0.5' is not three numbers"),
        (["--min_face", "2"], "min_face 2: must be 12 pixels or more"),
        (["--selekt", "best"], "--selekt: unknown flag. The nearest one is --select "),
    ],
)
def test_face_align_mistakes_are_one_line(raw, tmp_path, extra, rule):
    with pytest.raises(UsageError, match=rule) as caught:
        face_align.main(["-source_root", str(raw), "-dest_root", str(tmp_path / "out"), *extra])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "numbers"), [("cpu", ()), ("0", (0,)), ("0,1", (0, 1)), ("[0, 1]", (0, 1)), ("[2]", (2,)), ("[]", ())]
)
def test_face_align_gpu_num_is_read_as_in_training(text, numbers):
    flags = face_align.parse_flags(["--source_root=raw", "--dest_root=out", f"--gpu_num={text}"])
    assert flags.gpu_num == numbers
    assert parse_train([f"--gpu_num={text}"]).gpu_num == numbers


@pytest.mark.parametrize(("there_is_one", "numbers"), [(True, (0,)), (False, ())])
def test_face_align_auto_is_the_first_gpu(monkeypatch, there_is_one, numbers):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there_is_one)
    assert face_align.available_gpus() == numbers
    for text in ("auto", "Auto"):
        assert face_align.parse_flags(["--source_root=raw", "--dest_root=out", f"--gpu_num={text}"]).gpu_num is None


@pytest.mark.parametrize("portrait", [False, True])
def test_contact_sheet_takes_photographs_of_any_width(tmp_path, monkeypatch, portrait):
    for side in (1, 2, 167, 168, 169, 250, 300, 400, 600, 1200, 2400, 5999):
        shape = (side, max(1, side * 3 // 4)) if portrait else (max(1, side * 3 // 4), side)
        cv2.imwrite(str(tmp_path / "photo.png"), np.full(shape, 200, np.uint8))
        monkeypatch.setattr(contact_sheet, "read_manifest", lambda dest: [Row("photo.png", NO_FACE)])
        contact_sheet.write_contact_sheet(tmp_path, tmp_path, tmp_path / "page.png")
        cell = cv2.imread(str(tmp_path / "page.png"), cv2.IMREAD_GRAYSCALE)[8 : 8 + 168, 8 : 8 + 168]
        assert (cell[84, [1, 83, 166]] == 200).all() or portrait, side  # the longer side fills the cell
        assert (cell[[1, 83, 166], 84] == 200).all() or not portrait, side
