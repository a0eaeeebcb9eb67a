"""Verification sets of every format behind one interface, and where they are found."""

import os
import pickle
import resource
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from util.errors import DataError
from util.pairs import PairSubset, find_pair_sets, interleaved_order, iter_images, load_pairs
from util.pairs.bcolz import write_carray
from util.verification import contiguous_folds


@pytest.fixture
def small(tmp_path) -> Path:
    """Write a set of two pairs, too few for ten folds."""
    path = tmp_path / "lfw"
    write_carray(path, [np.full((112, 112, 3), 10 * index, np.uint8) for index in range(4)], [True, False])
    return path


@pytest.fixture(scope="module")
def formats(tmp_path_factory, made_pairs) -> Path:
    """Write `made_pairs` as set.bin, and as LFW's list lfw.txt and the plain list plain.txt with their images."""
    root = tmp_path_factory.mktemp("formats")
    _, images, issame = made_pairs
    encoded = [cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() for image in images]
    (root / "set.bin").write_bytes(pickle.dumps((encoded, issame.tolist())))
    plain, official = [], []
    for index, image in enumerate(encoded):
        person, number = (f"P{index // 2}", index % 2 + 1) if issame[index // 2] else (f"Q{index}", 1)
        (root / person).mkdir(exist_ok=True)
        (root / person / f"{person}_{number:04d}.png").write_bytes(image)
    for pair, same in enumerate(issame):
        a, b = 2 * pair, 2 * pair + 1
        names = [f"P{pair}", f"P{pair}"] if same else [f"Q{a}", f"Q{b}"]
        plain.append(f"{names[0]}/{names[0]}_0001 {names[1]}/{names[1]}_000{2 if same else 1}.png {int(same)}\n")
        official.append(f"P{pair}\t1\t2\n" if same else f"Q{a}\t1\tQ{b}\t1\n")
    (root / "plain.txt").write_text("".join(plain))
    (root / "lfw.txt").write_text("".join(official))
    return root


@pytest.mark.parametrize("file", ["set.bin", "plain.txt", "lfw.txt"])
def test_every_format_gives_the_same_images(made_pairs, formats, file):
    expected = load_pairs(made_pairs[0])
    pairs = load_pairs(formats / file)
    assert pairs.name == Path(file).stem and len(pairs) == len(expected)
    np.testing.assert_array_equal(pairs.issame, expected.issame)
    for start, stop in ((0, 46), (0, 1), (7, 14), (45, 46)):
        read = pairs.images(start, stop)
        assert read.flags.c_contiguous and read.dtype == np.uint8
        np.testing.assert_array_equal(read, expected.images(start, stop))
    np.testing.assert_array_equal(np.stack(list(iter_images(pairs))), made_pairs[1])


def test_formats_of_another_project_give_the_same_images(shared):
    folder = shared / "formats"
    expected = load_pairs(folder / "bin" / "pairs.txt", shared / "lfw" / "aligned_112")
    images = expected.images(0, 240)
    for name in ("lfw.bin", "lfw_py2.bin", "lfw_ndarray.bin"):
        pairs = load_pairs(folder / "bin" / name)
        np.testing.assert_array_equal(pairs.issame, expected.issame)
        np.testing.assert_array_equal(pairs.images(0, 240), images)
    pairs = load_pairs(folder / "bcolz" / "lfw")
    np.testing.assert_array_equal(pairs.issame, expected.issame[:20])
    difference = np.abs(pairs.images(0, 40).astype(int) - images[:40])
    assert difference.mean() < 1  # as decoders may differ


def test_the_content_tells_a_bin_from_a_list(tmp_path, formats):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.loads((formats / "set.bin").read_bytes())
        for number, again in enumerate((content, list(content))):
            (tmp_path / f"{protocol}{number}.txt").write_bytes(pickle.dumps(again, protocol))
            assert len(load_pairs(tmp_path / f"{protocol}{number}.txt")) == 23
    shutil.copy(formats / "plain.txt", tmp_path / "list.bin")
    assert len(load_pairs(tmp_path / "list.bin", formats)) == 23


def endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def fifo(file: Path) -> None:
    os.mkfifo(file)


def terabyte(file: Path) -> None:
    """Make a sparse file of 2^40 bytes, which begins like the original one."""
    file.write_bytes(b"\x80\x04" if file.suffix == ".bin" else b"1 1\n")
    os.truncate(file, 1 << 40)


@pytest.mark.parametrize("make", [endless, fifo, terabyte, Path.mkdir])
@pytest.mark.parametrize(
    "file",
    [
        "carray/set_list.npy",
        "carray/set/meta/storage",
        "carray/set/meta/sizes",
        "carray/set/data/__0.blp",
        "carray/set/data/__7.blp",
        "set.bin",
        "plain.txt",
        "Q2/Q2_0001.png",
        "Q6/Q6_0001.png",
    ],
)
def test_files_that_are_not_regular_are_refused(tmp_path, formats, made_pairs, time_limit, file, make):
    shutil.copytree(formats, tmp_path / "formats")
    root = tmp_path / "formats"
    copy_set(made_pairs[0], root / "carray" / "set")
    (root / file).unlink()
    make(root / file)
    path = {"carray": root / "carray/set", "set.bin": root / "set.bin"}.get(file.split("/")[0], root / "plain.txt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with time_limit(20), pytest.raises(DataError) as caught:
        load_pairs(path).images(0, 46)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["{outside}", "../outside", "Q2/../../outside"])
@pytest.mark.parametrize("make", [endless, fifo])
def test_names_outside_the_folder_are_images_or_refused(tmp_path, formats, time_limit, name, make):
    shutil.copytree(formats, tmp_path / "formats")
    listed = tmp_path / "formats" / "plain.txt"
    outside = tmp_path / "outside.png"
    shutil.copy(formats / "Q2" / "Q2_0001.png", outside)
    listed.write_text(f"{name.format(outside=outside)} Q2/Q2_0001 1\n")
    images = load_pairs(listed).images(0, 2)
    np.testing.assert_array_equal(images[0], images[1])
    outside.unlink()
    make(outside)
    with time_limit(20), pytest.raises(DataError, match=r"plain\.txt: 1 of its images are not in"):
        load_pairs(listed)


def test_load_pairs_a_name_too_long_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such verification set"):
        load_pairs(tmp_path / ("x" * 300))


# The order of pairs.


def test_an_order_that_ten_folds_can_evaluate_is_kept():
    issame = np.tile(np.arange(60) < 30, 10)
    np.testing.assert_array_equal(interleaved_order(issame), np.arange(600))


@pytest.mark.parametrize("same", [10, 11, 19, 20, 37, 300])
@pytest.mark.parametrize("different", [10, 12, 25, 99, 300])
def test_each_fold_gets_the_same_number_of_both_kinds(same, different):
    issame = np.arange(same + different) < same
    order = interleaved_order(issame)
    assert sorted(order) == list(range(same + different))
    fold_of = contiguous_folds(issame[order], 10)
    for kind in (True, False):
        assert np.ptp(np.bincount(fold_of[issame[order] == kind])) <= 1
        chosen = order[issame[order] == kind]
        assert (np.diff(chosen) > 0).all()  # pairs of a kind stay in their order


def test_five_folds_of_lfws_form_become_ten_halves_of_them():
    issame = np.tile(np.arange(60) < 30, 5)
    order = interleaved_order(issame)
    assert (order // 30 // 2 == np.arange(300) // 60).all()
    assert order[:4].tolist() == [0, 30, 1, 31]


@pytest.mark.parametrize(
    ("same", "different", "rule"),
    [(9, 50, "9 same and 50 different pairs"), (50, 0, "50 same and 0"), (3, 4, "7 pairs cannot be cut into 10")],
)
def test_too_few_of_a_kind_are_an_error(same, different, rule):
    with pytest.raises(DataError, match=rule):
        interleaved_order(np.arange(same + different) < same)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (1, 2), (1, 7), (2, 5), (7, 8)])
