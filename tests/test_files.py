"""Atomic writes, readers, checks of paths and notes of settings in util.files."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from util.errors import DataError, UsageError
from util.files import Provenance, atomic_write, format_names, path_inside, read_bytes, sha256


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
    path_inside(tmp_path, "circle/1.png")  # writing fails later, and nothing is outside
