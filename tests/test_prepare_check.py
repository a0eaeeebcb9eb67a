"""Test the check of complete sets: its counts, its lists of names, and its errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from applications.prepare import channel_order, check
from applications.prepare.channel_order import (
    RIGHT,
    SWAPPED,
    UNDECIDED,
    classify_channel_order,
    describe_channel_order,
)
from applications.prepare.check_training import groups_of_equals
from util.data.recordio import write_identities
from util.errors import DataError, RunError, UsageError
from util.pairs.bcolz import write_carray

SKIN = (200, 150, 120)


def face(color: tuple[int, int, int] = SKIN, seed: int = 0, size: int = 112) -> np.ndarray:
    """Return skin with noise, (size, size, 3) RGB uint8."""
    noise = np.random.default_rng(seed).normal(0, 8, (size, size, 3))
    return np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)


def encoded(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return write_folder(ann=[image, bytes], …), which makes a training folder."""

    def write(**people: list[np.ndarray | bytes]) -> Path:
        for name, images in people.items():
            (tmp_path / "imgs" / name).mkdir(parents=True)
            for number, image in enumerate(images):
                content = image if isinstance(image, bytes) else encoded(image)
                (tmp_path / "imgs" / name / f"{number}.png").write_bytes(content)
        return tmp_path / "imgs"

    return write


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., Path]:
    """Return write_pairs(images, truth), which makes a carray."""

    def write(images: list[np.ndarray], truth: list[bool]) -> Path:
        write_carray(tmp_path / "own", images, truth)
        return tmp_path / "own"

    return write


def run(*arguments: object, processes: str = "0") -> None:
    check.main([*map(str, arguments), "--processes", processes])


def report(path: Path, *arguments: object) -> list[dict]:
    run(*arguments, "--report", path)
    return json.loads(path.read_text())


# --- Training sets.


@pytest.mark.parametrize("processes", ["0", "2"])
def test_people_images_and_sizes_are_counted(write_folder, capsys, processes):
    ann = [face(seed=i) for i in range(3)]
    run(write_folder(ann=ann, bob=[face(seed=5), face(seed=6, size=128)], cid=[face(seed=7)]), processes=processes)
    text = capsys.readouterr().out
    assert "6 images of 3 people; 1 to 3 images a person (median 2), 1 people with a single one" in text
    assert "sizes: 112x112 (5), 128x128 (1)" in text
    assert "colors: 6 like skin, 0 as if red and blue were swapped, 0 undecided" in text
    assert "the set can be used; no warnings" in text


def test_unusable_images_are_errors_with_names(write_folder, tmp_path, capsys):
    cut = encoded(face())[:500]
    ann = [face(seed=1), b"", b"text", face()[:100]]
    with pytest.raises(DataError, match=r"1 of 1 sets cannot be used: .*imgs"):
        report(tmp_path / "report.json", write_folder(ann=ann, bob=[face(seed=2), cut]))
    text = capsys.readouterr().out
    assert "ERROR: 4 images cannot be used:" in text
    for part in ("ann/1.png: empty", "ann/2.png: not an image", "ann/3.png: 112x100 is not square", "bob/1.png: "):
        assert part in text
    [found] = json.loads((tmp_path / "report.json").read_text())
    assert len(found["details"]["unreadable"]) == found["details"]["unreadable count"] == 4


def test_console_lists_ten_names_and_the_report_all(write_folder, tmp_path, capsys):
    folder = write_folder(ann=[b"x"] * 14 + [face()], bob=[face(seed=1)])
    with pytest.raises(DataError):
        run(folder, "--report", tmp_path / "report.json")
    text = capsys.readouterr().out
    assert text.count("not an image") == 10 and "and 4 more" in text
    assert len(json.loads((tmp_path / "report.json").read_text())[0]["details"]["unreadable"]) == 14


