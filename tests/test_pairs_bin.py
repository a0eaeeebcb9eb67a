"""InsightFace's .bin: every style in which it is written, and files that are damaged or hostile."""

import os
import pickle
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from util.errors import DataError
from util.pairs import load_pairs

ISSAME = [True, False, False]


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Six images of noise, (6, 112, 112, 3) RGB uint8."""
    return np.random.default_rng(8).integers(0, 256, (6, 112, 112, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoded(pixels) -> list[bytes]:
    return [png(image) for image in pixels]


@pytest.fixture
def write(tmp_path):
    """write(content, protocol) -> the path of a .bin."""

    def write_bin(content: object, protocol: int = 4, name: str = "lfw.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path

    return write_bin


def python2(images: list[bytes], issame: list[bool], binary: bool) -> bytes:
    """What pickle.dump((images, issame), …) of Python 2 writes, in the protocol 2 or 0."""
    if binary:
        strings = b"".join(b"T" + len(image).to_bytes(4, "little") + image for image in images)
        return b"\x80\x02](" + strings + b"e](" + b"".join(b"\x88" if same else b"\x89" for same in issame) + b"e\x86."
    strings = b"".join(b"S'" + "".join(f"\\x{byte:02x}" for byte in image).encode() + b"'\na" for image in images)
    return b"((lp0\n" + strings + b"(lp1\n" + b"".join(b"I%02d\na" % same for same in issame) + b"tp2\n."


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("style", ["bytes", "array", "column", "pixels", "columns of pixels"])
def test_bin_every_style_gives_the_same_pixels(write, pixels, encoded, protocol, style):
    flat = [np.frombuffer(image, np.uint8) for image in encoded]
    styles = {
        "bytes": encoded,
        "array": flat,
        "column": [array[:, None] for array in flat],  # what cv2.imencode of older versions gave
        "pixels": list(pixels),
        "columns of pixels": [np.asfortranarray(image) for image in pixels],
    }
    pairs = load_pairs(write((styles[style], ISSAME), protocol))
    assert (pairs.name, len(pairs), pairs.issame.dtype, pairs.issame.tolist()) == ("lfw", 3, bool, ISSAME)
    read = pairs.images(0, 6)
    assert read.dtype == np.uint8 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, pixels)
    np.testing.assert_array_equal(pairs.images(3, 5), pixels[3:5])
    assert pairs.images(2, 2).shape == (0, 112, 112, 3)


@pytest.mark.parametrize("binary", [True, False])
def test_bin_files_of_python_2_are_read(write, pixels, encoded, binary):
    content = python2(encoded, ISSAME, binary)
    if not binary:
        assert pickle.loads(content, encoding="bytes") == (encoded, ISSAME)
    pairs = load_pairs(write(content))
    assert pairs.issame.tolist() == ISSAME
    np.testing.assert_array_equal(pairs.images(0, 6), pixels)


@pytest.mark.parametrize(
    "issame",
    [
        [1, 0, 0],
        (True, False, False),
        [np.bool_(True), np.bool_(False), np.bool_(False)],
        [np.int64(1), np.int32(0), np.uint8(0)],
        np.array([True, False, False]),
        np.array([1, 0, 0]),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_bin_every_kind_of_boolean_is_read(write, encoded, issame, protocol):
    pairs = load_pairs(write([tuple(encoded), issame], protocol))
    assert pairs.issame.dtype == bool and pairs.issame.tolist() == ISSAME


def test_bin_long_array_of_booleans_is_read(write, encoded):
    issame = np.arange(300) % 3 == 0  # more bytes than are kept in memory
    pairs = load_pairs(write(([encoded[0]] * 600, issame)))
    np.testing.assert_array_equal(pairs.issame, issame)


def test_bin_name_on_the_disk_makes_no_difference(write, encoded, pixels):
    pairs = load_pairs(write((encoded, ISSAME), name="cfp_fp.txt"))
    assert pairs.name == "cfp_fp"
    np.testing.assert_array_equal(pairs.images(1, 2), pixels[1:2])


@pytest.mark.parametrize("name", ["lfw.bin", "lfw_py2.bin", "lfw_ndarray.bin"])
def test_bin_sets_of_another_project_hold_the_listed_images(shared, name):
    folder = shared / "formats" / "bin"
    rows = [line.split() for line in (folder / "pairs.txt").read_text().splitlines()]
    pairs = load_pairs(folder / name)
    assert pairs.issame.tolist() == [row[2] == "1" for row in rows]
    names = [name for row in rows for name in row[:2]]
    for index in (0, 1, 118, 239):
        file = shared / "lfw" / "aligned_112" / f"{names[index]}.jpg"
        expected = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(pairs.images(index, index + 1)[0], expected)


# --- Damaged, and hostile.


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda images, issame: (images, issame, 1), "not a list of images and a list of booleans"),
        (lambda images, issame: {"images": images}, r"not a pickle of plain data \(the opcode \w+ is not allowed"),
        (lambda images, issame: images, "not a list of images and a list of booleans"),
        (lambda images, issame: [b"".join(images)], "not a list of images and a list of booleans"),
        (lambda images, issame: (issame, images), "its second part must be a list of one True or False a pair"),
        (lambda images, issame: ([], []), "its second part must be a list"),
        (lambda images, issame: ([], issame), "its first part is not a list of images"),
        (lambda images, issame: (images, None), "its second part must be a list"),
        (lambda images, issame: (images, [True, False, 2]), r".*entry 2 \(from 0\) is something else"),
        (lambda images, issame: (images, [True, None, False]), r".*entry 1 \(from 0\) is something else"),
        (lambda images, issame: (images, np.zeros((3, 1), bool)), "its second part must be a list"),
        (lambda images, issame: (images, np.array([0.0, 0.5, 1.0])), r".*entry 0 \(from 0\) is something else"),
        (lambda images, issame: (images[:-1], issame), "5 images for 3 pairs"),
        (lambda images, issame: (images, issame[:-1]), "6 images for 2 pairs"),
        (lambda images, issame: ([*images[:4], None, images[5]], issame), r"image 4 \(from 0\): neither the bytes"),
        (lambda images, issame: ([*images[:4], "text", images[5]], issame), r"image 4 \(from 0\): neither the bytes"),
        (lambda images, issame: (["", *images[1:]], issame), r"image 0 \(from 0\): neither the bytes"),
        (lambda images, issame: ([b"", *images[1:]], issame), r"image 0 \(from 0\): empty"),
        (lambda images, issame: ([b"x" * 999, *images[1:]], issame), r"image 0 \(from 0\): not an image that can be"),
        (lambda images, issame: ([*images[:5], images[5][:-9]], issame), r"image 5 \(from 0\): not an image that can"),
        (
            lambda images, issame: ([*images[:5], np.zeros((112, 96, 3), "u1")], issame),
            r"image 5 .*96x112 pixels.*112x112",
        ),
        (
            lambda images, issame: ([*images[:5], np.zeros((3, 112, 112), "u1")], issame),
            r"image 5 .*shape \(3, 112, 112\)",
        ),
        (lambda images, issame: ([*images[:5], np.zeros((112, 112, 3), "f4")], issame), r"image 5 .*array of float32"),
        (lambda images, issame: ([*images[:5], np.zeros((), "u1")], issame), r"image 5 "),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_bin_without_a_verification_set_is_refused(write, encoded, change, rule, protocol):
    with pytest.raises(DataError, match=rf"lfw\.bin: {rule}") as caught:
        load_pairs(write(change(encoded, ISSAME), protocol))
    assert "\n" not in str(caught.value)


def test_bin_images_of_another_size_are_refused(write):
    image = png(np.zeros((112, 96, 3), np.uint8))
    with pytest.raises(DataError, match=r"image 0 \(from 0\): 96x112 pixels.*Align or resize its images first"):
        load_pairs(write(([image] * 6, ISSAME)))


def test_bin_large_set_is_not_decoded_when_it_is_opened(write, pixels):
    images = [np.array(pixels[0]) for _ in range(1000)]  # 37 kB each
    path = write((images, [True] * 500))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        pairs = load_pairs(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(pairs) == 500 and kept < 1.1 * size and peak < 3.5 * size


@pytest.mark.parametrize("style", ["bytearray", "array"])
def test_bin_one_image_listed_many_times_takes_no_memory(write, encoded, style):
    content = encoded[0] + b"0" * 1_000_000
    image = bytearray(content) if style == "bytearray" else np.frombuffer(content, np.uint8)
    path = write(([image] * 10_000, [True] * 5_000), protocol=5)
    tracemalloc.start()
    try:
        pairs = load_pairs(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(pairs) == 5_000 and peak < 20_000_000


def test_bin_broken_image_is_named_when_it_is_read(write, encoded, pixels):
    broken = encoded[:3] + [encoded[3][:200] + b"\0" * 300] + encoded[4:]
    pairs = load_pairs(write((broken, ISSAME)))
    np.testing.assert_array_equal(pairs.images(0, 3), pixels[:3])
    with pytest.raises(DataError, match=r"lfw\.bin: image 3 \(from 0\): not an image"):
        pairs.images(2, 5)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_bin_file_cut_short_is_refused(write, encoded, protocol):
    content = pickle.dumps((encoded, ISSAME), protocol)
    for end in [8, 100, len(content) // 2, len(content) - 1]:
        with pytest.raises(DataError, match=r"lfw\.bin: not a pickle of plain data .*Copy or download the file again"):
            load_pairs(write(content[:end]))


def test_bin_pairs_needs_no_file_after_it_is_opened(write, encoded, pixels):
    path = write((encoded, ISSAME))
    pairs = load_pairs(path)
    path.unlink()
    np.testing.assert_array_equal(pairs.images(1, 4), pixels[1:4])


def test_bin_pairs_decodes_only_what_is_asked(write, encoded, pixels, monkeypatch):
    pairs = load_pairs(write((encoded, ISSAME)))
    decoded = []
    monkeypatch.setattr("util.pairs.bin.decode_pair_image", lambda data, where: decoded.append(data) or pixels[0])
    pairs.images(2, 4)
    assert decoded == encoded[2:4]


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["whole", "image", "truth", "object array", "dtype"])
def test_bin_hostile_set_is_refused_and_nothing_is_run(write, tmp_path, encoded, place, protocol):
    marker = tmp_path / "was_run"
    call = Call(os.system, f"touch {marker}")
    contents = {
        "whole": call,
        "image": ([call, *encoded[1:]], ISSAME),
        "truth": (encoded, [*ISSAME[1:], call]),
        "object array": ([np.array([call], object), *encoded[1:]], ISSAME),
        "dtype": ([np.zeros(3, [("a", "O")]), *encoded[1:]], ISSAME),
    }
    path = write(contents[place], protocol)
    with pytest.raises(DataError, match=r"lfw\.bin: (wants to use '(posix|nt)\.system'|not a pickle of plain data)"):
        load_pairs(path)
    assert not marker.exists()
    if place == "whole":
        pickle.loads(path.read_bytes())
        assert marker.exists()  # it would have been
