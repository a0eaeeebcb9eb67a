"""Make verification sets from photographs: LFW, CFP and other lists, with a detector that reads the color.

It finds a face in red photographs, in green ones only with low thresholds, and in blue ones never. In yellow ones it
finds a face in a corner.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from applications.align import Face, batch
from applications.prepare import cfp, lfw, pairs
from applications.prepare.align_pairs import align_all
from util.errors import DataError, Interrupted, UsageError
from util.face import ARCFACE_TEMPLATE
from util.pairs import load_pairs

RED, GREEN, BLUE, YELLOW = (200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20)
MEAN_FACE = np.array(lfw.LANDMARKS)


class ColorDetector:
    """Replaces applications.align.Detector. `seen`: number of images given to all instances."""

    seen = 0

    def __init__(self, device: object, min_face: float, thresholds: Sequence[float]):
        self._low = thresholds[2] < 0.7

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        ColorDetector.seen += len(images)
        return [self._faces(image) for image in images]

    def _faces(self, image: np.ndarray) -> list[Face]:
        red, green, _ = image[1, 1] > 100
        if red and green:
            return [Face(np.array([0.0, 0, 40, 40]), 0.9, MEAN_FACE / 4)]
        if red or (green and self._low):
            return [Face(np.array([80.0, 80, 170, 170]), 0.9, MEAN_FACE)]
        return []


@pytest.fixture(autouse=True)
def detector(monkeypatch: pytest.MonkeyPatch) -> type[ColorDetector]:
    monkeypatch.setattr(batch, "Detector", ColorDetector)
    monkeypatch.setattr(ColorDetector, "seen", 0)
    return ColorDetector


def write_photo(path: Path, color: Sequence[int], size: int = 250) -> None:
    """Write a photograph of one color, with a white square at the nose of LFW's mean face."""
    image = np.full((size, size, 3), color, np.uint8)
    x, y = (MEAN_FACE[2] * size / 250).astype(int)
    image[y - 10 : y + 10, x - 10 : x + 10] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[:, :, ::-1])


@pytest.fixture
def write_lfw(tmp_path: Path) -> Callable[..., Path]:
    """write_lfw({("p03", 2): BLUE}) -> LFW with one fold of 12 pairs of a kind, all red but those."""

    def write(colors: dict[tuple[str, int], Sequence[int]] | None = None, folder: str = "lfw") -> Path:
        source = tmp_path / "source"
        people = [f"p{number:02d}" for number in range(12)]
        lines = ["1\t12", *(f"{name}\t1\t2" for name in people)]
        lines += [f"{name}\t1\t{other}\t2" for name, other in zip(people, people[1:] + people[:1], strict=True)]
        for name in people:
            for number in (1, 2):
                color = (colors or {}).get((name, number), RED)
                write_photo(source / folder / name / f"{name}_{number:04d}.jpg", color)
        (source / "pairs.txt").write_text("\n".join(lines) + "\n")
        return source

    return write


def run_lfw(source: Path, data: Path, *flags: str) -> Path:
    lfw.main(["--source", str(source), "--data_dir", str(data), "--processes", "0", *flags])
    return data / lfw.OUT


# --- LFW.