def test_duplicates_within_and_across_people_are_counted(write_folder, capsys):
    one, two = face(seed=1), face(seed=2)
    run(write_folder(ann=[one, face(seed=3), one, one], bob=[two, face(seed=4)], cid=[two]))
    text = capsys.readouterr().out
    assert "2 files repeat another of the same person" in text
    assert "ann/0.png = " in text and "ann/3.png" in text
    assert "1 files are in the folders of two or more people" in text and "bob/0.png = " in text and "cid/0.png" in text
    assert "the set can be used; 2 warnings" in text


def test_records_are_checked_like_folders(tmp_path, capsys):
    path = tmp_path / "train.rec"
    write_identities(path, [[encoded(face(seed=i)) for i in (1, 2)], [encoded(face(seed=3)), b"broken"]])
    with pytest.raises(DataError):
        run(tmp_path)
    assert "train.rec: record 4: not an image" in capsys.readouterr().out


def test_unreadable_set_does_not_stop_the_others(write_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="1 of 2 sets cannot be used"):
        run(tmp_path / "empty", write_folder(ann=[face()], bob=[face(seed=1)]))
    text = capsys.readouterr().out
    assert "ERROR: " in text and "training needs two people or more" in text and "2 images of 2 people" in text


def test_equal_hashes_are_grouped():
    hashes = np.array([7, 3, 7, 9, 3, 7, 0, 0], np.uint64)
    usable = np.array([1, 1, 1, 1, 1, 1, 0, 0], bool)
    assert [group.tolist() for group in groups_of_equals(hashes, usable)] == [[1, 4], [0, 2, 5]]
    assert list(groups_of_equals(hashes, np.zeros(8, bool))) == []


def test_killed_process_is_one_line(write_folder, monkeypatch):
    folder = write_folder(ann=[face()], bob=[face(seed=1)])
    monkeypatch.setattr(channel_order, "classify_channel_order", lambda image: __import__("os")._exit(9))
    with pytest.raises(RunError, match=r"ann/0\.png: a process died here, .* fewer --processes"):
        run(folder, processes="2")


# --- Colors.


def test_swapped_set_is_a_warning_and_grey_is_undecided(write_folder, capsys):
    grey = [face((90, 90, 90), seed) for seed in range(30)]
    bgr = [face(seed=seed)[:, :, ::-1] for seed in range(100, 112)]
    run(write_folder(ann=grey, bob=bgr))
    text = capsys.readouterr().out
    assert "0 like skin, 12 as if red and blue were swapped, 30 undecided (grey)" in text
    assert "red and blue look swapped (BGR instead of RGB) in the whole set" in text


def test_swapped_images_are_listed_if_several(write_folder, tmp_path, capsys):
    bob = [face(seed=seed) for seed in range(100, 150)]
    folder = write_folder(ann=[face(seed=1)[:, :, ::-1]], bob=bob)
    run(folder)
    assert "no warnings" in capsys.readouterr().out
    cv2.imwrite(str(folder / "ann" / "1.png"), face(seed=2))
    run(folder)
    text = capsys.readouterr().out
    assert "red and blue look swapped in 2 images" in text and "ann/1.png" in text


def test_channel_order_is_right_for_real_faces(shared):
    files = sorted((shared / "lfw" / "aligned_112").glob("*/*.jpg"))[::5]
    images = [cv2.imread(str(file))[:, :, ::-1] for file in files]
    right = np.array([classify_channel_order(image) for image in images])
    swapped = np.array([classify_channel_order(image[:, :, ::-1]) for image in images])
    assert (right == SWAPPED).mean() < 0.001 and (swapped == RIGHT).mean() < 0.001
    assert (right == UNDECIDED).mean() < 0.01
    rng = np.random.default_rng(0)
    for _ in range(200):
        chosen = rng.choice(len(images), 20, replace=False)
        assert (
            describe_channel_order(right[chosen])[1] == "" and "whole set" in describe_channel_order(swapped[chosen])[1]
        )


# --- Verification sets.


def test_folds_are_counted(write_pairs, capsys, tmp_path):
    images = [face(seed=seed) for seed in range(46)]
    [found] = report(tmp_path / "r.json", write_pairs(images, [True, True, False] + [True, False] * 10))
    assert "23 pairs, 12 same and 11 different; in each tenth 1 to 2 same and 1 to 2 different" in found["facts"][0]
    assert found["details"]["folds"][0] == {"same": 2, "different": 1} and len(found["details"]["folds"]) == 10
    assert found["warnings"] == found["errors"] == []


