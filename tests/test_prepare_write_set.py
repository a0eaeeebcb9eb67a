"""Order pairs, and make verification sets from .bin files and lists of aligned faces."""

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from applications.prepare import bin as prepare_bin
from applications.prepare import pairs, write_set
from util.errors import DataError, UsageError
from util.pairs import load_pairs


def write_bin(path: Path, truth: list[bool]) -> np.ndarray:
    """Write a .bin of P pairs of plain images and return their grey levels, (2P,)."""
    levels = np.arange(2 * len(truth)) * 3 % 256
    encoded = [cv2.imencode(".png", np.full((112, 112, 3), level, np.uint8))[1].tobytes() for level in levels]
    path.write_bytes(pickle.dumps((encoded, truth), protocol=2))
    return levels


def levels_of(path: Path) -> np.ndarray:
    made = load_pairs(path)
    return made.images(0, 2 * len(made))[:, 0, 0, 0]


def test_bin_keeps_order_if_folds_have_both_kinds(tmp_path, capsys):
    truth = [True, True, False] + [True, False] * 10
    levels = write_bin(tmp_path / "own.bin", truth)
    prepare_bin.main([str(tmp_path / "own.bin"), "--out", str(tmp_path / "sets" / "own")])
    assert load_pairs(tmp_path / "sets/own").issame.tolist() == truth
    assert levels_of(tmp_path / "sets/own").tolist() == levels.tolist()
    assert "12 same and 11 different pairs of" in capsys.readouterr().out


def test_bin_is_interleaved_if_folds_have_one_kind(tmp_path, capsys):
    truth = [True] * 10 + [False] * 10
    levels = write_bin(tmp_path / "own.bin", truth)
    prepare_bin.main([str(tmp_path / "own.bin"), "--out", str(tmp_path / "own")])
    made = load_pairs(tmp_path / "own")
    assert made.issame.tolist() == [True, False] * 10
    expected = np.stack([levels[:20].reshape(10, 2), levels[20:].reshape(10, 2)], axis=1).reshape(-1)
    assert levels_of(tmp_path / "own").tolist() == expected.tolist()
    assert "interleaved" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lfw.bin", "lfw_py2.bin", "lfw_ndarray.bin"])
def test_bin_keeps_pixels_of_published_sets(shared, tmp_path, name):
    file = shared / "formats/bin" / name
    prepare_bin.main([str(file), "--out", str(tmp_path / "lfw")])
    before, made = load_pairs(file), load_pairs(tmp_path / "lfw")
    assert made.issame.tolist() == before.issame.tolist()
    np.testing.assert_array_equal(made.images(0, 240), before.images(0, 240))


def test_bin_refuses_other_files_and_other_sets(tmp_path):
    write_bin(tmp_path / "own.bin", [True, False] * 10)
    out = ["--out", str(tmp_path / "own")]
    (tmp_path / "list.txt").write_text("a b 1\n")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((112, 112, 3), np.uint8))
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    with pytest.raises(DataError, match=r"list\.txt: not a \.bin of InsightFace\. .*prepare\.pairs"):
        prepare_bin.main([str(tmp_path / "list.txt"), *out])
    prepare_bin.main([str(tmp_path / "own.bin"), *out])
    write_bin(tmp_path / "own.bin", [False, True] * 10)
    with pytest.raises(UsageError, match=r"own: exists, and was made from something else"):
        prepare_bin.main([str(tmp_path / "own.bin"), *out])
    prepare_bin.main([str(tmp_path / "own.bin"), *out, "--force"])
    assert not load_pairs(tmp_path / "own").issame[0]


def test_bin_with_broken_image_leaves_no_set(tmp_path):
    encoded = [cv2.imencode(".png", np.zeros((112, 112, 3), np.uint8))[1].tobytes() for _ in range(40)]
    encoded[30] = encoded[30][:60]
    (tmp_path / "own.bin").write_bytes(pickle.dumps((encoded, [True, False] * 10), protocol=2))
    with pytest.raises(DataError, match="image 30"):
        prepare_bin.main([str(tmp_path / "own.bin"), "--out", str(tmp_path / "sets/own")])
    assert list((tmp_path / "sets").iterdir()) == []


