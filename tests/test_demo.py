"""Test that the demo set is reproducible, balanced and aligned, and never overwrites other content."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from applications.align import detect
from applications.demo import data_set as demo
from applications.demo.__main__ import Flags, main
from applications.demo.drawn.person import Condition, Person
from applications.demo.drawn.render import render_face
from util.errors import UsageError
from util.face import ARCFACE_TEMPLATE
from util.pairs import load_pairs
from util.verification import FOLDS

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--people", "2", "--images", "2", "--pairs", "40", "--processes", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "set"
    main(["--out", str(out), *TINY])
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def faces(kind: str, people: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (people, images, 112, 112, 3) faces and (people, images, 5, 2) landmarks."""
    drawn = []
    for number in range(people):
        person = demo.sample_person(5, number)
        for image in range(images):
            drawn.append(render_face(person, Condition.sample(np.random.default_rng((5, number, image)), person, kind)))
    pictures, points = zip(*drawn, strict=True)
    return np.reshape(pictures, (people, images, 112, 112, 3)), np.reshape(points, (people, images, 5, 2))


def test_bytes_do_not_depend_on_the_number_of_processes(folder: Path, tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "again"), *TINY[:-1], "2"])
    assert contents(tmp_path / "again") == contents(folder)


def test_another_seed_draws_other_people() -> None:
    assert demo.sample_person(1, 1) != demo.sample_person(2, 1)
    assert not np.array_equal(demo.render(demo.Face(1, 1, 0, "mixed")), demo.render(demo.Face(2, 1, 0, "mixed")))


def test_training_images_lie_in_a_folder_for_each_person(folder: Path) -> None:
    files = sorted(str(path.relative_to(folder / "imgs")) for path in (folder / "imgs").rglob("*.jpg"))
    assert files == [f"drawn_000{p}/drawn_000{p}_000{i}.jpg" for p in (1, 2) for i in (1, 2)]
    assert cv2.imread(str(folder / "imgs" / files[0])).shape == (112, 112, 3)


@pytest.mark.parametrize("name", demo.VALIDATION_SETS)
def test_validation_sets_hold_the_rendered_faces(folder: Path, name: str) -> None:
    pairs = load_pairs(folder / demo.VALIDATION_SETS[name][0])
    expected, issame = demo.validation_faces(demo.Settings(1337, 2, 2, 40), name)
    assert len(pairs) == 40
    assert pairs.issame.tolist() == issame
    assert np.array_equal(pairs.images(3, 4)[0], demo.render(expected[3]))


def test_photographs_show_faces_that_the_detector_finds(folder: Path) -> None:
    files = sorted((folder / "raw").glob("drawn_*/drawn_*.jpg"))
    assert [file.parent.name for file in files] == ["drawn_0001"] * 4 + ["drawn_0002"] * 4
    photographs = [cv2.imread(str(file), cv2.IMREAD_COLOR_RGB) for file in files]
    assert {photograph.shape for photograph in photographs} == {(300, 400, 3)}
    assert [len(faces) for faces in detect(photographs)] == [1, 1, 2, 1] * 2


@pytest.mark.parametrize("pairs", [40, 60, 600])
def test_folds_are_balanced_and_share_no_people(pairs: int) -> None:
    images, issame = demo.validation_faces(demo.Settings(1337, 2, 2, pairs), "lfw")
    for first, second, same in zip(images[::2], images[1::2], issame, strict=True):
        assert (first.person == second.person) == same
    assert len(set(images)) == len(images) == 2 * pairs
    size, seen = pairs // 10, set()
    for fold in range(10):
        assert sum(issame[fold * size : (fold + 1) * size]) == size / 2
        people = {face.person for face in images[2 * fold * size : 2 * (fold + 1) * size]}
        assert not people & seen
        seen |= people


