"""Atomic writes, readers, checks of paths and notes of settings in util.files."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from util.errors import DataError, RunError, UsageError
from util.files import (
    Provenance,
    atomic_write,
    atomic_write_all,
    finish_writes,
    format_names,
    path_inside,
    read_bytes,
    sha256,
)


def test_read_bytes_and_sha256_read_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    assert read_bytes(file, "Restore it.") == b"content"
    assert sha256(file) == hashlib.sha256(b"content").hexdigest()


def test_read_bytes_and_sha256_name_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"gone: cannot be read \(No such file or directory\)\. Restore it\.$"):
        read_bytes(tmp_path / "gone", "Restore it.")
    with pytest.raises(DataError, match=r"gone: cannot be read .* Name the right file\.$"):
        sha256(tmp_path / "gone")


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a", 2], "a, 2"), (["a", "b", "c"], "a, b and 1 more"), ("abcd", "a, b and 2 more")]
)
def test_format_names_counts_the_rest(names, text):
    assert format_names(names, 2) == text


def test_provenance_accepts_the_same_settings(tmp_path):
    file = tmp_path / "made.json"
    settings = {"scale": 4, "source": "Büro 사진 \udcff", "sizes": [1, 2], "mean": None}
    Provenance(file, settings, indent=2).check_or_write("--out=x", "Name another folder.")
    before = file.read_bytes()
    Provenance(file, settings).check_or_write("--out=x", "Name another folder.")
    assert file.read_bytes() == before
    assert Provenance(file, settings).matches()
    assert Provenance(file, {"scale": 4}).matches()
    assert Provenance(file, {"scale": 4}).recorded() == settings


def test_provenance_reads_escaped_text(tmp_path):
    (tmp_path / "made.json").write_text(json.dumps({"source": "사진"}))
    assert Provenance(tmp_path / "made.json", {"source": "사진"}).matches()


def test_provenance_refuses_other_settings(tmp_path):
    file = tmp_path / "made.json"
    Provenance(file, {"scale": 4, "degrade": False}).write()
    other = Provenance(file, {"scale": 4, "degrade": True})
    assert not other.matches()
    with pytest.raises(
        UsageError, match=r"^--out=x: .*\(made.json: degrade False, not True\)\. Name another folder\.$"
    ):
        other.check_or_write("--out=x", "Name another folder.")
    assert not Provenance(file, {"new": None, "degrade": True}).matches()


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_provenance_refuses_a_damaged_file(content, tmp_path):
    file = tmp_path / "made.json"
    file.write_text(content)
    assert not Provenance(file, {}).matches()
    with pytest.raises(UsageError, match=r"made.json is missing or damaged\. Add --force\."):
        Provenance(file, {}).check_or_write("--out=x", "Add --force.")


def test_atomic_write_replaces_the_file_at_the_end(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert (partial.parent, partial.suffix) == (tmp_path, ".json")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), atomic_write(path) as partial:
        partial.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_syncs_file_and_folder_around_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file", path.read_text()))
        if synced[-1][0] == "folder":
            raise OSError(errno.EINVAL, "this file system cannot")

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert synced == [("file", "old"), ("folder", "new")]
    with atomic_write(path, sync=False) as partial:
        partial.write_text("newer")
    assert path.read_text() == "newer" and len(synced) == 2


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the disk (No space left on device). Free some space, and wait."),
        (errno.EROFS, "the disk is read-only (Read-only file system). Make it writable, and wait."),
    ],
)
def test_atomic_write_names_the_file_on_a_disk_error(tmp_path, monkeypatch, number, message):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched, pytest.raises(RunError) as caught:
        patched.setattr(os, "fsync", fail)
        with atomic_write(path, then="wait") as partial:
            partial.write_text("new")
    assert str(caught.value) == f"{path}: {message}"
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_write_fails_in_one_line_on_a_full_device(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(RunError, match=r"results\.json: no space left"), atomic_write(path) as partial:
        partial.symlink_to("/dev/full")
        partial.write_text("new")
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_removes_its_file_if_the_rename_fails(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "results.json") as partial:
        partial.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_two_writers_of_a_file_never_tear_it(tmp_path):
    path = tmp_path / "results.txt"
    program = (
        "import sys; from pathlib import Path; from util.files import atomic_write\n"
        "for _ in range(200):\n"
        "    with atomic_write(Path(sys.argv[1]), sync=False) as partial:\n"
        "        partial.write_text(sys.argv[2] * 300_000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, path, letter]) for letter in "ab"]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert text in (text[0] * 300_000,)
            reads += 1
    assert reads and [writer.returncode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def write_two(folder: Path, text: str) -> None:
    with atomic_write_all([folder / "a.txt", folder / "b.txt"]) as partials:
        for partial in partials:
            partial.write_text(text)


def killed(work, monkeypatch, renames: int) -> None:
    """Run `work` in a child process that is killed after some renames."""
    if (child := os.fork()) == 0:
        done = []

        def replace(self: Path, target: Path) -> Path:
            if len(done) == renames:
                os._exit(9)
            done.append(target)
            os.replace(self, target)
            return target

        monkeypatch.setattr(Path, "replace", replace)
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(("renames", "expected"), [(0, "old"), (1, "new"), (2, "new")])
def test_files_that_belong_together_are_replaced_together(tmp_path, monkeypatch, renames, expected):
    write_two(tmp_path, "old")
    killed(lambda: write_two(tmp_path, "new"), monkeypatch, renames)
    finish_writes(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.glob("[ab].txt")} == {"a.txt": expected, "b.txt": expected}
    assert len(list(tmp_path.iterdir())) == (4 if renames == 0 else 2)


def test_atomic_write_all_keeps_all_files_after_an_error(tmp_path):
    write_two(tmp_path, "old")
    with (
        pytest.raises(SystemExit),
        atomic_write_all([tmp_path / "a.txt", tmp_path / "b.txt"]) as partials,
    ):
        partials[0].write_text("new")
        raise SystemExit(143)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old", "b.txt": "old"}


def test_path_inside_accepts_names_that_stay_in_the_folder(tmp_path):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "within").symlink_to(tmp_path / "real" / "inner")
    for name in ("1.png", "a/b/1.png", "a/../b/1.png", "..1.png", "...", "within/1.png", "한 글.png", "\udcff.png"):
        assert path_inside(tmp_path / "link", name) == tmp_path / "link" / os.path.normpath(name)
    assert path_inside(Path(), "a.png") == Path("a.png")


@pytest.mark.parametrize("name", ["..", "../1.png", "a/../../1.png", "/etc/1.png", "//1.png", "out/1.png", "file.png"])
def test_path_inside_refuses_names_that_lead_out(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "file.png").symlink_to(tmp_path / "photo.png")
    with pytest.raises(
        DataError, match=f"^pairs.txt: {os.path.normpath(name)}: would be written into {folder}, but"
    ) as raised:
        path_inside(folder, name, list_file="pairs.txt")
    assert "\n" not in str(raised.value)


def test_path_inside_ends_on_links_in_a_circle(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    # Writing fails later, and nothing is outside.
    assert path_inside(tmp_path, "circle/1.png") == tmp_path / "circle/1.png"