def test_lfw_set_folds_have_both_kinds_and_match_the_list(write_lfw, tmp_path):
    out = run_lfw(write_lfw(), tmp_path / "data")
    made = load_pairs(out)
    assert len(made) == 24 and int(made.issame.sum()) == 12
    assert all(0 < part.sum() < len(part) for part in np.array_split(made.issame, 10))
    rows = [line.split("\t") for line in (out.parent / "lfw_pairs.txt").read_text().splitlines()]
    assert [row[2] == "1" for row in rows] == made.issame.tolist()
    for first, second, same in rows:
        assert (first.split("/")[1] == second.split("/")[1]) == (same == "1")
    for index in (0, 17, 47):
        file = out.parent / "aligned" / rows[index // 2][index % 2]
        np.testing.assert_array_equal(made.images(index, index + 1)[0], cv2.imread(str(file))[:, :, ::-1])


def test_lfw_list_opens_as_the_same_set(write_lfw, tmp_path):
    out = run_lfw(write_lfw(), tmp_path / "data")
    listed = load_pairs(out.parent / "lfw_pairs.txt", out.parent / "aligned")
    np.testing.assert_array_equal(listed.images(0, 48), load_pairs(out).images(0, 48))


def test_lfw_keeps_order_of_official_folds(write_lfw, tmp_path):
    source = write_lfw()
    one = (source / "pairs.txt").read_text().splitlines()
    same, different = one[1:13], one[13:]
    lines = ["10\t1", *(line for pair in zip(same[:10], different[:10], strict=True) for line in pair)]
    (source / "pairs.txt").write_text("\n".join(lines))
    out = run_lfw(source, tmp_path / "data")
    assert load_pairs(out).issame.tolist() == [True, False] * 10
    first = (out.parent / "lfw_pairs.txt").read_text().splitlines()[0]
    assert first == "found/p00/p00_0001.png\tfound/p00/p00_0002.png\t1"


def test_lfw_keeps_pairs_of_faces_not_found(write_lfw, tmp_path, capsys):
    source = write_lfw({("p03", 1): GREEN, ("p04", 2): BLUE, ("p05", 1): YELLOW})
    out = run_lfw(source, tmp_path / "data")
    assert len(load_pairs(out)) == 24
    text = capsys.readouterr().out
    assert "lower thresholds (0.4 0.5 0.5) in 1 photograph: p03/p03_0001.jpg" in text
    assert "used the average face region of 2 photographs: p04/p04_0002.jpg, p05/p05_0001.jpg" in text
    note = json.loads((out.parent / "lfw.json").read_text())
    assert note["found at lower thresholds"] == ["p03/p03_0001.jpg"]
    assert note["not found"] == ["p04/p04_0002.jpg", "p05/p05_0001.jpg"]
    listed = (out.parent / "lfw_pairs.txt").read_text()
    assert "found_low/p03/p03_0001.png" in listed and "not_found/p04/p04_0002.jpg.png" in listed


@pytest.mark.parametrize("size", [250, 500])
def test_fallback_crop_puts_mean_face_on_the_template(tmp_path, size):
    write_photo(tmp_path / "a.png", BLUE, size)
    face = lfw.fallback_crop(cv2.imread(str(tmp_path / "a.png"))[:, :, ::-1])
    assert face.shape == (112, 112, 3)
    rows, columns = np.nonzero(face[:, :, 0] > 128)  # the white square, whose center is the nose
    nose = ARCFACE_TEMPLATE[2]
    assert abs(columns.mean() - nose[0]) < 2.5 and abs(rows.mean() - nose[1]) < 2.5


def test_lfw_reads_photographs_of_the_list_only(write_lfw, tmp_path, detector):
    source = write_lfw()
    (source / "lfw" / "p00" / "p00_0003.jpg").write_bytes(b"broken")
    run_lfw(source, tmp_path / "data")
    assert detector.seen == 24


@pytest.mark.parametrize("folder", [".", "lfw", "lfw-deepfunneled/lfw-deepfunneled", "images"])
def test_lfw_finds_photographs_in_usual_folders(write_lfw, tmp_path, folder):
    assert load_pairs(run_lfw(write_lfw(folder=folder), tmp_path / "data"))


def test_lfw_missing_photographs_or_list_is_an_error(write_lfw, tmp_path):
    source = write_lfw(folder="elsewhere")
    with pytest.raises(DataError, match=r"none of the 12 people in the list has a folder .*--source"):
        run_lfw(source, tmp_path / "data")
    (source / "pairs.txt").unlink()
    with pytest.raises(DataError, match=r"no pairs\.txt in it or next to it\. Name the list with --pairs"):
        run_lfw(source, tmp_path / "data")


def test_lfw_missing_source_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder\. .*--source"):
        run_lfw(tmp_path / "nowhere", tmp_path / "data")


def test_lfw_lists_broken_photographs_and_leaves_no_set(write_lfw, tmp_path):
    source = write_lfw()
    for name in ("p01", "p02"):
        (source / "lfw" / name / f"{name}_0002.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(DataError, match=r"cannot read 2 photographs: p01/p01_0002\.jpg, p02/p02_0002\.jpg \(.+\)"):
        run_lfw(source, tmp_path / "data")
    assert not list((tmp_path / "data/lfw_align_112").glob("lfw*"))
    (source / "lfw/p01/p01_0002.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of its images are not in .*lfw, first p01/p01_0002"):
        run_lfw(source, tmp_path / "data")
    for name in ("p01", "p02"):
        write_photo(source / "lfw" / name / f"{name}_0002.jpg", RED)
    assert len(load_pairs(run_lfw(source, tmp_path / "data"))) == 24


def test_lfw_continues_a_stopped_run(write_lfw, tmp_path, detector, monkeypatch):
    source, write = write_lfw({("p04", 2): BLUE}), batch.write_image

    def interrupted(path: Path, image: np.ndarray) -> None:
        if path.parent.name == "p11":
            raise KeyboardInterrupt
        write(path, image)

    monkeypatch.setattr(batch, "write_image", interrupted)
    monkeypatch.setattr(batch, "_FILES_AT_ONCE", 4)
    with pytest.raises(Interrupted) as caught:
        run_lfw(source, tmp_path / "data")
    assert caught.value.message == "Interrupted. The same command continues from here."
    monkeypatch.setattr(batch, "write_image", write)
    detector.seen = 0
    out = run_lfw(source, tmp_path / "data")
    assert len(load_pairs(out)) == 24
    assert 0 < detector.seen < 10  # the images of the last chunk, and p04 again


def test_lfw_keeps_existing_set_without_force(write_lfw, tmp_path, detector, capsys):
    out = run_lfw(write_lfw(), tmp_path / "data")
    detector.seen = 0
    before = (out / "meta" / "sizes").stat().st_mtime_ns
    run_lfw(tmp_path / "source", tmp_path / "data")
    assert "nothing to do" in capsys.readouterr().out
    assert detector.seen == 0 and (out / "meta" / "sizes").stat().st_mtime_ns == before
    lines = (tmp_path / "source/pairs.txt").read_text().replace("1\t12", "").strip().splitlines()
    (tmp_path / "source/pairs.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(UsageError, match=r"lfw: exists, and was made from something else\. .*--force"):
        run_lfw(tmp_path / "source", tmp_path / "data")
    (out.parent / "lfw.json").unlink()  # like a downloaded set
    with pytest.raises(UsageError, match="made from something else"):
        run_lfw(tmp_path / "source", tmp_path / "data")
    assert len(load_pairs(run_lfw(tmp_path / "source", tmp_path / "data", "--force"))) == 23


def test_lfw_photographs_match_reference_alignment(shared, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real detector
    same = [f"Colin_Powell\t{one}\t{other}" for one in range(1, 6) for other in range(one + 1, 6)]
    different = [f"Colin_Powell\t{one}\tTony_Blair\t{other}" for one in range(1, 6) for other in (1, 2)]
    (tmp_path / "pairs.txt").write_text("\n".join(same + different))
    out = run_lfw(shared / "lfw", tmp_path / "data", "--pairs", str(tmp_path / "pairs.txt"))
    made = load_pairs(out)
    names = [row.split("\t") for row in (out.parent / "lfw_pairs.txt").read_text().splitlines()]
    assert made.issame.sum() == 10 and len(made) == 20
    differences = []
    for index in range(40):
        name = Path(names[index // 2][index % 2])
        reference = cv2.imread(str(shared / "lfw/aligned_112" / name.parent.name / f"{name.stem}.jpg"))[:, :, ::-1]
        differences.append(np.abs(made.images(index, index + 1)[0].astype(int) - reference).mean())
    assert np.median(differences) < 2 and np.mean(differences) < 3  # of 255 levels; landmarks differ a little in some


# --- CFP.


@pytest.fixture
def small_cfp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CFP with 6 people, 3 frontal and 2 profile images of each, and 4 pairs of a kind in each of 10 splits."""
    for name, value in (("PEOPLE", 6), ("OF_A_KIND", 4), ("IMAGES_OF", {"frontal": 3, "profile": 2})):
        monkeypatch.setattr(cfp, name, value)
    root = tmp_path / "cfp-dataset"
    for kind, count in cfp.IMAGES_OF.items():
        for person in range(1, 7):
            for image in range(1, count + 1):
                color = BLUE if (kind, person, image) == ("profile", 2, 1) else RED
                write_photo(root / "Data/Images" / f"{person:03d}" / kind / f"{image:02d}.jpg", color, 90 + person)
    for split, of_second in (("FF", 3), ("FP", 2)):
        for number in range(1, 11):
            same = [f"{3 * person + 1},{of_second * person + 2}" for person in range(4)]
            different = [f"{3 * person + number % 3 + 1},{of_second * person + of_second + 1}" for person in range(4)]
            for name, lines in (("same", same), ("diff", different)):
                file = root / "Protocol/Split" / split / f"{number:02d}" / f"{name}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("\n".join(lines) + "\n")
    return root


def run_cfp(source: Path, data: Path, *flags: str) -> Path:
    cfp.main(["--source", str(source), "--data_dir", str(data), "--processes", "0", *flags])
    return data / cfp.OUT


def test_cfp_makes_two_sets_with_splits_in_order(small_cfp, tmp_path, capsys):
    folder = run_cfp(small_cfp, tmp_path / "data")
    for name, kind in (("cfp_ff", "frontal"), ("cfp_fp", "profile")):
        made = load_pairs(folder / name)
        assert made.issame.tolist() == ([True] * 4 + [False] * 4) * 10
        rows = [line.split("\t") for line in (folder / f"{name}_pairs.txt").read_text().splitlines()]
        people = [[Path(face).parts[1] for face in row[:2]] for row in rows]
        assert [one == other for one, other in people] == made.issame.tolist()
        assert {Path(row[0]).parts[2] for row in rows} == {"frontal"}
        assert {Path(row[1]).parts[2] for row in rows} == {kind}
    assert "used the full image of 1 photograph: 002/profile/01.jpg" in capsys.readouterr().out
    assert json.loads((folder / "cfp_fp.json").read_text())["not found"] == ["002/profile/01.jpg"]


def test_cfp_uses_full_image_if_no_face_is_found(small_cfp, tmp_path):
    folder = run_cfp(small_cfp, tmp_path / "data")
    face = cv2.imread(str(folder / "aligned/not_found/002/profile/01.jpg.png"))
    image = cv2.imread(str(small_cfp / "Data/Images/002/profile/01.jpg"))
    assert face.shape == (112, 112, 3) and np.abs(face[5, 5].astype(int) - image[4, 4]).max() < 8


def test_cfp_makes_only_the_missing_set(small_cfp, tmp_path, capsys):
    folder = run_cfp(small_cfp, tmp_path / "data")
    shutil.rmtree(folder / "cfp_fp")
    run_cfp(small_cfp.parent, tmp_path / "data")  # the folder around it is found too
    text = capsys.readouterr().out
    assert "cfp_ff: was made from this before" in text and len(load_pairs(folder / "cfp_fp")) == 80


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda root: shutil.rmtree(root / "Data"), r"no Data/Images/001"),
        (lambda root: shutil.rmtree(root / "Protocol"), r"no Protocol/Split"),
        (lambda root: shutil.rmtree(root / "Data/Images/003"), r"5 of 21 images .* are missing, first 003/frontal"),
        (lambda root: (root / "Protocol/Split/FP/07/diff.txt").unlink(), r"07/diff\.txt: cannot be read"),
        (lambda root: (root / "Protocol/Split/FF/02/same.txt").write_text("1,2\n"), r"1 pairs, but each split has 4"),
        (
            lambda root: (root / "Protocol/Split/FF/02/same.txt").write_text("1,2\n1;2\n"),
            r"line 2: must be two numbers",
        ),
        (lambda root: (root / "Protocol/Split/FF/02/same.txt").write_text("1,99\n"), r"line 1: 1,99.* from 1 to 18"),
        (lambda root: (root / "Protocol/Split/FF/02/same.txt").write_text("0,1\n"), r"line 1: 0,1"),
        (
            lambda root: (root / "Protocol/Split/FF/02/same.txt").write_bytes(b"\xff\xfe1"),
            r"not the text of a protocol",
        ),
        (lambda root: (root / "Protocol/Pair_list_F.txt").write_text("1 ../Data/Images/001/frontal/02.jpg"), "image 1"),
        (
            lambda root: (root / "Protocol/Pair_list_F.txt").write_text("1 ../Data/Images/001/frontal/01.jpg"),
            "lists 1 ",
        ),
    ],
)
def test_cfp_damaged_source_is_an_error_before_detection(small_cfp, tmp_path, detector, spoil, rule):
    spoil(small_cfp)
    with pytest.raises(DataError, match=rule):
        run_cfp(small_cfp, tmp_path / "data")
    assert detector.seen == 0 and not list((tmp_path / "data").glob("*/cfp*"))


def test_cfp_published_protocol_has_7000_pairs(shared):
    protocol = shared / "cfp_protocol"
    for name in cfp.SETS:
        listed = cfp.read_protocol(protocol, name)
        assert len(listed) == 7000
        assert [same for *_, same in listed] == ([True] * 350 + [False] * 350) * 10
        for one, other, same in listed:
            assert (one[:3] == other[:3]) == same
            assert one[4:].startswith("frontal/") and other[4:].startswith(
                "profile/" if name == "cfp_fp" else "frontal/"
            )
    assert listed[0] == ("001/frontal/05.jpg", "001/profile/01.jpg", True)


def test_cfp_order_of_people_matches_published_lists(shared, tmp_path):
    for kind in cfp.LISTS:
        assert cfp.read_images(shared / "cfp_protocol", kind) == cfp.read_images(tmp_path, kind)


# --- Other lists.


@pytest.fixture
def own_list(tmp_path: Path) -> Path:
    """Write a list of 10 same and then 10 different pairs, with names without suffix."""
    lines = []
    for person in range(10):
        for number in (1, 2):
            write_photo(tmp_path / "photos" / f"p{person}" / f"{number}.jpg", RED)
        lines.append(f"p{person}/1\tp{person}/2\t1")
    lines += [f"p{person}/1\tp{(person + 1) % 10}/2\t0" for person in range(10)]
    (tmp_path / "own.txt").write_text("\n".join(lines))
    return tmp_path / "own.txt"


def run_pairs(listed: Path, images: Path, out: Path, *flags: str) -> Path:
    pairs.main(["--list", str(listed), "--images", str(images), "--out", str(out), "--processes", "0", *flags])
    return out


def test_pairs_align_photographs_and_balance_folds(own_list, tmp_path):
    made = load_pairs(run_pairs(own_list, tmp_path / "photos", tmp_path / "own" / "own", "--align"))
    assert [int(part.sum()) for part in np.array_split(made.issame, 10)] == [1] * 10
    assert len(list((tmp_path / "own/own_aligned/found").rglob("*.png"))) == 20


def test_pairs_face_not_found_is_an_error_or_full_image(own_list, tmp_path, capsys):
    write_photo(tmp_path / "photos/p3/2.jpg", BLUE)
    with pytest.raises(DataError, match=r"no face found in 1 photograph: p3/2\.jpg\. .*--whole_image"):
        run_pairs(own_list, tmp_path / "photos", tmp_path / "own", "--align")
    assert not (tmp_path / "own").exists() and not (tmp_path / "own_pairs.txt").exists()
    assert len(load_pairs(run_pairs(own_list, tmp_path / "photos", tmp_path / "own", "--align", "--whole_image"))) == 20
    assert "used the full image of 1 photograph: p3/2.jpg" in capsys.readouterr().out


def test_pairs_refuses_names_that_lead_outside(own_list, tmp_path):
    write_photo(tmp_path / "outside.jpg", RED)
    own_list.write_text(own_list.read_text() + "\n../outside.jpg\tp1/1\t0")
    with pytest.raises(DataError, match=r"own\.txt: \.\./outside\.jpg: .*leads out of that folder\."):
        run_pairs(own_list, tmp_path / "photos", tmp_path / "own", "--align")
    assert not (tmp_path / "outside.png").exists()


def test_pairs_alignment_flags_need_align(own_list, tmp_path):
    with pytest.raises(UsageError, match="are for --align"):
        run_pairs(own_list, tmp_path / "photos", tmp_path / "own", "--whole_image")
    with pytest.raises(UsageError, match="--processes: '-1' is not a whole number from 0 to 256"):
        run_pairs(own_list, tmp_path / "photos", tmp_path / "own", "--align", "--processes", "-1")


def test_pairs_refuses_photographs_without_align(own_list, tmp_path):
    with pytest.raises(DataError, match=r"250x250 pixels, but a verification set holds aligned faces of 112x112"):
        run_pairs(own_list, tmp_path / "photos", tmp_path / "sets" / "own")
    assert list((tmp_path / "sets").iterdir()) == []


@pytest.mark.parametrize("color", [RED, BLUE])
@pytest.mark.parametrize("absolute", [False, True])
def test_lfw_never_writes_over_a_photograph_elsewhere(write_lfw, tmp_path, color, absolute):
    source, holiday = write_lfw(), tmp_path / "home" / "holiday.png"
    write_photo(holiday, color, size=300)
    before = holiday.read_bytes()
    photographs = sorted((source / "lfw").rglob("*.jpg"))
    names = [str(path.relative_to(source / "lfw")) for path in photographs]
    outside = holiday if absolute else "/".join([".."] * (len(source.parts) + 9)) + str(holiday)
    rows = [f"{names[0]}\t{name}\t{number % 2}" for number, name in enumerate(names[1:])]
    (source / "pairs.txt").write_text("\n".join([*rows, f"{names[0]}\t{outside}\t0"]))
    with pytest.raises(DataError, match=r"pairs\.txt: [./]*/home.*holiday\.png: .*leads out of that folder\. Correct"):
        run_lfw(source, tmp_path / "data")
    assert holiday.read_bytes() == before
    assert [path.name for path in holiday.parent.iterdir()] == ["holiday.png"]
    assert not list(tmp_path.glob("data/**/*.png"))


@pytest.mark.parametrize("color", [RED, BLUE])  # a face that is found, and a fallback crop
def test_align_all_refuses_names_that_lead_outside(tmp_path, color):
    write_photo(tmp_path / "source" / "1.jpg", RED)
    write_photo(tmp_path / "made" / "photo.png", color)
    before = (tmp_path / "made" / "photo.png").read_bytes()
    with pytest.raises(DataError, match=r"\.\./made/photo\.png.*leads out of that folder"):
        align_all(
            tmp_path / "source",
            ["1.jpg", "../made/photo.png"],
            tmp_path / "made" / "aligned",
            lfw.fallback_crop,
            processes=0,
        )
    assert (tmp_path / "made" / "photo.png").read_bytes() == before
    assert {path.suffix for path in tmp_path.rglob("aligned/made/*")} == set()


@pytest.mark.parametrize("folder", ["found", "not_found", "found/p"])
def test_align_all_follows_no_link_out_of_its_folder(tmp_path, folder):
    for name, color in (("1.png", RED), ("2.png", BLUE)):
        write_photo(tmp_path / "source" / "p" / name, color)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "made" / folder
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link out of that folder"):
        align_all(tmp_path / "source", ["p/1.png", "p/2.png"], tmp_path / "made", lfw.fallback_crop, processes=0)
    assert not list((tmp_path / "elsewhere").iterdir())