@pytest.mark.parametrize("seed", range(5))
def test_new_order_balances_folds(seed):
    issame = np.random.default_rng(seed).random(137) < 0.3
    order = write_set.new_order(Path("list"), issame, balanced=True)
    assert sorted(order.tolist()) == list(range(137))
    shares = [int(part.sum()) for part in np.array_split(issame[order], 10)]
    assert max(shares) - min(shares) <= 1
    assert not (np.diff(order[issame[order]]) < 0).any() and not (np.diff(order[~issame[order]]) < 0).any()


def test_new_order_keeps_balanced_order():
    issame = np.arange(60) % 6 < 3
    assert not write_set.is_reordered(write_set.new_order(Path("list"), issame, balanced=True))


def test_new_order_too_few_pairs_is_an_error():
    for equal in (True, False):
        with pytest.raises(DataError, match=r"own\.txt: 51 same and 9 different pairs"):
            write_set.new_order(Path("own.txt"), np.arange(60) > 8, balanced=equal)


def test_pairs_makes_a_set_of_aligned_faces(tmp_path, people_folder, capsys):
    rows = ["Ann/Ann_0000.jpg Ann/Ann_0001.jpg 1", "Bob/Bob_0000 Cid/Cid_0000 0"] * 10
    (tmp_path / "own.txt").write_text("\n".join(rows))
    pairs.main(["--list", str(tmp_path / "own.txt"), "--images", str(people_folder), "--out", str(tmp_path / "own")])
    made = load_pairs(tmp_path / "own")
    for index, name in enumerate(("Ann/Ann_0000", "Ann/Ann_0001", "Bob/Bob_0000", "Cid/Cid_0000")):
        expected = cv2.imread(str(people_folder / f"{name}.jpg"))[:, :, ::-1]
        np.testing.assert_array_equal(made.images(index, index + 1)[0], expected)
    assert (tmp_path / "own_pairs.txt").read_text().splitlines()[1] == "Bob/Bob_0000.jpg\tCid/Cid_0000.jpg\t0"
    assert f"--val_data own={tmp_path / 'own'}" in capsys.readouterr().out


def test_write_set_interrupted_leaves_no_set(tmp_path, monkeypatch):
    write_bin(tmp_path / "own.bin", [True, False] * 10)

    def interrupted(pair_set: object):
        yield np.zeros((112, 112, 3), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(write_set, "iter_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_bin.main([str(tmp_path / "own.bin"), "--out", str(tmp_path / "own")])
    assert [path.name for path in tmp_path.iterdir()] == ["own.bin"]


def test_write_set_killed_after_the_swap_is_made_again(tmp_path, monkeypatch):
    """A set that is newer than its note would count as made from what the note names."""
    first = write_bin(tmp_path / "own.bin", [True, False] * 10)
    arguments = [str(tmp_path / "own.bin"), "--out", str(tmp_path / "own")]
    prepare_bin.main(arguments)
    content = (tmp_path / "own.bin").read_bytes()
    write_bin(tmp_path / "own.bin", [False, True] * 10)
    with monkeypatch.context() as patch:
        patch.setattr(write_set.Provenance, "write", lambda note: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_bin.main([*arguments, "--force"])
    (tmp_path / "own.bin").write_bytes(content)
    with pytest.raises(UsageError, match="made from something else"):
        prepare_bin.main(arguments)
    prepare_bin.main([*arguments, "--force"])
    assert load_pairs(tmp_path / "own").issame[0] and levels_of(tmp_path / "own").tolist() == first.tolist()


@pytest.mark.parametrize("name", ["own", "own_list.npy", "own_pairs.txt", "own.json"])
def test_set_is_not_written_through_a_link(tmp_path, name):
    write_bin(tmp_path / "own.bin", [True, False] * 10)
    for folder in ("sets", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "sets" / name).symlink_to(tmp_path / "elsewhere" / "kept")
    (tmp_path / "elsewhere" / "kept").write_bytes(b"kept")
    with pytest.raises(DataError, match=rf"^{name}: .*is a link out of that folder.* Remove the link\."):
        prepare_bin.main([str(tmp_path / "own.bin"), "--out", str(tmp_path / "sets/own"), "--force"])
    assert (tmp_path / "elsewhere" / "kept").read_bytes() == b"kept"
    assert [path.name for path in (tmp_path / "sets").iterdir()] == [name]
