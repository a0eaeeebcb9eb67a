"""Test unpacking records into folders: exact bytes, complete classes, and continuing an interrupted run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from applications.prepare import rec
from util.data.loader import open_training_images
from util.data.recordio import write_identities
from util.errors import DataError, RunError, UsageError

ROOT = Path(__file__).resolve().parents[1]
RESUME = "Interrupted. The same command continues from here.\n"


def image(level: int, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, np.full((112, 112, 3), level, np.uint8))[1].tobytes()


@pytest.fixture
def write_set(tmp_path: Path) -> Callable[[list[list[bytes]]], Path]:
    """Return write_set([[image, …], …]), which makes a .rec file with these people."""

    def write(people: list[list[bytes]]) -> Path:
        path = tmp_path / "set" / "train.rec"
        path.parent.mkdir(exist_ok=True)
        write_identities(path, people)
        return path

    return write


@pytest.fixture
def three_people(write_set) -> Path:
    return write_set([[image(1), image(2, ".png")], [image(3, ".bmp")], [image(4, ".webp"), image(5), image(6)]])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("processes", ["0", "2"])
def test_images_are_unpacked_unchanged_by_record_number(three_people, tmp_path, processes):
    rec.main([str(three_people), "--out", str(tmp_path / "out"), "--processes", processes])
    assert contents(tmp_path / "out" / "imgs") == {
        "0000000/00000001.jpg": image(1),
        "0000000/00000002.png": image(2, ".png"),
        "0000001/00000003.bmp": image(3, ".bmp"),
        "0000002/00000004.webp": image(4, ".webp"),
        "0000002/00000005.jpg": image(5),
        "0000002/00000006.jpg": image(6),
    }


def test_unpacked_folder_is_the_same_training_set(shared, tmp_path, capsys):
    rec.main([str(shared / "formats/rec"), "--out", str(tmp_path / "out"), "--processes", "0"])
    records, folder = (open_training_images(path) for path in (shared / "formats/rec", tmp_path / "out"))
    assert folder.classes == records.classes and folder.labels.tolist() == records.labels.tolist()
    assert all(folder.encoded(index) == records.encoded(index) for index in range(200))
    assert "200 images of 20 people, all that" in capsys.readouterr().out


def test_second_run_writes_only_missing_folders(three_people, tmp_path):
    command = [str(three_people.parent), "--out", str(tmp_path), "--processes", "0"]
    rec.main(command)
    before = contents(tmp_path / "imgs")
    kept = tmp_path / "imgs/0000000/00000001.jpg"
    stamp = kept.stat().st_ino
    (tmp_path / "imgs/0000002/00000004.webp").unlink()
    left = tmp_path / "imgs/.0000001.partial"  # of a run that was killed
    (tmp_path / "imgs/0000001").rename(left)
    rec.main(command)
    assert contents(tmp_path / "imgs") == before
    assert kept.stat().st_ino == stamp and not left.exists()


def test_killed_run_leaves_complete_folders_and_continues(write_set, tmp_path):
    path = write_set([[b"\xff\xd8\xff" + os.urandom(3000) for _ in range(20)] for _ in range(400)])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "applications.prepare.rec", str(path), "--out", str(out)]
    process = subprocess.Popen([*command, "--processes", "2"], cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and len(list(out.glob("imgs/0*"))) < 20:
        time.sleep(0.005)
    process.kill()
    process.wait()
    folders = list(out.glob("imgs/0*"))
    assert len(folders) >= 20 and all(len(os.listdir(folder)) == 20 for folder in folders)
    rec.main([str(path), "--out", str(out), "--processes", "0"])
    assert sorted(os.listdir(out / "imgs")) == [f"{number:07d}" for number in range(400)]


def test_interrupted_run_ends_in_one_word(write_set, tmp_path):
    path = write_set([[b"\xff\xd8\xff" + os.urandom(30_000) for _ in range(20)] for _ in range(300)])
    command = [sys.executable, "-m", "applications.prepare.rec", str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--processes", "2"], stderr=subprocess.PIPE, cwd=ROOT, text=True)
    while process.poll() is None and not list((tmp_path / "out").glob("imgs/0*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors and errors.endswith(RESUME)


def test_broken_records_are_counted_and_others_unpacked(write_set, tmp_path):
    path = write_set([[image(1), b"\x93NUMPY array", image(3)], [image(4)]])
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"1 of 4 images could not be unpacked, all others are in .*record 2: not a"
        ):
            rec.main([str(path), "--out", str(tmp_path / "out"), "--processes", "0"])
        assert len(contents(tmp_path / "out/imgs")) == 3


def test_images_of_another_file_are_refused(three_people, write_set, tmp_path):
    command = [str(three_people), "--out", str(tmp_path / "out"), "--processes", "0"]
    rec.main(command)
    write_set([[image(1)], [image(2)]])
    with pytest.raises(UsageError, match="was made with other settings"):
        rec.main(command)
    (tmp_path / "own" / "imgs").mkdir(parents=True)
    with pytest.raises(UsageError, match="already has a folder imgs"):
        rec.main([str(three_people), "--out", str(tmp_path / "own")])


def test_other_files_than_records_are_refused(people_folder, tmp_path):
    with pytest.raises(DataError, match="already a folder of images"):
        rec.main([str(people_folder), "--out", str(tmp_path / "out")])
    with pytest.raises(DataError, match="no training set"):
        rec.main([str(tmp_path / "missing.bin"), "--out", str(tmp_path / "out")])


def test_vanished_files_are_counted_at_the_end(three_people, tmp_path):
    images = open_training_images(three_people)
    rec.unpack(images, tmp_path / "imgs", processes=0)
    (tmp_path / "imgs/0000002/00000004.webp").unlink()
    with pytest.raises(RunError, match="0000002: 2 images, but the index has 3"):
        rec.check_count(images, tmp_path / "imgs")


def test_full_disk_is_one_line(three_people, tmp_path, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        RunError, match=r"0000000: cannot be written \(No space left on device\)\. Run the same command"
    ):
        rec.unpack(open_training_images(three_people), tmp_path / "imgs", processes=0)


def test_processes_work_after_opencv_started_threads():
    code = (
        "import cv2, numpy as np\n"
        "from util.parallel import parallel_map\n"
        "cv2.setNumThreads(8)\n"
        "for _ in range(20):\n"
        "    cv2.warpAffine(np.zeros((2000, 2000, 3), np.uint8), np.eye(2, 3), (2000, 2000))\n"
        "def shrink(image, size):\n    return cv2.resize(image, (size, size)).shape[0]\n"
        "with parallel_map(shrink, np.zeros((900, 900, 3), np.uint8), range(1, 8), 2) as sizes:\n    print(*sizes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == [str(number) for number in range(1, 8)], done.stderr


def test_rec_follows_no_link_out_of_its_folder(three_people, tmp_path):
    command = [str(three_people), "--out", str(tmp_path / "out"), "--processes", "0"]
    rec.main(command)
    (tmp_path / "out/imgs/0000002").rename(tmp_path / "elsewhere")
    (tmp_path / "out/imgs/0000002").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train\.rec: 0000002: .*is a link out of that folder"):
        rec.main(command)
    assert contents(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("name", ["imgs", "rec.json"])
def test_rec_folder_and_marker_are_no_links_outside(three_people, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    rec.check_destination(open_training_images(three_people), tmp_path / "out")
    (tmp_path / "out" / name).unlink(missing_ok=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere" / ("" if name == "imgs" else "rec.json"))
    with pytest.raises(DataError, match=f"^{name}: .*is a link out of that folder"):
        rec.main([str(three_people), "--out", str(tmp_path / "out"), "--processes", "0"])
    assert not list((tmp_path / "elsewhere").iterdir())
