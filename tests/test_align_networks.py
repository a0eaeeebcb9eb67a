"""Compare MTCNN's networks with a slow numpy version in Keras' layout."""

import numpy as np
import pytest
import torch

from applications.align import networks, pyramid
from applications.align.weights import load_weights


def convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Convolve (H, W, in) with (h, w, in, out): no padding, stride 1."""
    h, w = kernel.shape[:2]
    rows, columns = x.shape[0] - h + 1, x.shape[1] - w + 1
    windows = [
        [np.tensordot(x[i : i + h, j : j + w], kernel, axes=3) + bias for j in range(columns)] for i in range(rows)
    ]
    return np.array(windows)


def pool(x: np.ndarray, size: int, same: bool) -> np.ndarray:
    """Pool with stride 2. Keras' "same": windows start at even pixels, and the last ones exceed the edge."""
    count = [-(-side // 2) if same else (side - size) // 2 + 1 for side in x.shape[:2]]
    return np.array(
        [[x[2 * i : 2 * i + size, 2 * j : 2 * j + size].max((0, 1)) for j in range(count[1])] for i in range(count[0])]
    )


def prelu(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, x * slope.reshape(-1))


def run(name: str, x: np.ndarray, pools: dict[int, tuple[int, bool]]) -> list[np.ndarray]:
    """Run the network on one image (H, W, 3) and return its outputs. `pools`: {number of the convolution: pool}."""
    layers, convolutions = load_weights(name), 0
    while len(layers) > 6:
        kernel, bias, slope, *layers = layers
        if kernel.ndim == 4 and kernel.shape[:2] != (1, 1):
            x = prelu(convolve(x, kernel, bias), slope)
            convolutions += 1
            if convolutions in pools:
                x = pool(x, *pools[convolutions])
        elif kernel.ndim == 2:
            x = prelu(x.transpose(1, 0, 2).reshape(-1) @ kernel + bias, slope)  # Keras' networks flatten (W, H, C)
            break
        else:
            layers = [kernel, bias, slope, *layers]
            break
    return [x @ layers[i].reshape(-1, layers[i].shape[-1]) + layers[i + 1] for i in range(0, len(layers), 2)]


@pytest.fixture
def noise():
    def make(height: int, width: int) -> np.ndarray:
        return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make


def as_float(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float64) - 127.5) / 128


def torch_run(network: type, pixels: np.ndarray) -> list[np.ndarray]:
    module = networks.build(network, torch.device("cpu"))
    return [out[0].numpy() for out in module(networks.normalize(torch.from_numpy(pixels)[None]))]


def test_normalize_centers_and_scales_pixels():
    values = networks.normalize(torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8))
    np.testing.assert_allclose(values.flatten(), [-127.5 / 128, -0.5 / 128, 127.5 / 128])


@pytest.mark.parametrize(("height", "width"), [(12, 12), (20, 34), (13, 17)])
def test_proposal_net_matches_keras_layout(noise, height, width):
    pixels = noise(height, width)
    offsets, classes = run("pnet", as_float(pixels), {1: (2, True)})
    logit, moved = torch_run(networks.ProposalNet, pixels)
    assert logit.shape == classes.shape[:2]
    np.testing.assert_allclose(logit, classes[..., 1] - classes[..., 0], atol=1e-4)
    np.testing.assert_allclose(moved, offsets, atol=1e-4)


def test_refinement_net_matches_keras_layout(noise):
    pixels = noise(24, 24)
    offsets, classes = run("rnet", as_float(pixels), {1: (3, True), 2: (3, False)})
    logit, moved = torch_run(networks.RefinementNet, pixels)
    np.testing.assert_allclose(logit, classes[1] - classes[0], atol=1e-4)
    np.testing.assert_allclose(moved, offsets, atol=1e-4)


def test_output_net_matches_keras_layout(noise):
    pixels = noise(48, 48)
    offsets, points, classes = run("onet", as_float(pixels), {1: (3, True), 2: (3, False), 3: (2, True)})
    logit, moved, landmarks = torch_run(networks.OutputNet, pixels)
    np.testing.assert_allclose(logit, classes[1] - classes[0], atol=1e-4)
    np.testing.assert_allclose(moved, offsets, atol=1e-4)
    np.testing.assert_allclose(landmarks, np.stack([points[:5], points[5:]], axis=1), atol=1e-4)


def test_fill_refuses_weights_of_another_shape(monkeypatch):
    arrays = load_weights("rnet")
    monkeypatch.setattr(networks, "load_weights", lambda name: [*arrays[:3], arrays[3][:, :, :-1], *arrays[4:]])
    with pytest.raises(ValueError, match="weights of shape"):
        networks.RefinementNet()


def test_proposal_net_sees_pieces_like_the_full_level(noise):
    """Check that every window of the level is in exactly one piece, with the same output."""
    pixels = noise(800, 1100)
    whole = torch_run(networks.ProposalNet, pixels)[0]
    module, margin = networks.build(networks.ProposalNet, torch.device("cpu")), 10
    placed = pyramid.pack(pyramid.cut(0, 0, 1.0, size=pixels.shape[:2], overlap=margin))
    assert len(placed) == 6
    canvases = pyramid.paint([pixels], placed)
    answers = [module(networks.normalize(torch.from_numpy(canvas)[None]))[0][0].numpy() for canvas in canvases]
    together = np.full(whole.shape, np.nan, np.float32)
    for piece, place in placed:
        rows, columns = (piece.height - margin) // 2, (piece.width - margin) // 2
        window = answers[place.canvas][place.top // 2 :, place.left // 2 :][:rows, :columns]
        target = together[piece.top // 2 :, piece.left // 2 :][:rows, :columns]
        assert np.isnan(target).all()
        target[:] = window
    np.testing.assert_allclose(together, whole, atol=1e-4)