def test_one_sided_folds_are_a_warning_or_an_error(write_pairs, capsys):
    images = [face(seed=seed) for seed in range(40)]
    run(write_pairs(images, [True] * 10 + [False] * 10))
    assert "train.py and validation.py interleave the pairs" in capsys.readouterr().out
    with pytest.raises(DataError):
        run(write_pairs(images, [True] * 11 + [False] * 9))
    assert "ERROR: " in capsys.readouterr().out


def test_repeated_images_and_pairs_are_found(write_pairs, capsys):
    images = [face(seed=seed) for seed in range(40)]
    images[1] = images[0]
    images[7] = images[6]
    images[10:12] = [images[9], images[8]]
    run(write_pairs(images, [True, False] * 10))
    text = capsys.readouterr().out
    assert "1 pairs of the same person are one image twice:\n      pair 0" in text
    assert "1 pairs of different people are one image twice:\n      pair 3" in text
    assert "1 pairs repeat another" in text


def test_swapped_pairs_are_a_warning(write_pairs, capsys):
    run(write_pairs([face(seed=seed)[:, :, ::-1] for seed in range(40)], [True, False] * 10))
    assert "swapped (BGR instead of RGB) in the whole set" in capsys.readouterr().out


def test_broken_images_of_a_list_are_listed(tmp_path, capsys):
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(encoded(face(seed=number)))
    lines = [f"{2 * pair} {2 * pair + 1} {pair % 2}" for pair in range(20)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    (tmp_path / "17.png").write_bytes(b"broken")
    (tmp_path / "18.png").write_bytes(encoded(face(size=120)))
    with pytest.raises(DataError, match=r"pairs\.txt"):
        run(tmp_path / "pairs.txt", "--root", tmp_path)
    text = capsys.readouterr().out
    assert "ERROR: 2 images cannot be used" in text and "17.png: not an image" in text and "18.png: 120x120" in text


def test_the_published_formats_can_be_used(shared, capsys):
    formats = shared / "formats"
    run(formats / "rec", *sorted((formats / "bin").glob("*.bin")))
    text = capsys.readouterr().out
    assert "200 images of 20 people; 10 to 10 images a person" in text
    assert text.count("120 pairs, 60 same and 60 different; in each tenth 6 same and 6 different") == 3
    assert "all 4 sets can be used; no warnings" in text


# --- What is checked.


def test_all_sets_are_checked_without_paths(tiny_data, capsys):
    run("--data_dir", tiny_data)
    text = capsys.readouterr().out
    assert "12 images of 3 people" in text and "verification set LFW" in text and "verification set AgeDB" in text
    assert f"not in {tiny_data}: CFP_FF, CFP_FP" in text and "all 3 sets can be used" in text


def test_broken_set_does_not_hide_the_others(tiny_data, tmp_path, capsys):
    shutil.copytree(tiny_data, tmp_path / "data")
    (tmp_path / "data/lfw_align_112/lfw_list.npy").unlink()
    with pytest.raises(DataError, match=r"1 of 3 sets cannot be used: .*lfw"):
        run("--data_dir", tmp_path / "data")
    text = capsys.readouterr().out
    assert "lfw_list.npy: missing" in text and "23 pairs" in text


def test_verification_sets_suffice_and_no_sets_are_an_error(tiny_data, tmp_path, capsys):
    shutil.copytree(tiny_data / "AgeDB", tmp_path / "data/AgeDB")
    run("--data_dir", tmp_path / "data")
    assert "no training images" in capsys.readouterr().out
    with pytest.raises(DataError, match="no verification set either"):
        run("--data_dir", tmp_path / "nothing")


def test_missing_path_and_report_are_errors_before_the_work(tmp_path, tiny_data):
    with pytest.raises(UsageError, match="missing: no such file or folder"):
        run(tiny_data / "imgs", tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--report="):
        run(tiny_data / "imgs", "--report", tmp_path / "file" / "report.json")
