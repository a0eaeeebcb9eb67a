"""Lists of pairs in text, LFW's and plain ones, with the images in a folder."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from util.errors import DataError
from util.pairs import PairSubset, load_pairs
from util.pairs.text_list import Pair, read_pair_list

NAMES = ["Ann/Ann_0001", "Ann/Ann_0002", "Bob/Bob_0001", "Bob/Bob_0012"]


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """A folder of four images with four suffixes, each of one grey level: 10, 11, 12, 13."""
    root = tmp_path_factory.mktemp("faces")
    for index, (name, suffix) in enumerate(zip(NAMES, [".png", ".PNG", ".bmp", ".webp"], strict=True)):
        (root / name).parent.mkdir(exist_ok=True)
        image = cv2.imencode(suffix, np.full((112, 112, 3), 10 + index, np.uint8), [cv2.IMWRITE_WEBP_QUALITY, 101])[1]
        (root / f"{name}{suffix}").write_bytes(image.tobytes())
    return root


@pytest.fixture
def write(tmp_path):
    def write_list(text: str | bytes, name: str = "pairs.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_list


def levels(path: Path, root: Path | None = None) -> list[int]:
    pairs = load_pairs(path, root)
    images = pairs.images(0, 2 * len(pairs))
    assert images.shape == (2 * len(pairs), 112, 112, 3) and images.dtype == np.uint8
    return images[:, 5, 7, 1].tolist()


OFFICIAL = "Ann\t1\t2\nAnn\t1\tBob\t1\n"


@pytest.mark.parametrize("header", ["", "1\t1\n", "1\n", "1 1\n", "\ufeff1\t1\n", "\n1\n\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lfws_list_is_read_with_every_header(write, faces, header, end):
    path = write((header + OFFICIAL).replace("\n", end))
    pairs = load_pairs(path, faces)
    assert (pairs.name, len(pairs), pairs.issame.tolist()) == ("pairs", 2, [True, False])
    assert levels(path, faces) == [10, 11, 10, 12]


def test_lfws_list_separated_by_spaces_is_read(write, faces):
    assert levels(write("Ann  1 2\nBob 12 Ann 2 \n"), faces) == [10, 11, 13, 11]


def test_a_single_number_is_the_pairs_of_a_kind_in_a_fold(write, faces):
    assert len(load_pairs(write("1\n" + 3 * OFFICIAL), faces)) == 3 * 2


@pytest.mark.parametrize(
    "text",
    [
        "Ann/Ann_0001 Ann/Ann_0002 1\nAnn/Ann_0001 Bob/Bob_0012 0\n",
        "Ann/Ann_0001\tAnn/Ann_0002\t1\nAnn/Ann_0001\tBob/Bob_0012\t0",
        "Ann/Ann_0001.png, Ann/Ann_0002.PNG, 1\n\nAnn/Ann_0001,Bob/Bob_0012.webp,0\n\n",
        "Ann/Ann_0001.png Ann/Ann_0002 1\r\nAnn/../Ann/Ann_0001\tBob/Bob_0012\t0\r\n",
    ],
)
def test_a_plain_list_is_read_with_and_without_suffixes(write, faces, text):
    path = write(text)
    assert load_pairs(path, faces).issame.tolist() == [True, False]
    assert levels(path, faces) == [10, 11, 10, 13]


def test_names_may_hold_spaces_between_tabs_or_commas(tmp_path, write, faces):
    (tmp_path / "Ann Lee").mkdir()
    (tmp_path / "Ann Lee" / "no 1.png").write_bytes((faces / "Ann" / "Ann_0001.png").read_bytes())
    assert levels(write("Ann Lee/no 1\tAnn Lee/no 1.png\t1")) == [10, 10]
    assert levels(write("Ann Lee/no 1, Ann Lee/no 1.png, 1")) == [10, 10]


def test_numbers_alone_are_names_of_images_in_a_plain_list(tmp_path, write, faces):
    for name in ("0001", "0002"):
        (tmp_path / f"{name}.png").write_bytes((faces / "Ann" / "Ann_0001.png").read_bytes())
    assert levels(write("0001 0002 1\n0002 0001 0\n")) == [10, 10, 10, 10]


def test_images_are_next_to_the_list_or_named_in_full(write, faces, tmp_path):
    (faces / "pairs.txt").write_text("Ann/Ann_0001 Bob/Bob_0001 0\n")
    assert levels(faces / "pairs.txt") == [10, 12]
    assert levels(write(f"{faces}/Ann/Ann_0001 {faces}/Bob/Bob_0001.bmp 0\n")) == [10, 12]


def test_the_first_of_two_suffixes_is_taken(write, faces, tmp_path):
    for name, source in (
        ("a.png", "Ann/Ann_0001.png"),
        ("a.bmp", "Bob/Bob_0001.bmp"),
        ("a.v2.png", "Ann/Ann_0002.PNG"),
    ):
        (tmp_path / name).write_bytes((faces / source).read_bytes())
    assert levels(write("a a.bmp 1\na.png a.v2 0\n")) == [10, 12, 10, 11]


def test_pairs_know_their_lines(write):
    assert read_pair_list(write("\n1\n\nAnn 1 2\n\nAnn 1 Bob 1")) == [
        Pair("Ann/Ann_0001", "Ann/Ann_0002", True, 4),
        Pair("Ann/Ann_0001", "Bob/Bob_0001", False, 6),
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "lists no pairs"),
        ("\n \n", "lists no pairs"),
        ("10 300\n", "lists no pairs"),
        ("a b\n", "line 1: must be two images"),
        ("a b 1\nc d 2\n", "line 2: must be two images"),
        ("a b 1\nc d True\n", "line 2: must be two images"),
        ("a b 1\n\nc d e 0\n", "line 3: must be two images"),
        ("a,,1\n", "line 1: must be two images"),
        ("first,second,same\na,b,1", "line 1: must be two images"),
        ("x" * 1000, r"line 1: must be two images .*and is 'x{200}'\. Correct the line\.$"),
        ("1 1\nAnn 1 2\nAnn 1 Bob\n", "line 3: must be `NAME 1 4`"),
        ("Ann 1 2\nAnn 1 Bob 1\nAnn x Bob 1\n", "line 3: must be `NAME 1 4`"),
        ("1\nAnn 1 2\nAnn 1 Bob 1 5\n", "line 3: must be `NAME 1 4`"),
        ("Ann 1 2\nAnn 1 Bob -1\n", "line 1: must be two images"),
        ("10 300\n" + OFFICIAL, r"its first line \(10 300\) promises 6000 pairs, and 2 follow"),
        ("2\n" + OFFICIAL, r"its first line \(2\) promises 4 pairs, and 2 follow"),
        ("9" * 5000 + "\n" + OFFICIAL, "line 1: must be `NAME 1 4`"),
        ("Ann 1 " + "9" * 5000 + "\nAnn 1 Bob 1\n", "line 1: must be `NAME 1 4`"),
        ("0\n" + OFFICIAL, r"its first line \(0\) promises 0 pairs"),
        ("a b 1 \x1b[2J", r"line 1: must be two images .*'a b 1 \\x1b\[2J'"),
        ("\x1b[2J b c d", r"line 1: must be two images .*'\\x1b\[2J b c d'"),
    ],
)
def test_a_line_that_is_no_pair_is_named(write, faces, text, rule):
    with pytest.raises(DataError, match=rf"pairs\.txt(:|,) {rule}") as caught:
        load_pairs(write(text), faces)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\x93NUMPY\x01\x00", b"\xff\xd8\xff\xe0", b"PK\x03\x04\x00", b"caf\xe9 b 1\n"])
def test_a_file_of_another_kind_is_refused(write, content):
    with pytest.raises(DataError, match=r"pairs\.txt: not a verification set\. Name a bcolz folder, a \.bin"):
        load_pairs(write(content))


def test_missing_images_are_counted_and_the_first_is_named(write, faces):
    path = write("Ann 1 2\nAnn 1 Bob 3\nBob 3 4\nCid 1 Ann 1\n")
    with pytest.raises(
        DataError, match=rf"pairs\.txt: 3 of its images are not in {faces}, first Bob/Bob_0003 \(line 2\)"
    ):
        load_pairs(path, faces)
    with pytest.raises(DataError, match=r"nowhere: no such folder, but the images of .*pairs\.txt should be in it"):
        load_pairs(path, faces / "nowhere")


def test_a_folder_is_no_image(tmp_path, write):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match="1 of its images are not in"):
        load_pairs(write("a a 1"))
    with pytest.raises(DataError, match=r"1 of its images are not in .*, first a\.png"):
        load_pairs(write("a.png a.png 1"))


def test_a_link_to_itself_hides_no_images(tmp_path, write, faces):
    (tmp_path / "a.png").write_bytes((faces / "Ann" / "Ann_0001.png").read_bytes())
    (tmp_path / "b.png").symlink_to("a.png")
    (tmp_path / "c.png").symlink_to("c.png")
    assert levels(write("a b 1\n")) == [10, 10]
    with pytest.raises(DataError, match=r"1 of its images are not in .*, first c "):
        load_pairs(write("a c 1\n"))


@pytest.mark.parametrize("place", [0, 1])
def test_a_first_or_last_image_of_another_size_is_named(tmp_path, write, place):
    for number in range(2):
        size = 250 if number == place else 112
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((size, size, 3), np.uint8))
    with pytest.raises(DataError, match=rf"{place}\.png: 250x250 pixels, .*112x112\. Align or resize its images first"):
        load_pairs(write("0 1 0"))


def test_an_image_that_breaks_or_goes_is_named_when_it_is_read(tmp_path, write, faces):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes((faces / "Ann" / "Ann_0001.png").read_bytes())
    pairs = load_pairs(write("a b 1\nb c 1\n"))
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png: not an image"):
        pairs.images(0, 4)
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png: missing"):
        pairs.images(1, 2)


def test_lfws_own_list_is_read(shared):
    pairs = load_pairs(shared / "lfw" / "pairs.txt", shared / "lfw" / "aligned_112")
    assert len(pairs) == 3000
    folds = pairs.issame.reshape(5, 2, 300)
    assert folds[:, 0].all() and not folds[:, 1].any()  # the order of the file
    for index, name in ((0, "Abel_Pacheco/Abel_Pacheco_0001"), (1, "Abel_Pacheco/Abel_Pacheco_0004")):
        expected = cv2.imread(str(shared / "lfw" / "aligned_112" / f"{name}.jpg"), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(pairs.images(index, index + 1)[0], expected)
    with pytest.raises(DataError, match="250x250"):
        load_pairs(shared / "lfw" / "pairs.txt", shared / "lfw" / "images")


@pytest.mark.parametrize("text", ["A B 1 x\nA C 0 two\n", "A\tB\t1\tx\nA\tC\t0\ttwo\n", "A, B, 1, x\nA,C,0,two\n"])
def test_a_fourth_column_is_the_group(write, text):
    pairs = read_pair_list(write(text))
    assert [(pair.first, pair.second, pair.same, pair.group) for pair in pairs] == [
        ("A", "B", True, "x"),
        ("A", "C", False, "two"),
    ]


def test_commas_in_names_are_no_columns(write):
    (pair,) = read_pair_list(write("a,b,c.jpg d,e.jpg 1\n"))
    assert (pair.first, pair.second, pair.group) == ("a,b,c.jpg", "d,e.jpg", "")


def test_groups_and_names_follow_the_pairs(write, faces):
    path = write("Ann/Ann_0001 Ann/Ann_0002 1 north\nAnn/Ann_0001 Bob/Bob_0001 0 south\nBob/Bob_0001 Bob/Bob_0012 1\n")
    pairs = load_pairs(path, faces)
    assert pairs.groups.tolist() == ["north", "south", ""]
    subset = PairSubset(pairs, np.array([1, 0]))
    assert subset.groups.tolist() == ["south", "north"]
    assert [subset.image_name(index) for index in range(3)] == [
        "Ann/Ann_0001.png",
        "Bob/Bob_0001.bmp",
        "Ann/Ann_0001.png",
    ]
    assert load_pairs(write("Ann/Ann_0001 Ann/Ann_0002 1\n"), faces).groups is None


@pytest.mark.parametrize("is_rfw", [True, False])
def test_lists_of_groups_share_out_over_the_folds(tmp_path, is_rfw):
    """RFW's layout: 20 pairs of each of two groups; every tenth of the pairs has one tenth of each group."""
    lists, images = (tmp_path / "txts", tmp_path / "data") if is_rfw else (tmp_path, tmp_path)
    for level, group in enumerate(("Asian", "Indian")):
        (images / group / "m.1").mkdir(parents=True)
        for number in range(1, 4):
            image = np.full((112, 112, 3), 100 * level + number, np.uint8)
            cv2.imwrite(str(images / group / "m.1" / f"m.1_{number:04d}.png"), image)
        (lists / group).mkdir(parents=True, exist_ok=True)
        (lists / group / f"{group}_pairs.txt").write_text("m.1\t1\t2\nm.1\t1\tm.1\t3\n" * 10)
        (lists / group / f"{group}_people.txt").write_text("m.1\t3\n")
    pairs = load_pairs(tmp_path)
    assert len(pairs) == 40
    for tenth in range(10):
        chosen = slice(4 * tenth, 4 * tenth + 4)
        assert sorted(zip(pairs.groups[chosen], pairs.issame[chosen], strict=True)) == [
            ("Asian", False), ("Asian", True), ("Indian", False), ("Indian", True)
        ]  # fmt: skip
    for index in range(80):
        level = 100 * (pairs.groups[index // 2] == "Indian")
        number = 1 if index % 2 == 0 else 2 if pairs.issame[index // 2] else 3
        assert pairs.images(index, index + 1)[0, 0, 0, 0] == level + number
    assert pairs.image_name(1) == "Asian/m.1/m.1_0002.png"
    assert len(load_pairs(lists, images)) == 40


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b_pairs.txt").touch()
    with pytest.raises(DataError, match=r"not a bcolz carray, nor lists of groups\. Name a folder"):
        load_pairs(tmp_path)
    (tmp_path / "a" / "a_pairs.txt").touch()
    with pytest.raises(DataError, match=r"a_pairs\.txt: lists no pairs"):
        load_pairs(tmp_path)
