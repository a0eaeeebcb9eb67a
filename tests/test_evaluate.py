from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from util.errors import DataError, UsageError
from util.evaluate import _read_ahead, average_accuracy, embed, evaluate, recovered_fraction
from util.pairs import load_pairs
from util.pairs.bcolz import write_carray
from util.transform import degrade, eval_crop, shrink
from util.verification import verify


class Projection(nn.Module):
    """A fixed projection of a coarse view, (N, 3, 112, 112) -> (N, 8), that records its inputs."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(8, 3 * 7 * 7, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(weight)
        self.seen: list[torch.Tensor] = []
        self.modes: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.clone())
        self.modes.append(self.training)
        return nn.functional.adaptive_avg_pool2d(images, 7).flatten(1) @ self.weight.T


class MadePairs:
    """A verification set in memory."""

    def __init__(self, images: np.ndarray, issame: np.ndarray, name: str = "made"):
        self.name, self.issame, self._images = name, issame, images

    def __len__(self) -> int:
        return len(self.issame)

    def images(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self._images)
        return self._images[start:stop]


def as_input(images: np.ndarray) -> torch.Tensor:
    """Turn (n, 112, 112, 3) uint8 into the network's input, the slow way."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float64) / 127.5 - 1).float()


def test_evaluate_is_independent_of_the_batch_size(made_pairs):
    path, images, issame = made_pairs
    pairs = load_pairs(path)
    assert len(images) % 64 and len(images) % 7
    backbone = Projection()
    results = {size: evaluate(backbone, [pairs], batch_size=size)["HR"]["made"] for size in (64, 7, 46, 1)}
    crops = eval_crop(images)
    vectors, norms = [], []
    for crop in crops:
        both = [as_input(flipped[None])[0] for flipped in (crop, crop[:, ::-1])]
        summed = sum(backbone(one[None])[0].detach().double() for one in both)
        vectors.append((summed / summed.norm()).numpy())
        norms.append(float((summed / 2).norm()))
    expected = verify(np.array(vectors), issame)
    for result in results.values():
        np.testing.assert_allclose(result.norms, norms, rtol=1e-5)
        np.testing.assert_allclose(result.distances, expected.distances, atol=1e-5)
        assert result.accuracy == expected.accuracy
        np.testing.assert_array_equal(result.fold_accuracies, expected.fold_accuracies)
        assert result.images_per_second > 0
    assert len(expected.distances) == 23


