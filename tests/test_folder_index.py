"""The index of a large set is kept, and always agrees with what is in the folder now."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from util.data import folder_index
from util.data.folder_index import INDEX_FILE, list_images, pack_names, unpack_name
from util.data.image_folder import ImageFolder
from util.errors import DataError

DAY = 86400


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Write four people of yesterday, one of them without an image; sets of 5 images are large."""
    monkeypatch.setattr(folder_index, "MIN_INDEXED", 5)
    root = tmp_path / "set"
    for person, names in {"Ann": "ab", "Bob": "cde", "Cid": "", "Dan": "f"}.items():
        (root / person).mkdir(parents=True)
        for name in names:
            (root / person / f"{name}.jpg").touch()
    monkeypatch.setattr(folder_index, "_CLOCK_TICK", -DAY * 10**9)  # new folders count as old
    return root


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Return the people whose folders were opened, as a list that grows."""
    names, list_folder = [], folder_index._list_folder
    monkeypatch.setattr(
        folder_index, "_list_folder", lambda folder: names.append(Path(folder).name) or list_folder(folder)
    )
    return names


def content(root: Path) -> dict[str, list[str]]:
    """Return what list_images finds, as {person: names}."""
    found = list_images(root)
    names = map(unpack_name, found.images)
    people = zip(found.people, found.counts, strict=True)
    return {person: [next(names) for _ in range(count)] for person, count in people}


def truth(root: Path) -> dict[str, list[str]]:
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return {path.name: sorted(image.name for image in path.iterdir()) for path in folders}


def test_index_of_a_large_set_is_made_once(root, opened):
    first = content(root)
    assert (
        first
        == truth(root)
        == {"Ann": ["a.jpg", "b.jpg"], "Bob": ["c.jpg", "d.jpg", "e.jpg"], "Cid": []} | {"Dan": ["f.jpg"]}
    )
    assert opened == ["Ann", "Bob", "Cid", "Dan"]
    opened.clear()
    assert content(root) == first
    assert opened == []
    assert [path.name for path in root.iterdir() if path.name[0] == "."] == [INDEX_FILE]


def test_index_of_a_small_set_is_not_kept(root, opened):
    (root / "Ann" / "a.jpg").unlink()
    (root / "Ann" / "b.jpg").unlink()
    assert content(root) == content(root)
    assert len(opened) == 8
    assert not (root / INDEX_FILE).exists()


def add_image(root: Path) -> None:
    (root / "Bob" / "new.jpg").touch()


def remove_image(root: Path) -> None:
    (root / "Bob" / "d.jpg").unlink()


def rename_image(root: Path) -> None:
    (root / "Bob" / "d.jpg").rename(root / "Bob" / "g.jpg")


def first_image(root: Path) -> None:
    (root / "Cid" / "new.jpg").touch()


def add_person(root: Path) -> None:
    (root / "Bea").mkdir()
    (root / "Bea" / "new.jpg").touch()


def remove_person(root: Path) -> None:
    shutil.rmtree(root / "Bob")


def rename_person(root: Path) -> None:
    (root / "Bob").rename(root / "Abe")


def swap_people(root: Path) -> None:
    for before, after in (("Ann", "x"), ("Bob", "Ann"), ("x", "Bob")):
        (root / before).rename(root / after)


def replace_person(root: Path) -> None:
    """Put another folder with the times of the old one in its place, as rsync or tar do."""
    times = (root / "Bob").stat()
    (root / "Bob").rename(root.parent / "old")
    (root / "Bob").mkdir()
    (root / "Bob" / "other.jpg").touch()
    os.utime(root / "Bob", ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = [
    (add_image, {"Bob"}),
    (remove_image, {"Bob"}),
    (rename_image, {"Bob"}),
    (first_image, {"Cid"}),
    (add_person, {"Bea"}),
    (remove_person, set()),
    (rename_person, {"Abe"}),
    (swap_people, {"Ann", "Bob"}),
    (replace_person, {"Bob"}),
]


@pytest.mark.parametrize(("change", "affected"), CHANGES)
def test_change_opens_only_its_folders(root, opened, change, affected):
    before = content(root)
    time.sleep(0.02)  # more than a tick of the file system's clock
    change(root)
    opened.clear()
    assert content(root) == truth(root) != before
    assert set(opened) == affected
    opened.clear()
    assert content(root) == truth(root)
    if len(list_images(root).images) >= folder_index.MIN_INDEXED:
        assert opened == []


def test_recent_change_is_listed_again(root, opened, monkeypatch):
    """A second change in the same tick of the clock would leave the same times."""
    monkeypatch.setattr(folder_index, "_CLOCK_TICK", 2 * 10**9)
    os.utime(root / "Ann", (time.time() - DAY, time.time() - DAY))  # ctime is still now
    for _ in range(2):
        assert content(root) == truth(root)
        assert opened == ["Ann", "Bob", "Cid", "Dan"]
        opened.clear()


def test_moved_set_keeps_its_index_and_a_copy_makes_its_own(root, opened, tmp_path):
    before = content(root)
    moved = root.rename(tmp_path / "moved")
    copy = Path(shutil.copytree(moved, tmp_path / "copy"))
    shutil.rmtree(copy / "Bob")
    opened.clear()
    assert content(moved) == before and opened == []
    assert content(copy) == truth(copy) and opened == ["Ann", "Cid", "Dan"]


def test_linked_folder_is_listed_by_its_target(root, tmp_path):
    (root / "Bob").rename(tmp_path / "elsewhere")
    (root / "Bob").symlink_to(tmp_path / "elsewhere")
    assert content(root) == truth(root)
    time.sleep(0.02)
    (tmp_path / "elsewhere" / "new.jpg").touch()
    assert content(root)["Bob"] == ["c.jpg", "d.jpg", "e.jpg", "new.jpg"]


def test_damaged_index_is_rebuilt(root, opened):
    before = content(root)
    content_before = (root / INDEX_FILE).read_bytes()
    rng = np.random.default_rng(0)
    spoilt = [content_before[:length] for length in (0, 1, 10, len(content_before) // 2, len(content_before) - 1)]
    for place in rng.integers(len(content_before), size=150).tolist():
        spoilt.append(
            content_before[:place]
            + bytes([content_before[place] ^ int(rng.integers(1, 256))])
            + content_before[place + 1 :]
        )
    spoilt += [b"PK\x03\x04", b"\x93NUMPY", b"text", rng.bytes(500)]
    for data in spoilt:
        (root / INDEX_FILE).write_bytes(data)
        assert content(root) == before
    (root / INDEX_FILE).unlink()
    os.mkfifo(root / INDEX_FILE)
    assert content(root) == before
    (root / INDEX_FILE).unlink()
    (root / INDEX_FILE).mkdir()
    assert content(root) == before


def arrays(root: Path) -> dict[str, np.ndarray]:
    with np.load(root / INDEX_FILE) as kept:
        return dict(kept)


@pytest.mark.parametrize(
    "lie",
    [
        {"counts": np.array([2, 3, 0, 2])},
        {"counts": np.array([2, 3, -1, 2])},
        {"counts": np.array([2.0, 3.0, 0.0, 1.0])},
        {"counts": np.array([2**62, 2**62, 2**62, 2**62 + 6])},
        {"counts": np.array([6])},
        {"counts": np.array(6)},
        {"stamps": np.zeros((4, 2), np.int64)},
        {"stamps": np.array(1)},
        {"people": np.zeros(0, np.uint8)},
        {"images": np.frombuffer(b"../../a.jpg\0b\0c\0d\0e\0f\0", np.uint8)},
        {"images": np.frombuffer(b"a\0b\0c\0d\0e\0f\0g", np.uint8)},
        {"images": np.array(["a", "b", "c", "d", "e", "f"])},
        {"images": np.array([None] * 6, object)},
    ],
)
def test_inconsistent_index_is_rebuilt(root, lie):
    before = content(root)
    np.savez(root / INDEX_FILE, **(arrays(root) | lie))
    assert content(root) == before
    assert all(np.array_equal(value, arrays(root)[key]) for key, value in arrays(root).items())
    missing = arrays(root)
    del missing[next(iter(lie))]
    np.savez(root / INDEX_FILE, **missing)
    assert content(root) == before


def test_index_of_another_version_is_rebuilt(root, opened):
    """For example a version that knew fewer suffixes."""
    content(root)
    lacking = {
        "counts": np.array([2, 2, 0, 1]),
        "images": np.frombuffer(b"a.jpg\0b.jpg\0c.jpg\0d.jpg\0f.jpg\0", np.uint8),
    }
    np.savez(root / INDEX_FILE, **(arrays(root) | lacking))
    opened.clear()
    assert len(content(root)["Bob"]) == 2 and opened == []  # it is believed, for its version
    np.savez(root / INDEX_FILE, **(arrays(root) | {"format": np.array("1 .jpg")}))
    assert content(root) == truth(root)


def test_unwritable_folder_is_noted_only_after_a_slow_listing(root, monkeypatch, capsys):
    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert content(root) == truth(root)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(folder_index, "_SLOW", -1)
    assert content(root) == truth(root)
    assert f"{INDEX_FILE} could be kept there (Permission denied)" in capsys.readouterr().out


def test_unfinished_index_leaves_the_old_one(root, monkeypatch):
    content(root)
    before = (root / INDEX_FILE).read_bytes()
    (root / "Ann" / "new.jpg").touch()

    def fill_disk(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fill_disk)
    assert content(root) == truth(root)
    assert (root / INDEX_FILE).read_bytes() == before
    assert not [path for path in root.iterdir() if "partial" in path.name]


def test_processes_that_open_a_set_at_once_do_not_collide(root):
    program = (
        "import sys\nfrom pathlib import Path\nfrom util.data import folder_index\n"
        "folder_index.MIN_INDEXED, folder_index._SLOW = 5, -1\n"  # so that an index that cannot be kept is noted
        "for _ in range(200):\n    assert len(folder_index.list_images(Path(sys.argv[1])).images) == 6\n"
    )
    command = [sys.executable, "-c", program, str(root)]  # made just now, so each process writes the index each time
    started = [
        subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(3)
    ]
    assert [(process.communicate()[0], process.returncode) for process in started] == [(b"", 0)] * 3
    assert sorted(path.name for path in root.iterdir()) == [INDEX_FILE, "Ann", "Bob", "Cid", "Dan"]


def test_training_sees_the_same_set_from_the_index(root, opened):
    first, again = ImageFolder(root), ImageFolder(root)
    assert len(opened) == 4
    assert first.classes == again.classes == ["Ann", "Bob", "Dan"]
    assert first.labels.tolist() == again.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert [first.where(index) for index in range(6)] == [again.where(index) for index in range(6)]
    assert again.where(5) == str(root / "Dan" / "f.jpg")


@pytest.mark.parametrize("folder", ["", "Bob"])
def test_unreadable_folder_is_named(root, folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir" if folder else "scandir", refuse)
    with pytest.raises(DataError, match=r"set(/Ann)?: cannot be read \(Permission denied\)\. ") as caught:
        list_images(root)
    assert "\n" not in str(caught.value)


def test_pack_names_keeps_every_file_name():
    packed = pack_names(["a.jpg", "사진 é.jpg", os.fsdecode(b"\xff.jpg"), ""])
    names = [os.fsencode(unpack_name(name)) for name in packed]
    assert names == [b"a.jpg", "사진 é.jpg".encode(), b"\xff.jpg", b""]
    assert len(pack_names([])) == 0
