import math
import sys

import cv2
import numpy as np
import pytest
import torch

from util import transform


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def coordinates() -> np.ndarray:
    """Return (128, 128, 3) pixels: red is x, green is y, so a crop shows where it was cut."""
    x, y = np.meshgrid(np.arange(128), np.arange(128))
    return np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)


def check_close(ours: np.ndarray, reference: np.ndarray) -> None:
    """Check for at most 1 gray level on 99 % of the pixels, and never more than 3."""
    assert ours.dtype == np.uint8 and ours.shape == reference.shape
    difference = np.abs(ours.astype(int) - reference)
    assert (difference <= 1).mean() >= 0.99
    assert difference.max() <= 3


def test_eval_crop_and_degrade_equal_the_reference(golden, shared):
    expected = np.load(golden / "preprocess.npz")
    names = [key.removesuffix(".hr") for key in expected if key.endswith(".hr")]
    assert len(names) == 4
    for name in names:
        file = shared / "lfw" / "aligned_112" / name[: -len("_0001.jpg")] / name
        crop = transform.eval_crop(cv2.imread(str(file), cv2.IMREAD_COLOR_RGB))
        check_close(crop, expected[f"{name}.hr"])
        for scale in (2, 4, 8):
            check_close(transform.shrink(crop, 112 // scale), expected[f"{name}.lr_x{scale}.small"])
            check_close(transform.degrade(crop, 112 // scale), expected[f"{name}.lr_x{scale}"])


def pillow_bicubic(line: np.ndarray, size: int) -> list[int]:
    """Resample one line of gray levels, one output pixel at a time: Keys' kernel (1981) with a = -0.5."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.5
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    scale = len(line) / size
    stretch = max(scale, 1.0)
    out = []
    for index in range(size):
        center = (index + 0.5) * scale
        weights = [kernel((pixel + 0.5 - center) / stretch) for pixel in range(len(line))]
        value = sum(weight * int(level) for weight, level in zip(weights, line, strict=True)) / sum(weights)
        out.append(min(255, max(0, math.floor(value + 0.5))))
    return out


@pytest.mark.parametrize(("before", "after"), [(16, 5), (16, 8), (7, 15), (5, 3)])
def test_shrink_equals_a_slow_loop(before, after):
    image = noise(before, before, 3)
    image[: before // 2] = np.where(image[: before // 2] < 128, 0, 255)  # overshoots, and must be clipped
    wide = np.stack([[pillow_bicubic(row[:, c], after) for row in image] for c in range(3)], axis=-1)
    expected = np.stack([[pillow_bicubic(col, after) for col in wide[:, :, c].T] for c in range(3)], axis=-1)
    ours = transform.shrink(image, after).astype(int)
    difference = np.abs(ours - expected.transpose(1, 0, 2))
    assert difference.max() <= 1  # a tie may be rounded the other way
    assert (difference == 0).mean() > 0.99


def test_degrade_shrinks_and_enlarges_and_keeps_flat_color():
    image = noise(112, 112, 3)
    small = transform.shrink(image, 28)
    assert small.shape == (28, 28, 3)
    np.testing.assert_array_equal(transform.degrade(image, 28), transform.shrink(small, 112))
    flat = np.full((112, 112, 3), (10, 128, 250), np.uint8)
    np.testing.assert_array_equal(transform.degrade(flat, 14), flat)


def test_degrade_needs_no_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)  # an import of it would now fail
    assert transform.degrade(noise(112, 112, 3), 28).shape == (112, 112, 3)


@pytest.mark.parametrize("change", [transform.eval_crop, lambda images: transform.degrade(images, 28)])
def test_batch_equals_its_images_one_by_one(change):
    images = noise(5, 112, 112, 3)
    before = images.copy()
    np.testing.assert_array_equal(change(images), np.stack([change(image) for image in images]))
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("size", [112, 250])
def test_eval_crop_is_the_center_of_128(size):
    image = noise(size, size, 3)
    expected = cv2.resize(image, (128, 128), interpolation=cv2.INTER_LINEAR)[8:120, 8:120]
    np.testing.assert_array_equal(transform.eval_crop(image), expected)


def test_normalize_maps_every_level_and_keeps_the_color_order():
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    images[0, :, :, 0] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    images[1, :, :, 2] = 255
    before = images.clone()
    out = transform.normalize(images)
    assert out.shape == (2, 3, 16, 16) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out[0, 0].flatten(), torch.arange(256) / 127.5 - 1, atol=1e-6, rtol=0)
    assert out.amin() == -1 and out.amax() == 1
    assert [out[1, color, 3, 4].item() for color in range(3)] == [-1, -1, 1]
    assert torch.equal(images, before)


def test_train_crop_covers_every_window_and_both_flips():
    lefts, tops, flips = set(), set(), 0
    for seed in range(300):
        crop = transform.train_crop(coordinates(), np.random.default_rng(seed))
        assert crop.shape == (112, 112, 3)
        flipped = crop[0, 0, 0] > crop[0, 1, 0]
        unflipped = crop[:, ::-1] if flipped else crop
        left, top = (int(value) for value in unflipped[0, 0, :2])
        np.testing.assert_array_equal(unflipped, coordinates()[top : top + 112, left : left + 112])
        lefts.add(left)
        tops.add(top)
        flips += flipped
    assert lefts == tops == set(range(17))
    assert 110 < flips < 190


def test_train_crop_resizes_to_128_first():
    image = noise(112, 112, 3)
    resized = cv2.resize(image, (128, 128), interpolation=cv2.INTER_LINEAR)
    crop = transform.train_crop(image, np.random.default_rng(1))
    windows = np.lib.stride_tricks.sliding_window_view(resized[:, :, 0], (112, 112))  # (17, 17, 112, 112)
    assert any((windows == each[:, :, 0]).all(axis=(2, 3)).any() for each in (crop, crop[:, ::-1]))


def test_full_crop_shows_all_of_the_image():
    image = noise(112, 112, 3)
    mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]  # as some readers give it, with a negative stride
    batch = transform.full_crop(np.stack([image, image])[:, :, ::-1])
    assert batch.flags.c_contiguous
    np.testing.assert_array_equal(batch[1], image[:, ::-1])
    np.testing.assert_array_equal(transform.full_crop(mirrored), image)
    large = np.kron(image, np.ones((2, 2, 1), np.uint8))
    np.testing.assert_array_equal(transform.full_crop(large), image)


def test_train_full_shows_all_and_flips_half():
    image = noise(112, 112, 3)
    outs = [transform.train_full(image, np.random.default_rng(seed)) for seed in range(200)]
    flipped = [np.array_equal(out, image[:, ::-1]) for out in outs]
    assert 70 < sum(flipped) < 130
    assert all(is_flipped or np.array_equal(out, image) for out, is_flipped in zip(outs, flipped, strict=True))


def test_train_warp_of_whole_faces_is_smaller():
    # A bright disc in a dark image: its area in the output is the square of the scale.
    y, x = np.mgrid[:112, :112] - 55.5
    disc = np.repeat(np.where(np.hypot(x, y) < 20, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)
    areas = []
    for whole in (False, True):
        outs = [transform.train_warp(disc, np.random.default_rng(seed), whole) for seed in range(200)]
        areas.append([(out.max(2) > 127).sum() for out in outs])
    assert np.median(np.divide(areas[1], areas[0])) == pytest.approx((112 / 128) ** 2, abs=0.02)


@pytest.mark.parametrize("augment", [transform.train_crop, transform.train_full, transform.train_warp])
@pytest.mark.parametrize("size", [112, 160])
def test_augmentation_repeats_with_its_generator_and_keeps_input(augment, size):
    image = noise(size, size, 3)
    before = image.copy()
    outs = [augment(image, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert all(out.shape == (112, 112, 3) and out.dtype == np.uint8 for out in outs)
    np.testing.assert_array_equal(outs[0], outs[1])
    assert (outs[0] != outs[2]).mean() > 0.5
    for seed in range(30):
        augment(image, np.random.default_rng(seed))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("size", [112, 224])
def test_train_warp_is_centered_on_the_image(size):
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    blob = 60 + 150 * np.exp(-(x**2 + y**2) / 0.1)  # in the middle of a darker picture
    image = np.repeat(blob[:, :, None], 3, axis=2).astype(np.uint8)
    outs = np.stack([transform.train_warp(image, np.random.default_rng(seed)) for seed in range(300)])
    average = outs.mean(axis=(0, 3))
    plain = cv2.resize(image, (112, 112), interpolation=cv2.INTER_AREA)[:, :, 0]
    assert np.corrcoef(average.ravel(), plain.ravel())[0, 1] > 0.97
    assert abs(average.mean() - plain.mean()) < 12
    weights = np.clip(average - np.percentile(average, 60), 0, None)
    rows, columns = np.mgrid[:112, :112]
    assert abs((weights * rows).sum() / weights.sum() - 55.5) < 1.5
    assert abs((weights * columns).sum() / weights.sum() - 55.5) < 1.5


def test_train_warp_flips_half_of_the_images():
    image = np.zeros((112, 112, 3), np.uint8)
    image[:, 56:] = 200
    brighter_left = [
        warped[:, :40].mean() > warped[:, 72:].mean()
        for warped in (transform.train_warp(image, np.random.default_rng(seed)) for seed in range(300))
    ]
    assert 110 < sum(brighter_left) < 190


def test_color_jitter_is_centered_on_the_colors():
    image = noise(112, 112, 3)
    grays, averages = 0, []
    for seed in range(400):
        out = transform._jitter_color(image, np.random.default_rng(seed))
        assert out.shape == image.shape and out.dtype == np.uint8
        grays += (np.ptp(out.astype(int), axis=2) <= 1).all()
        averages.append(out.mean(axis=(0, 1)))
    assert 30 < grays < 90  # 15 %
    averages = np.array(averages)
    assert (np.abs(averages.mean(axis=0) - image.mean(axis=(0, 1))) < 3).all()
    assert (averages.std(axis=0) > 8).all()


def test_color_jitter_equals_its_steps_one_by_one():
    image = noise(112, 112, 3) // 4 + 96  # no value is clipped in between
    for seed in range(20):
        rng = np.random.default_rng(seed)
        overall, *balance = rng.random(4)
        contrast = (0.7 + 0.6 * overall) * (0.9 + 0.2 * np.array(balance))
        changed = (image - 127.5) * contrast + 127.5 + rng.uniform(-30, 30)
        color = 0.0 if rng.random() < 0.15 else rng.uniform(0.6, 1.2)
        gray = changed @ [0.299, 0.587, 0.114]
        expected = np.clip(color * changed + (1 - color) * gray[:, :, None], 0, 255)
        out = transform._jitter_color(image, np.random.default_rng(seed))
        assert np.abs(out - expected).max() < 1.01  # OpenCV rounds the matrix to 1/1024, and then the levels