def test_embed_normalizes_the_sum_of_image_and_mirror_image():
    images = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)
    backbone = Projection()
    vectors = embed(backbone, images)
    assert vectors.shape == (5, 8)
    straight, mirrored = backbone(as_input(images)), backbone(as_input(images[:, :, ::-1]))
    summed = (straight + mirrored).detach()
    torch.testing.assert_close(vectors, summed / summed.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(embed(backbone, images[:, :, ::-1].copy()), vectors, atol=1e-5, rtol=0)
    assert (vectors - straight / straight.norm(dim=1, keepdim=True)).abs().max() > 1e-2


def test_network_sees_rgb_whatever_the_disk_holds(tmp_path):
    red = np.zeros((40, 112, 112, 3), np.uint8)
    red[..., 0] = 255
    write_carray(tmp_path / "red", red, np.arange(20) % 2 == 0)
    backbone = Projection()
    evaluate(backbone, [load_pairs(tmp_path / "red")], batch_size=16)
    assert len(backbone.seen) == 6
    for seen in backbone.seen:
        assert (seen[:, 0] == 1).all() and (seen[:, 1:] == -1).all()


@pytest.mark.parametrize(("crop", "cut"), [("128", eval_crop), ("whole", lambda images: images)])
def test_views_show_the_crop_and_the_degraded_crop(made_pairs, crop, cut):
    path, images, _ = made_pairs
    backbone = Projection()
    results = evaluate(backbone, [load_pairs(path)], batch_size=20, views=("HR", "LR"), lr_scale=8, crop=crop)
    assert list(results) == ["HR", "LR"]
    crops = cut(images)
    seen = [torch.cat(backbone.seen[kind::4]) for kind in range(4)]  # HR, HR mirrored, LR, LR mirrored
    for found, expected in zip(seen[::2], (crops, degrade(crops, 14)), strict=True):
        torch.testing.assert_close(found, as_input(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[3], seen[2].flip(3))
    distances = [results[view]["made"].distances for view in ("HR", "LR")]
    assert np.abs(distances[0] - distances[1]).max() > 1e-4


def test_evaluate_returns_each_set_and_average_is_their_mean(made_pairs):
    _, images, issame = made_pairs
    easy = images.copy()
    easy[1::2][~issame] = 255 - easy[0::2][~issame]
    swapped = MadePairs(easy, ~issame, "swapped")  # same pairs are called different
    results = evaluate(Projection(), [MadePairs(easy, issame), swapped])["HR"]
    assert list(results) == ["made", "swapped"]
    assert results["made"].accuracy == 1.0
    assert results["swapped"].accuracy < 0.7
    assert average_accuracy(results) == pytest.approx((1.0 + results["swapped"].accuracy) / 2)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_restores_the_mode_of_the_network(made_pairs, training):
    _, images, issame = made_pairs
    backbone = Projection().train(training)
    evaluate(backbone, [MadePairs(images, issame)])
    assert backbone.training is training
    assert not any(backbone.modes)
    with pytest.raises(DataError, match="only same pairs"):
        evaluate(backbone, [MadePairs(images, np.ones(23, bool))])
    assert backbone.training is training


def test_evaluate_raises_an_error_of_the_reader(made_pairs):
    _, images, issame = made_pairs

    class Broken(MadePairs):
        def images(self, start: int, stop: int) -> np.ndarray:
            raise DataError("chunk cut short")

    with pytest.raises(DataError, match="chunk cut short"):
        evaluate(Projection(), [Broken(images, issame)])


def test_embed_keeps_no_gradients(made_pairs):
    backbone = Projection()
    assert not embed(backbone, made_pairs[1][:2]).requires_grad


def test_unknown_view_is_a_usage_error():
    with pytest.raises(UsageError, match=r"view 'XR': unknown. Known are HR, LR, SR"):
        evaluate(Projection(), [], views=("HR", "XR"))


class Nearest(nn.Module):
    """Enlarges by repeating pixels, and overshoots like networks do: above 1 where the image is bright."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale, self.batches = scale, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.min() >= 0 and images.max() <= 1
        self.batches.append(len(images))
        return images.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3) * 4 - 1.5


def test_sr_view_enlarges_batches_and_is_clipped(made_pairs):
    path, images, _ = made_pairs
    backbone, network = Projection(), Nearest(4)
    views = {"views": ("HR", "LR", "SR"), "lr_scale": 4, "super_resolution": {4: network}}
    results = evaluate(backbone, [load_pairs(path)], batch_size=20, **views)
    assert list(results) == ["HR", "LR", "SR"]
    assert network.batches == [20, 20, 6]
    small = shrink(eval_crop(images), 28).astype(np.float64) / 255
    expected = np.clip(small.repeat(4, 1).repeat(4, 2) * 4 - 1.5, 0, 1) * 2 - 1
    found = torch.cat(backbone.seen[4::6])  # HR, HR mirrored, LR, LR mirrored, SR, SR mirrored
    assert found.min() == -1 and found.max() == 1
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, atol=1 / 127)


def test_each_scale_is_a_view_and_hr_is_embedded_once(made_pairs):
    path, images, issame = made_pairs
    backbone = Projection()
    networks = {scale: Nearest(scale) for scale in (2, 8)}
    results = evaluate(
        backbone, [load_pairs(path)], views=("HR", "LR", "SR"), lr_scale=(2, 8), super_resolution=networks
    )
    assert list(results) == ["HR", "LRx2", "LRx8", "SRx2", "SRx8"]
    assert len(backbone.seen) == 5 * 2
    for view, scale in (("LRx2", 2), ("LRx8", 8)):
        alone = evaluate(Projection(), [MadePairs(images, issame, "made")], views=("LR",), lr_scale=scale)["LR"]["made"]
        np.testing.assert_allclose(results[view]["made"].distances, alone.distances, atol=1e-5)


@pytest.mark.parametrize("batch_size", [64, 7, 1])
def test_first_image_only_leaves_the_second_at_full_resolution(made_pairs, batch_size):
    _, images, issame = made_pairs
    views = {"views": ("HR", "LR"), "lr_scale": 8, "batch_size": batch_size}
    result = evaluate(Projection(), [MadePairs(images, issame)], first_image_only=True, **views)
    crops = eval_crop(images)
    mixed = crops.copy()
    mixed[::2] = degrade(crops[::2], 14)
    vectors = embed(Projection(), mixed).numpy().astype(np.float64)
    expected = ((vectors[::2] - vectors[1::2]) ** 2).sum(axis=1)
    np.testing.assert_allclose(result["LR"]["made"].distances, expected, atol=1e-5)
    both = evaluate(Projection(), [MadePairs(images, issame)], **views)
    for side, view in ((0, "LR"), (1, "HR")):
        expected_norms = both[view]["made"].norms[side::2]
        np.testing.assert_allclose(result["LR"]["made"].norms[side::2], expected_norms, rtol=1e-5)
    np.testing.assert_allclose(result["HR"]["made"].distances, both["HR"]["made"].distances, atol=1e-6)
    assert np.abs(result["LR"]["made"].distances - both["LR"]["made"].distances).max() > 1e-4


def test_first_image_only_needs_the_view_hr():
    with pytest.raises(UsageError, match=r"the view HR\. Add this view"):
        evaluate(Projection(), [], views=("LR",), first_image_only=True)


def test_recovered_fraction_is_none_for_a_loss_within_noise():
    high, low, enlarged = (SimpleNamespace(accuracy=accuracy, pairs=600) for accuracy in (0.90, 0.80, 0.85))
    assert recovered_fraction(high, low, enlarged) == pytest.approx(0.5)
    assert recovered_fraction(high, low, low) == 0
    assert recovered_fraction(high, low, SimpleNamespace(accuracy=0.75, pairs=600)) == pytest.approx(-0.5)
    near = SimpleNamespace(accuracy=0.90 - 0.99 * (0.888 * 0.112 / 600) ** 0.5, pairs=600)  # about one standard error
    assert recovered_fraction(high, near, enlarged) is None
    assert recovered_fraction(low, high, enlarged) is None


@pytest.mark.parametrize("readers", [1, 3, 9])
def test_read_ahead_keeps_the_order(made_pairs, readers):
    pairs = load_pairs(made_pairs[0])
    batches = list(_read_ahead(pairs, 7, readers))
    assert [len(batch) for batch in batches] == [7] * 6 + [4]
    np.testing.assert_array_equal(np.concatenate(batches), eval_crop(made_pairs[1]))


def test_read_ahead_raises_an_error_in_its_place(made_pairs):
    pairs = load_pairs(made_pairs[0])
    read, asked = pairs.images, []

    def images(start: int, stop: int) -> np.ndarray:
        asked.append(start)
        if start == 14:
            raise DataError("image 14: broken")
        return read(start, stop)

    pairs.images = images
    batches = _read_ahead(pairs, 7, readers=2)
    assert [len(next(batches)) for _ in range(2)] == [7, 7]
    with pytest.raises(DataError, match="image 14: broken"):
        next(batches)
    assert len(asked) <= 5  # of 7: the other batches are not read in vain
