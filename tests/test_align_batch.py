"""Align a tree of photographs: every file is recorded, and a stopped run continues."""

import csv
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from applications.align import Face, batch
from applications.align.batch import AlignSettings, align_tree, select_face
from applications.align.manifest import ALIGNED, COLUMNS, NO_FACE, NOT_AN_IMAGE, UNREADABLE, Row, read_manifest
from util import parallel
from util.errors import DataError, RunError, UsageError
from util.image_io import read_photo
from util.parallel import parallel_map

ROOT = Path(__file__).resolve().parents[1]
FACE = Face(np.array([10.0, 20, 69, 89]), 0.9, np.array([[25.0, 45], [50, 44], [38, 60], [28, 72], [49, 73]]))


class StandIn:
    """A detector that finds a face in every image that is not black."""

    def __init__(self, device: object, min_face: float, thresholds: tuple):
        pass

    def __call__(self, images: list[np.ndarray]) -> list[list[Face]]:
        second = Face(FACE.box + 30, 0.95, FACE.landmarks + 30)  # smaller after the clip, more probable
        second.box[2:] -= 20
        return [[second, FACE] if image.mean() > 128 else [FACE] if image.any() else [] for image in images]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "Detector", StandIn)


def write(path: Path, grey: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = (
        np.clip(np.indices((120, 100)).sum(axis=0)[:, :, None] // 9 + grey, 0, 255) if grey else np.zeros((120, 100, 1))
    )
    cv2.imencode(path.suffix, np.repeat(shade.astype(np.uint8), 3, axis=2))[1].tofile(path)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write nine files of every kind into the folders of two people, a subfolder, and the folder itself."""
    root = tmp_path / "raw"
    for name in ("Ann/1.jpg", "Ann/2.png", "Bob/1.jpg", "Bob/deep/er/1.jpg", "flat.jpg"):
        write(root / name)
    write(root / "Bob" / "dark.jpg", grey=0)
    (root / "Bob" / "broken.jpg").write_bytes(b"no image")
    (root / "Bob" / "notes.txt").write_text("notes")
    (root / "Ann" / ".DS_Store").write_bytes(b"\0\1")
    return root


def statuses(dest: Path) -> dict[str, str]:
    return {row.path: row.status for row in read_manifest(dest)}


def run(raw: Path, dest: Path, processes: int = 0, **settings: object):
    force = settings.pop("force", False)
    files = settings.pop("files", None)
    return align_tree(raw, dest, AlignSettings(**settings), processes=processes, force=force, files=files)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_align_tree_records_every_file_and_keeps_folders(raw, tmp_path, quick):
    before = contents(raw)
    summary = run(raw, tmp_path / "out")
    assert statuses(tmp_path / "out") == {
        **dict.fromkeys(["Ann/1.jpg", "Ann/2.png", "Bob/1.jpg", "Bob/deep/er/1.jpg", "flat.jpg"], ALIGNED),
        "Bob/dark.jpg": NO_FACE,
        "Bob/broken.jpg": UNREADABLE,
        "Bob/notes.txt": NOT_AN_IMAGE,
        "Ann/.DS_Store": NOT_AN_IMAGE,
    }
    assert summary.counts == {ALIGNED: 5, NO_FACE: 1, UNREADABLE: 1, NOT_AN_IMAGE: 2}
    assert summary.new == 9
    faces = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.jpg")}
    assert faces == {"Ann/1.jpg", "Ann/2.jpg", "Bob/1.jpg", "Bob/deep/er/1.jpg", "flat.jpg"}
    assert contents(raw) == before


def test_manifest_is_csv_with_box_score_and_landmarks(raw, tmp_path, quick):
    run(raw, tmp_path / "out")
    with (tmp_path / "out" / "manifest.csv").open(newline="") as file:
        lines = {line["path"]: line for line in csv.DictReader(file)}
    line = lines["Ann/2.png"]
    assert (line["output"], line["faces"], line["reason"]) == ("Ann/2.jpg", "1", "")
    assert [float(line[name]) for name in ("x1", "y1", "x2", "y2", "score")] == [10, 20, 69, 89, 0.9]
    assert [float(line[name]) for name in COLUMNS[9:19]] == FACE.landmarks.reshape(-1).tolist()
    assert "not an image in spite of its name" in lines["Bob/broken.jpg"]["reason"]
    assert "lower --min_face" in lines["Bob/dark.jpg"]["reason"] and lines["Bob/dark.jpg"]["x1"] == ""


@pytest.mark.parametrize(("form", "size"), [("jpg", 112), ("png", 96)])
def test_align_tree_writes_requested_size_and_format(raw, tmp_path, quick, form, size):
    run(raw, tmp_path / "out", crop_size=size, format=form)
    face = cv2.imread(str(tmp_path / "out" / "Ann" / f"1.{form}"))
    assert face.shape == (size, size, 3)
    expected = batch.align(cv2.imread(str(raw / "Ann" / "1.jpg")), FACE.landmarks, size)
    assert np.abs(face.astype(int) - expected).mean() < (1.5 if form == "jpg" else 0.01)


def test_align_tree_writes_one_face_or_all(tmp_path, quick):
    write(tmp_path / "raw" / "Ann" / "two.jpg", grey=200)
    run(tmp_path / "raw", tmp_path / "one")
    (row,) = read_manifest(tmp_path / "one")
    assert (row.faces, row.face.score) == (2, 0.9)  # the larger one
    run(tmp_path / "raw", tmp_path / "all", keep_all=True, select="best")
    rows = list(read_manifest(tmp_path / "all"))
    assert [(row.output, row.face.score) for row in rows] == [("Ann/two.jpg", 0.95), ("Ann/two.face2.jpg", 0.9)]
    assert all((tmp_path / "all" / row.output).is_file() for row in rows)
    assert run(tmp_path / "raw", tmp_path / "all", keep_all=True, select="best").counts == {ALIGNED: 1}


@pytest.mark.parametrize(("select", "index"), [("largest", 0), ("central", 1), ("best", 2)])
def test_select_face_largest_central_best(select, index):
    boxes = [[0, 0, 80, 80], [90, 40, 110, 60], [150, 0, 180, 30]]
    faces = [
        Face(np.array(box, float), score, FACE.landmarks) for box, score in zip(boxes, (0.8, 0.9, 0.99), strict=True)
    ]
    assert select_face(faces, np.zeros((100, 200, 3), np.uint8), select) is faces[index]


def test_align_tree_second_run_does_what_is_left(raw, tmp_path, quick):
    run(raw, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.jpg")}
    (tmp_path / "out" / "Ann" / "1.jpg").unlink()  # must be made again
    write(raw / "Bob" / "broken.jpg")  # repaired
    write(raw / "Cid" / "new.jpg")
    summary = run(raw, tmp_path / "out")
    assert summary.new == 3
    assert summary.counts == {ALIGNED: 7, NO_FACE: 1, NOT_AN_IMAGE: 2}
    paths = [row.path for row in read_manifest(tmp_path / "out")]
    assert len(paths) == len(set(paths)) == 10
    for path, changed in before.items():
        assert (path.stat().st_mtime_ns == changed) == (path.name != "1.jpg" or path.parent.name != "Ann")


def test_manifest_incomplete_last_line_is_done_again(raw, tmp_path, quick):
    run(raw, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.csv"
    whole = manifest.read_bytes()
    last = whole.rstrip().rfind(b"\n") + 1
    for cut in range(last, len(whole) - 2, 7):
        manifest.write_bytes(whole[:cut])
        run(raw, tmp_path / "out")
        assert len(statuses(tmp_path / "out")) == len(list(read_manifest(tmp_path / "out"))) == 9


def test_manifest_damaged_line_is_an_error(raw, tmp_path, quick):
    run(raw, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.csv"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join([*lines[:3], "damaged\n", *lines[3:]]))
    with pytest.raises(DataError, match=r"manifest\.csv: line 4 is damaged.*--force"):
        run(raw, tmp_path / "out")
    manifest.write_text("something else\n")
    with pytest.raises(DataError, match="not the manifest of an alignment"):
        run(raw, tmp_path / "out")
    assert run(raw, tmp_path / "out", force=True).new == 9


def test_align_tree_refuses_other_settings_without_force(raw, tmp_path, quick):
    run(raw, tmp_path / "out")
    with pytest.raises(UsageError, match=r"out: was made with other settings .*crop_size 112, not 96\). .*--force"):
        run(raw, tmp_path / "out", crop_size=96)
    write(tmp_path / "raw2" / "Ann" / "1.jpg")
    with pytest.raises(UsageError, match=r"source .*raw, not .*raw2"):
        run(tmp_path / "raw2", tmp_path / "out")
    assert cv2.imread(str(tmp_path / "out" / "Ann" / "1.jpg")).shape == (112, 112, 3)


def test_force_removes_aligned_faces_only(raw, tmp_path, quick):
    run(raw, tmp_path / "out")
    (tmp_path / "out" / "Ann" / "mine.jpg").write_bytes(b"mine")
    (tmp_path / "kept.jpg").write_bytes(b"kept")
    with (tmp_path / "out" / "manifest.csv").open("a", newline="") as file:
        csv.writer(file).writerow(Row("x.jpg", ALIGNED, "../kept.jpg").cells())
    run(raw, tmp_path / "out", format="png", force=True)
    names = {path.name for path in (tmp_path / "out" / "Ann").iterdir()}
    assert names == {"1.png", "2.png", "mine.jpg"}
    assert (tmp_path / "kept.jpg").read_bytes() == b"kept"


def test_align_tree_aligns_given_files_only(raw, tmp_path, quick):
    summary = run(raw, tmp_path / "out", files=["Bob/1.jpg", "Ann/2.png", "Bob/1.jpg", "./flat.jpg", "Cid/none.jpg"])
    assert statuses(tmp_path / "out") == {
        **dict.fromkeys(["Bob/1.jpg", "Ann/2.png", "flat.jpg"], ALIGNED),
        "Cid/none.jpg": UNREADABLE,
    }
    assert summary.new == 4


def test_align_tree_counts_new_files_after_removals(raw, tmp_path, quick):
    run(raw, tmp_path / "out")
    for name in ("Ann/1.jpg", "Ann/2.png", "flat.jpg"):
        (raw / name).unlink()
    write(raw / "Cid" / "new.jpg")
    assert run(raw, tmp_path / "out").new == 2  # and the unreadable one, again
    assert statuses(tmp_path / "out")["Cid/new.jpg"] == ALIGNED


def test_align_tree_skips_dest_inside_source(raw, quick):
    for _ in range(2):
        summary = run(raw, raw / "aligned")
        assert sum(summary.counts.values()) == 9


def test_align_tree_refuses_dest_around_source(raw, quick):
    before = contents(raw)
    for dest in (raw, raw.parent, raw / "..", raw / "Ann" / ".."):
        with pytest.raises(UsageError, match="holds the source"):
            run(raw, dest)
    assert contents(raw) == before


def test_align_tree_missing_source_is_an_error(tmp_path, quick):
    with pytest.raises(UsageError, match=r"-source_root=.*none: no such folder"):
        run(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_align_tree_follows_links_once(raw, tmp_path, quick):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "5.jpg")
    (raw / "Dan").symlink_to(tmp_path / "elsewhere")
    (raw / "Ann" / "circle").symlink_to(raw)
    run(raw, tmp_path / "out")
    found = statuses(tmp_path / "out")
    assert found["Dan/5.jpg"] == ALIGNED and len(found) == 10


def test_align_tree_keeps_bytes_of_names_not_utf8(tmp_path, quick, capfd):
    odd = [b"caf\xe9".decode("utf-8", "surrogateescape"), "사진\n1", 'a "b", c']
    try:
        for name in odd:
            write(tmp_path / "raw" / name / "1.jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    (tmp_path / "raw" / odd[0] / "2.jpg").write_bytes(b"")
    for new in (4, 1):  # the empty file is tried again
        assert run(tmp_path / "raw", tmp_path / "out").new == new
    assert {name for name, status in statuses(tmp_path / "out").items() if status == ALIGNED} == {
        f"{name}/1.jpg" for name in odd
    }
    assert all((tmp_path / "out" / name / "1.jpg").is_file() for name in odd)
    assert r"caf\udce9/2.jpg: empty file" in capfd.readouterr().err


def test_align_tree_prints_first_unreadable_files(tmp_path, quick, capfd):
    for number in range(25):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number}.jpg").write_bytes(b"")
    run(tmp_path / "raw", tmp_path / "out")
    printed = capfd.readouterr().err
    assert printed.count("empty file") == 20 and "and 5 more that cannot be read" in printed


def test_align_tree_two_processes_equal_one(raw, tmp_path, monkeypatch):
    """Compare one process with two, using the real detector on images without faces."""
    for number in range(70):
        write(raw / "Eve" / f"{number}.png", grey=100 + number)
    alone, together = run(raw, tmp_path / "one"), run(raw, tmp_path / "two", processes=2)
    assert alone.counts == together.counts and sum(alone.counts.values()) == 79
    assert sorted(statuses(tmp_path / "one").items()) == sorted(statuses(tmp_path / "two").items())


@pytest.mark.parametrize("processes", [0, 2])
def test_align_tree_write_error_is_one_line(raw, tmp_path, monkeypatch, processes, make_drawn):
    for number in range(40):
        cv2.imwrite(str(raw / "Ann" / f"x{number}.png"), make_drawn())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "Ann").write_text("in the way")
    with pytest.raises(RunError, match=r"an aligned face cannot be written .*again to continue") as caught:
        run(raw, tmp_path / "out", processes=processes)
    assert "\n" not in str(caught.value)


def test_align_settings_out_of_range_are_refused():
    for settings, rule in (
        ({"crop_size": 8}, "--crop_size 8: must lie between"),
        ({"select": "biggest"}, "--select biggest: must be one of largest, central, best"),
        ({"format": "gif"}, "--format gif: must be one of jpg, png"),
    ):
        with pytest.raises(UsageError, match=rule):
            AlignSettings(**settings)


@pytest.fixture(scope="module")
def make_drawn() -> Callable[[], np.ndarray]:
    """Return a function that makes a photograph of a drawn face, BGR."""
    from applications.demo.data_set import Face as DrawnFace
    from applications.demo.data_set import render

    image = np.full((160, 160, 3), 120, np.uint8)
    image[24:136, 24:136] = render(DrawnFace(5, 1, 0, "frontal"))[:, :, ::-1]
    return lambda: image


def start(raw: Path, dest: Path) -> subprocess.Popen:
    command = [sys.executable, "applications/align/face_align.py", "-source_root", str(raw), "-dest_root", str(dest)]
    return subprocess.Popen(
        [*command, "--processes", "2"],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_align_continues_after_signals_at_any_moment(tmp_path, make_drawn):
    raw, dest = tmp_path / "raw", tmp_path / "out"
    for index in range(140):
        (raw / f"p{index // 50:02d}").mkdir(parents=True, exist_ok=True)
        image = make_drawn().copy()
        image[:8] = index % 256  # no two photographs are equal
        cv2.imwrite(str(raw / f"p{index // 50:02d}" / f"{index}.jpg"), image)
    # Faces that are there when the signals come: none while the processes start.
    moments = [
        (0, [signal.SIGINT] * 3),
        (40, [signal.SIGKILL]),
        (80, [signal.SIGTERM] * 2),
    ]
    done = 0
    for number_of_faces, signals in moments:
        process = start(raw, dest)
        wait_until(lambda session=process.pid: len(left_of(session)) >= 3)  # the first of the two workers is there
        wait_until(lambda faces=number_of_faces: count_faces(dest) >= faces)
        for number in signals:
            # A terminal sends Ctrl-C to all processes. A kill may meet the main process alone.
            os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
            time.sleep(0.1)
        errors = process.communicate(timeout=30)[1]
        assert process.returncode in (-signals[0], 128 + signals[0])  # a shell shows both as 128 + the signal
        assert "Traceback" not in errors
        if signals != [signal.SIGKILL]:
            assert errors.endswith("\nInterrupted. The same command continues from here.\n")
        wait_until(lambda session=process.pid: not left_of(session))
        assert not list(dest.rglob(".*"))  # no face that is written in part
        before = done
        done = len(list(read_manifest(dest)))
        assert before <= done < 140
    again = start(raw, dest)
    printed, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert f"{140 - done} files in" in printed and "140 aligned" in printed
    run(raw, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert len(expected) == 142 and contents(dest) == expected


def count_faces(dest: Path) -> int:
    return len(list(dest.glob("p*/[0-9]*.jpg")))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def left_of(session: int) -> list[str]:
    """Return the processes of a session that still run. Zombies do not count."""
    found = subprocess.run(["ps", "-o", "stat=,pid=,args=", "-s", str(session)], capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if line[0] != "Z"]


def hang(path: Path) -> np.ndarray:
    if path.name == "hangs.jpg":
        os.kill(os.getpid(), signal.SIGSTOP)
    return read_photo(path)


def run_hanging(plan: batch._Plan, jobs: list) -> list[Row]:
    batch.read_photo = hang
    return batch._align_chunk(plan, jobs)


def test_process_that_hangs_on_a_photograph_is_named(raw, tmp_path, quick, monkeypatch):
    for number in range(70):
        write(raw / "Ann" / f"x{number}.png")
    write(raw / "Cid" / "hangs.jpg")
    monkeypatch.setattr(parallel, "SILENCE", 4)
    monkeypatch.setattr(parallel, "_GRACE", 1)
    # A fork, which has the detector of this test.
    monkeypatch.setattr(batch, "parallel_map", lambda _, *arguments, fork: parallel_map(run_hanging, *arguments))
    with pytest.raises(RunError, match=r"/raw/Cid/hangs\.jpg: a process has not got ahead here for 4 s\. .*move"):
        run(raw, tmp_path / "out", processes=2)
    assert len(statuses(tmp_path / "out")) >= 64  # the chunks before are kept
    (raw / "Cid" / "hangs.jpg").unlink()
    monkeypatch.setattr(batch, "parallel_map", parallel_map)
    assert run(raw, tmp_path / "out").counts[ALIGNED] >= 70


def test_default_processes_for_cpu_and_gpus(monkeypatch):
    gpus = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(batch, "num_cpus", lambda: 64)
    assert batch._default_processes([torch.device("cpu")]) == 64
    assert batch._default_processes(gpus[:1]) == 8 and batch._default_processes(gpus) == 16


@pytest.mark.parametrize(
    ("link", "target", "photograph"),
    [("Bob", "elsewhere", "Bob/1.jpg"), ("Ann", "gone", "Ann/1.jpg"), ("flat.jpg", "elsewhere/1.jpg", "flat.jpg")],
)
def test_align_tree_follows_no_link_out_of_dest(raw, tmp_path, quick, link, target, photograph):
    for folder in ("elsewhere", "dest"):
        (tmp_path / folder).mkdir()
    (tmp_path / "elsewhere" / "1.jpg").write_bytes(b"a photograph")
    (tmp_path / "dest" / link).symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=rf"raw/{photograph}: {photograph}: .*is a link out of.*Remove the link\."):
        run(raw, tmp_path / "dest")
    assert contents(tmp_path / "elsewhere") == {"1.jpg": b"a photograph"} and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["manifest.csv", "align.json"])
def test_manifest_follows_no_link_out_of_dest(raw, tmp_path, quick, name, force):
    (tmp_path / "own").write_bytes(b"own")
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / name).symlink_to(tmp_path / "own")
    with pytest.raises(DataError, match=rf"^{name}: would be written into .*is a link out of.* Remove the link\."):
        run(raw, tmp_path / "dest", force=force)
    assert (tmp_path / "own").read_bytes() == b"own" and [path.name for path in (tmp_path / "dest").iterdir()] == [name]


@pytest.mark.parametrize("output", ["../own.jpg", "{tmp}/own.jpg", "Ann/../../own.jpg", "Ann", "a\0b", "link/own.jpg"])
def test_force_removes_nothing_else_that_is_listed(raw, tmp_path, quick, output):
    run(raw, tmp_path / "out")
    (tmp_path / "own.jpg").write_bytes(b"own")
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with (tmp_path / "out" / "manifest.csv").open("a", newline="") as file:
        csv.writer(file).writerow(Row("x.jpg", ALIGNED, output.format(tmp=tmp_path)).cells())
    assert run(raw, tmp_path / "out", force=True).counts[ALIGNED] == 5
    assert (tmp_path / "own.jpg").read_bytes() == b"own"


def test_fifo_device_bomb_and_folder_are_unreadable_rows(raw, tmp_path, quick):
    os.mkfifo(raw / "Ann" / "fifo.jpg")
    (raw / "Ann" / "endless.jpg").symlink_to("/dev/zero")
    (raw / "Ann" / "gone.jpg").symlink_to(tmp_path / "gone")
    bomb = bytearray(cv2.imencode(".png", np.zeros((9, 9), np.uint8))[1])
    bomb[16:24] = struct.pack(">II", 2**15, 2**15)  # width and height: 2^30 pixels in a few bytes
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (raw / "Ann" / "bomb.png").write_bytes(bomb)
    names = [f"Ann/{name}" for name in ("bomb.png", "endless.jpg", "fifo.jpg", "gone.jpg")]
    files = [*names, "Ann", "Ann/1.jpg"]
    began = time.monotonic()
    run(raw, tmp_path / "out", files=files)
    assert statuses(tmp_path / "out") == dict.fromkeys(files, UNREADABLE) | {"Ann/1.jpg": ALIGNED}
    reasons = {row.path: row.reason for row in read_manifest(tmp_path / "out")}
    assert "too large" in reasons["Ann/bomb.png"] and "a folder" in reasons["Ann"]
    assert "not a regular file" in reasons["Ann/fifo.jpg"] and "not a regular file" in reasons["Ann/endless.jpg"]
    assert time.monotonic() - began < 20
