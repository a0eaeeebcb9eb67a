"""Readers, notes of settings and lists of names in util.files."""

import hashlib
import json

import pytest

from util.errors import DataError, UsageError
from util.files import Provenance, format_names, read_bytes, sha256


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