def test_nobody_is_in_two_sets(folder: Path) -> None:
    settings = demo.Settings(1337, 2, 2, 40)
    people = [number for numbers in demo.people_of(settings).values() for number in numbers]
    assert len(set(people)) == len(people)
    assert {face.person for face in demo.training_faces(settings)} == set(demo.people_of(settings)["imgs"])
    for name in demo.VALIDATION_SETS:
        assert {face.person for face in demo.validation_faces(settings, name)[0]} == set(demo.people_of(settings)[name])
    names = json.loads((folder / "people.json").read_text())
    assert sorted(names["imgs"]) == sorted(path.name for path in (folder / "imgs").iterdir())
    everybody = [name for members in names.values() for name in members]
    assert len(set(everybody)) == len(everybody)


def test_readme_says_that_the_faces_are_drawn(folder: Path) -> None:
    assert "drawn" in (folder / "README.txt").read_text()
    assert cv2.imread(str(folder / "contact_sheet.png")).shape == (2 * 112, 8 * 112, 3)


def test_complete_set_is_kept_and_another_one_needs_force(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "render", lambda face: np.full((112, 112, 3), face.image % 256, np.uint8))
    out = tmp_path / "set"
    main(["--out", str(out), *TINY])
    before = (out / "README.txt").stat().st_mtime_ns
    main(["--out", str(out), *TINY, "--sheet", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").read_bytes() == (out / "contact_sheet.png").read_bytes()
    assert "already" in capsys.readouterr().out
    assert (out / "README.txt").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="--force"):
        main(["--out", str(out), *TINY, "--seed", "7"])
    main(["--out", str(out), *TINY, "--seed", "7", "--force"])
    assert json.loads((out / demo.MARKER).read_text())["seed"] == 7


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_other_content_is_never_overwritten(tmp_path: Path, force: list[str]) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="other content"):
        main(["--out", str(tmp_path), *TINY, *force])
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


