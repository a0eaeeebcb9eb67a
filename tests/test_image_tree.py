"""Name the files that are made from a tree of images."""

import numpy as np
import pytest

from util.image_tree import printable, unique_output_names


def test_unique_output_names_keeps_suffix_of_equal_names():
    assert unique_output_names(["1.jpg", "2.png", "notes.txt"]) == ["1", "2", "notes.txt"]
    assert unique_output_names(["1.jpg", "1.png", "2.png"]) == ["1.jpg", "1.png", "2"]
    assert unique_output_names(["1.JPG", "1.png"]) == ["1.JPG", "1.png"]
    assert unique_output_names(["a.jpg", "A.png"]) == ["a.jpg", "A.png"]  # one file if the file system ignores case
    assert unique_output_names(["1.txt", "1.jpg"]) == ["1.txt", "1"]
    assert unique_output_names(["a.face2.jpg", "a.jpg"]) == ["a.face2.jpg", "a"]
    assert unique_output_names(["a", "a.face2"]) == ["a", "a.face2.face1"]


@pytest.mark.parametrize("seed", range(60))
def test_unique_output_names_never_repeats_a_name(seed):
    rng = np.random.default_rng(seed)
    parts = ["a", "A", "b", ".jpg", ".png", ".JPG", ".txt", ".face2", "."]
    names = sorted({"".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(40)} - {".", ".."})
    faces = [
        f"{base}{extra}.jpg".casefold() for base in unique_output_names(names) for extra in ("", ".face2", ".face3")
    ]
    distinct = {name.casefold() for name in names}
    if len(distinct) == len(names):  # otherwise the source cannot be on such a file system
        assert len(set(faces)) == len(faces)


def test_printable_escapes_bytes_not_utf8():
    assert printable(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == r"caf\udce9.png"
    assert printable("사진.png") == "사진.png"