def test_pair_subset_has_the_chosen_pairs(made_pairs, start, stop):
    path, images, issame = made_pairs
    order = np.array([7, 2, 2, 22])
    pairs = PairSubset(load_pairs(path), order)
    assert (len(pairs), pairs.name) == (4, "made")
    np.testing.assert_array_equal(pairs.issame, issame[order])
    expected = images.reshape(23, 2, 112, 112, 3)[order].reshape(8, 112, 112, 3)
    np.testing.assert_array_equal(pairs.images(start, stop), expected[start:stop])


# Where sets are found.


def test_sets_are_found_where_the_older_toolkit_has_them(tmp_path, made_pairs):
    places = {"LFW": "lfw_align_112/lfw", "CFP_FF": "cfp_align_112/cfp_ff", "CFP_FP": "cfp_align_112/cfp_fp"}
    for place in places.values():
        copy_set(made_pairs[0], tmp_path / "data" / place)
    found, missing = find_pair_sets(tmp_path / "data")
    assert [pairs.name for pairs in found] == list(places)
    assert missing == ["AgeDB"]
    assert [len(pairs) for pairs in found] == [23, 23, 23]


def copy_set(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    shutil.copy(source.parent / f"{source.name}_list.npy", target.parent / f"{target.name}_list.npy")


@pytest.mark.parametrize(
    ("name", "place"),
    [("CALFW", "calfw"), ("CPLFW", "cplfw_align_112/cplfw"), ("VGG2_FP", "vgg2_fp"), ("VGG2_FP", "vgg2_fp/vgg2_fp")],
)
def test_further_sets_are_found_by_their_published_names(tmp_path, made_pairs, name, place):
    copy_set(made_pairs[0], tmp_path / place)
    found, missing = find_pair_sets(tmp_path)
    assert [pairs.name for pairs in found] == [name]
    assert missing == ["LFW", "CFP_FF", "CFP_FP", "AgeDB"]  # the others are not expected


def test_further_bins_and_the_list_of_xqlfw_are_found(tmp_path, formats):
    for name in ("calfw", "cplfw", "vgg2_fp"):
        shutil.copy(formats / "set.bin", tmp_path / f"{name}.bin")
    shutil.copy(formats / "plain.txt", tmp_path / "xqlfw_pairs.txt")
    assert [pairs.name for pairs in find_pair_sets(tmp_path)[0]] == ["CALFW", "CPLFW", "VGG2_FP"]  # no images yet
    shutil.copytree(formats, tmp_path / "xqlfw_aligned_112")
    assert [pairs.name for pairs in find_pair_sets(tmp_path)[0]] == ["CALFW", "CPLFW", "VGG2_FP", "XQLFW"]


@pytest.mark.parametrize("place", ["AgeDB/agedb_30", "agedb_30/agedb_30", "agedb_30"])
def test_agedb_is_found_in_each_of_its_places(tmp_path, made_pairs, place):
    copy_set(made_pairs[0], tmp_path / "data" / place)
    found, missing = find_pair_sets(tmp_path / "data")
    assert [pairs.name for pairs in found] == ["AgeDB"]
    assert missing == ["LFW", "CFP_FF", "CFP_FP"]
    np.testing.assert_array_equal(found[0].images(3, 4), made_pairs[1][3:4])


def test_a_set_too_small_for_ten_folds_is_named(tmp_path, small):
    copy_set(small, tmp_path / "agedb_30")
    with pytest.raises(DataError, match=r"agedb_30: 2 pairs cannot be cut into 10 folds"):
        find_pair_sets(tmp_path)


def test_no_sets_are_no_error_but_a_broken_set_is(tmp_path, small):
    assert find_pair_sets(tmp_path / "data") == ([], ["LFW", "CFP_FF", "CFP_FP", "AgeDB"])
    copy_set(small, tmp_path / "data" / "lfw_align_112" / "lfw")
    (tmp_path / "data" / "lfw_align_112" / "lfw_list.npy").unlink()
    with pytest.raises(DataError, match="missing"):
        find_pair_sets(tmp_path / "data")


def test_bins_of_insightface_are_found_in_the_data_folder(tmp_path, formats):
    for name in ("lfw", "agedb_30"):
        shutil.copy(formats / "set.bin", tmp_path / f"{name}.bin")
    found, missing = find_pair_sets(tmp_path)
    assert [pairs.name for pairs in found] == ["LFW", "AgeDB"]
    assert missing == ["CFP_FF", "CFP_FP"]


def test_extra_sets_come_last_in_their_order(tmp_path, made_pairs, formats):
    copy_set(made_pairs[0], tmp_path / "agedb_30")
    named = {"z": (str(formats / "set.bin"), None), "a.b-c": (str(formats / "plain.txt"), None)}
    found, missing = find_pair_sets(tmp_path, named)
    assert [pairs.name for pairs in found] == ["AgeDB", "z", "a.b-c"]
    assert missing == ["LFW", "CFP_FF", "CFP_FP"]


def test_an_extra_set_replaces_a_set_in_the_data_folder(tmp_path, made_pairs, formats):
    copy_set(made_pairs[0], tmp_path / "lfw_align_112" / "lfw")
    copy_set(made_pairs[0], tmp_path / "agedb_30")
    (tmp_path / "lfw_align_112" / "lfw_list.npy").unlink()  # it is not even opened
    found, missing = find_pair_sets(tmp_path, {"lfw": (str(formats / "set.bin"), None)})
    assert [pairs.name for pairs in found] == ["AgeDB", "lfw"]
    assert missing == ["CFP_FF", "CFP_FP"]


def test_nothing_is_missing_if_there_are_only_extra_sets(tmp_path, formats):
    found, missing = find_pair_sets(tmp_path / "none", {"own": (str(formats / "lfw.txt"), str(formats))})
    assert ([pairs.name for pairs in found], missing) == (["own"], [])


def test_a_missing_or_unusable_extra_set_is_an_error(tmp_path, small):
    with pytest.raises(DataError, match="nowhere: no such verification set"):
        find_pair_sets(tmp_path / "data", {"own": (str(tmp_path / "nowhere"), None)})
    with pytest.raises(DataError, match="lfw: 2 pairs cannot be cut into 10 folds"):
        find_pair_sets(tmp_path / "data", {"own": (str(small), None)})


@pytest.mark.parametrize("kind", ["carray", "bin", "list"])
def test_a_set_in_blocks_is_interleaved_and_logged(tmp_path, formats, made_pairs, capsys, kind):
    _, images, issame = made_pairs
    blocks = np.argsort(~issame, kind="stable")  # all same pairs, then all different ones
    ordered = np.stack(list(iter_images(PairSubset(load_pairs(formats / "set.bin"), blocks))))
    if kind == "carray":
        write_carray(tmp_path / "set", ordered, issame[blocks])
    elif kind == "bin":
        (tmp_path / "set").write_bytes(pickle.dumps((list(ordered), issame[blocks].tolist())))
    else:
        lines = (formats / "plain.txt").read_text().splitlines(keepends=True)
        (tmp_path / "set").write_text("".join(lines[pair] for pair in blocks))
    assert load_pairs(tmp_path / "set", formats).issame.tolist() == issame[blocks].tolist()
    (pairs,), _ = find_pair_sets(tmp_path / "data", {"own": (str(tmp_path / "set"), str(formats))})
    assert capsys.readouterr().out.startswith(
        "own: some of the ten folds would contain only positive or only negative pairs"
    )
    contiguous_folds(pairs.issame, 10)
    order = blocks[interleaved_order(issame[blocks])]
    np.testing.assert_array_equal(pairs.images(0, 46), images.reshape(23, 2, 112, 112, 3)[order].reshape(images.shape))