def test_failed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(demo, "write_carray", fail)
    with pytest.raises(OSError, match="disk full"):
        main(["--out", str(tmp_path / "set"), *TINY])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags", [["--people", "1"], ["--images", "0"], ["--pairs", "50"], ["--pairs", "20"], ["--seed", "-1"],
              ["--processes", "0"], ["--sheet", "x.txt"]]
)  # fmt: skip
def test_bad_flag_is_one_line_that_names_it(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(UsageError, match=flags[0]):
        main(["--out", str(tmp_path / "set"), *flags])
    assert list(tmp_path.iterdir()) == []


def test_rule_of_pairs_follows_the_number_of_folds() -> None:
    """The command line has the number of folds as text, because util.verification imports numpy."""
    rule = next(field.metadata["option"].type for field in fields(Flags) if field.name == "pairs")
    assert [pairs for pairs in range(2 * FOLDS, 6 * FOLDS + 1) if accepts(rule, pairs)] == [4 * FOLDS, 6 * FOLDS]


def accepts(convert: Callable, value: int) -> bool:
    try:
        return convert(value) == value
    except ValueError:
        return False


def run_module(name: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", name, *flags], cwd=ROOT, capture_output=True, text=True)


def test_module_exits_with_2_for_a_bad_flag(tmp_path: Path) -> None:
    run = run_module("applications.demo", "--out", str(tmp_path / "set"), "--pairs", "7")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "--pairs" in run.stderr and "7" in run.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [("applications.prepare.demo", "applications.demo"), ("applications.lr_curve", "applications.resolution_curve")],
)
def test_old_program_names_say_where_they_went(old: str, new: str) -> None:
    run = run_module(old, "--help")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith("error: ") and f"python -m {new}" in run.stderr


def test_make_faces_writes_the_training_images(folder: Path, tmp_path: Path) -> None:
    demo.make_faces(tmp_path / "imgs", people=2, images=2)
    assert contents(tmp_path / "imgs") == contents(folder / "imgs")


@pytest.mark.parametrize(("kind", "near"), [("frontal", 3.0), ("profile", 9.0)])
def test_landmarks_lie_near_the_template(kind: str, near: float) -> None:
    points = faces(kind, people=12, images=1)[1].reshape(-1, 5, 2)
    assert np.abs(points.mean(axis=0) - ARCFACE_TEMPLATE).max() < (near if kind == "profile" else 2.0)
    assert np.linalg.norm(points - ARCFACE_TEMPLATE, axis=2).mean() < near


def test_pupils_are_drawn_where_the_landmarks_say() -> None:
    person = replace(demo.sample_person(5, 0), glasses=-1.0, skin=0.1, iris=0.0, fringe=-4.0, eye_height=5.0)
    condition = Condition.sample(np.random.default_rng(1), person, "frontal")
    straight = replace(condition, gaze=(0.0, 0.0), blur=0.0, noise=0.0, exposure=1.0, eyelid=1.2, light=(0.0, 0.5))
    image, points = render_face(person, straight)
    grey = image.mean(axis=2)
    for x, y in points[:2]:
        left, top = int(x) - 7, int(y) - 5
        patch = grey[top : top + 11, left : left + 15]
        rows, columns = np.nonzero(patch <= np.percentile(patch, 8))
        assert abs(columns.mean() + left - x) < 2
        assert abs(rows.mean() + top - y) < 2.5


def test_a_profile_moves_the_nose_and_age_brings_grey_hair() -> None:
    person = replace(demo.sample_person(5, 2), hair=0.0, greying=45.0, balding=-1.0, hairline=20.0, fringe=-4.0)
    condition = Condition.sample(np.random.default_rng(1), person, "frontal")
    condition = replace(condition, age=22.0, yaw=0.0, pitch=0.0, exposure=1.0, jitter=(0.0, 0.0, 0.0, 0.0))
    young, points = render_face(person, condition)
    old, _ = render_face(person, replace(condition, age=65.0))
    _, turned = render_face(person, replace(condition, yaw=0.8))
    assert old[:8, 40:72].mean() > young[:8, 40:72].mean() + 30
    span, turned_span = points[1, 0] - points[0, 0], turned[1, 0] - turned[0, 0]
    assert (turned[2, 0] - turned[0, 0]) / turned_span > (points[2, 0] - points[0, 0]) / span + 0.2


def test_images_of_one_person_are_more_alike_than_of_two() -> None:
    pictures = faces("frontal", people=12, images=3)[0].astype(np.float32)
    small = np.stack(
        [cv2.resize(image, (28, 28), interpolation=cv2.INTER_AREA) for image in pictures.reshape(-1, 112, 112, 3)]
    )
    vectors = small[:, 4:26, 4:24].reshape(36, -1)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    owner = np.arange(36) // 3
    same = owner[:, None] == owner[None]
    np.fill_diagonal(same, False)
    other = owner[:, None] != owner[None]
    assert distance[same].mean() < 0.8 * distance[other].mean()


def test_people_differ_in_every_trait() -> None:
    people = [Person.sample(np.random.default_rng((5, number))) for number in range(20)]
    assert all(len({getattr(person, name) for person in people}) > 1 for name in Person.__dataclass_fields__)


@pytest.mark.parametrize(("number", "count"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_signals_end_the_demo(tmp_path: Path, number: int, count: int) -> None:
    command = [sys.executable, "-m", "applications.demo", "--out", str(tmp_path / "set"), "--processes", "2"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("set.partial/imgs/*/*.jpg")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(count):
        os.killpg(run.pid, number)
        time.sleep(0.1)
    _, errors = run.communicate(timeout=30)
    assert run.returncode in (128 + number, -number)  # a shell shows both as 128 + the signal
    assert "Traceback" not in errors
    if count == 1:  # a second signal may end it before it has cleaned up
        assert errors.splitlines()[-1].startswith("Interrupted")
        assert list(tmp_path.iterdir()) == []
    assert not (tmp_path / "set").exists()
