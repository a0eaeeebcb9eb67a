"""RCAN against the public implementation."""

import json
import zlib

import numpy as np
import pytest
import torch

from model.super_resolution import RCAN

SMALL = {"num_features": 16, "num_rg": 2, "num_rcab": 2, "reduction": 4}


def fill(network: torch.nn.Module) -> None:
    """Fill the weights with noise seeded by each key, as for the reference numbers."""
    state = network.state_dict()
    for key, tensor in state.items():
        noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tensor.shape).astype(np.float32)
        factor = 0.1 if tensor.ndim == 1 else 0.5 * np.sqrt(1 / np.prod(tensor.shape[1:]))
        state[key] = torch.from_numpy(noise * np.float32(factor))
    network.load_state_dict(state, strict=True)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_rcan_has_the_keys_of_the_public_checkpoints(golden, scale):
    expected = json.loads((golden / "rcan_keys.json").read_text())[f"x{scale}"]
    with torch.device("meta"):
        network = RCAN(scale)
    assert [[key, list(tensor.shape)] for key, tensor in network.state_dict().items()] == expected


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_rcan_outputs_equal_the_public_implementation(golden, scale):
    expected = np.load(golden / "rcan_outputs.npz")
    network = RCAN(scale, **SMALL).eval()
    fill(network)
    size = 112 // scale
    images = np.random.RandomState(7).uniform(0, 1, (2, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        output = network(torch.from_numpy(images)).numpy()
    assert output.shape == (2, 3, 112, 112)
    np.testing.assert_allclose(output[:, :, :8, :8], expected[f"x{scale}"], atol=2e-6)
    np.testing.assert_allclose(
        [output.mean(), output.std()], [expected[f"x{scale}.{of}"] for of in ("mean", "std")], atol=1e-6
    )


@pytest.mark.parametrize("scale", [0, 1, 3, 6, -2])
def test_rcan_rejects_scales_that_are_no_power_of_two(scale):
    with pytest.raises(ValueError, match=rf"power of two.*not by {scale}"):
        RCAN(scale, **SMALL)


def test_rcan_rejects_a_reduction_that_does_not_divide():
    with pytest.raises(ValueError, match="16 channels cannot be squeezed by 5"):
        RCAN(2, **{**SMALL, "reduction": 5})


def test_rcan_gradients_reach_every_weight():
    network = RCAN(4, **SMALL)
    network(torch.rand(2, 3, 9, 7)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())
    assert network.sf.weight.grad.abs().sum() > 0
