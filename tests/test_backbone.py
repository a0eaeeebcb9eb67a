"""Backbones: keys, shapes, gradients, initial weights, and the golden outputs of the public implementations."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import BACKBONES, build_backbone, identify_backbone, strip_module_prefix
from model.backbone.irse import _SqueezeExcitation

BIG = {"IR_101", "IR_152", "IR_SE_101", "IR_SE_152", "iresnet100"}
ALL = [pytest.param(name, marks=[pytest.mark.slow] if name in BIG else []) for name in BACKBONES]
ONE_OF_EACH_FAMILY = ["MobileFaceNet", "IR_SE_50", "iresnet18"]

PUBLISHED = [name for name in ALL if "MobileFaceNet_" not in str(name)]  # only this project has the fractions
# Millions of trainable parameters with 512-dimensional embeddings; for iresnet as InsightFace publishes them.
MILLIONS = {
    "MobileFaceNet": 2.06,
    "MobileFaceNet_050": 0.604,
    "MobileFaceNet_025": 0.196,
    "IR_50": 43.57,
    "IR_101": 65.13,
    "IR_152": 70.74,
    "IR_SE_50": 43.80,
    "IR_SE_101": 65.50,
    "IR_SE_152": 71.15,
    "iresnet18": 24.03,
    "iresnet34": 34.14,
    "iresnet50": 43.59,
    "iresnet100": 65.16,
}


def on_meta(name: str, **settings: int) -> nn.Module:
    """Build a backbone that has shapes but no memory."""
    with torch.device("meta"):
        return build_backbone(name, **settings)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_backbone_shapes_and_number_of_parameters(name: str) -> None:
    backbone = on_meta(name, embedding_size=256).eval()
    assert backbone(torch.empty(3, 3, 112, 112, device="meta")).shape == (3, 256)
    count = sum(parameter.numel() for parameter in on_meta(name).parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.005)


def test_build_backbone_accepts_224_pixels_for_ir_only() -> None:
    assert on_meta("IR_50", input_size=224).eval()(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 512)
    with pytest.raises(ValueError, match=r"IR_50.*input_size is 128.*112 or 224"):
        build_backbone("IR_50", input_size=128)
    with pytest.raises(ValueError, match=r"MobileFaceNet.*input_size is 224.*112"):
        build_backbone("MobileFaceNet", input_size=224)


def test_build_backbone_lists_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"'IR_SE_51'.*IR_SE_50.*MobileFaceNet.*iresnet100"):
        build_backbone("IR_SE_51")


@pytest.mark.parametrize("embedding_size", [512, 128])
@pytest.mark.parametrize("name", list(BACKBONES))
def test_identify_backbone_from_a_state_dict(name: str, embedding_size: int) -> None:
    state_dict = on_meta(name, embedding_size=embedding_size).state_dict()
    assert identify_backbone(state_dict) == (name, embedding_size)
    without_counters = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    assert identify_backbone(without_counters) == (name, embedding_size)


def test_identify_backbone_rejects_other_state_dicts() -> None:
    state_dict = on_meta("IR_50").state_dict()
    for foreign in (
        {},
        {"weight": torch.zeros(10, 512)},
        {"features.weight": torch.zeros(512)},
        {k: v for k, v in state_dict.items() if k != "body.23.res_layer.4.bias"},
        {**state_dict, "fc.weight": torch.zeros(1)},
        on_meta("IR_50", input_size=224).state_dict(),
    ):
        with pytest.raises(ValueError, match=r"no known backbone.*IR_50.*iresnet100"):
            identify_backbone(foreign)


def test_data_parallel_state_dict_loads_strictly() -> None:
    source, target = build_backbone("MobileFaceNet"), build_backbone("MobileFaceNet")
    stripped = strip_module_prefix(nn.DataParallel(source).state_dict())
    target.load_state_dict(stripped, strict=True)
    assert identify_backbone(stripped) == ("MobileFaceNet", 512)
    assert strip_module_prefix(stripped) == stripped
    images = torch.rand(2, 3, 112, 112)
    torch.testing.assert_close(source.eval()(images), target.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_backbone_parameters_all_receive_gradients(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, embedding_size=32).train()
    embeddings = backbone(torch.rand(2, 3, 112, 112) * 2 - 1)
    assert embeddings.isfinite().all() and not torch.allclose(embeddings.norm(dim=1), torch.ones(2))
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    frozen = [key for key, parameter in backbone.named_parameters() if not parameter.requires_grad]
    assert frozen == (["features.weight"] if name.startswith("iresnet") else [])
    still = [key for key, p in backbone.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still
    assert all(p.grad.isfinite().all() for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_backbone_works_with_channels_last(name: str) -> None:
    torch.manual_seed(0)
    backbone, images = build_backbone(name).eval(), torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.inference_mode():
        expected = backbone(images)
        backbone.to(memory_format=torch.channels_last)
        actual = backbone(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_ir_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    backbone, images = build_backbone("IR_50", embedding_size=16), torch.rand(2, 3, 112, 112)
    outputs = []
    backbone.output_layer[1].register_forward_hook(lambda module, args, output: outputs.append((args[0], output)))
    backbone.train()(images)
    backbone.eval()(images)
    (before, training), (_, evaluation) = outputs
    assert 0.45 < (training == 0).float().mean() < 0.55
    torch.testing.assert_close(training[training != 0], 2 * before[training != 0])
    torch.testing.assert_close(evaluation, outputs[1][0], rtol=0, atol=0)


def test_squeeze_excitation_equals_its_formula() -> None:
    torch.manual_seed(0)
    module, x = _SqueezeExcitation(32), torch.randn(2, 32, 5, 7)
    first, second = (layer.weight.detach().numpy()[:, :, 0, 0] for layer in (module.fc1, module.fc2))
    assert first.shape == (2, 32)
    weights = 1 / (1 + np.exp(-np.maximum(x.numpy().mean((2, 3)) @ first.T, 0) @ second.T))  # (2, 32)
    np.testing.assert_allclose(module(x).detach(), x.numpy() * weights[:, :, None, None], rtol=1e-5, atol=1e-6)


def test_backbone_initial_weights_are_as_documented() -> None:
    torch.manual_seed(0)
    mobile, residual, insight = (build_backbone(name) for name in ("MobileFaceNet", "IR_50", "iresnet18"))
    depthwise, dense = mobile.conv_sep.layers[0].weight, mobile.features.layers[0].layers[0].weight
    assert depthwise.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert dense.std().item() == pytest.approx((2 / 49) ** 0.5, rel=0.02)
    linear = residual.output_layer[3]
    assert not linear.bias.any() and linear.weight.abs().max().item() == pytest.approx((6 / 25600) ** 0.5, rel=1e-3)
    assert insight.layer4[1].conv2.weight.std().item() == pytest.approx(0.1, rel=0.02)
    for module in (m for net in (mobile, residual, insight) for m in net.modules()):
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert (module.weight == 1).all() and not module.bias.any()


def test_backbone_learns_to_separate_four_images() -> None:
    torch.manual_seed(0)
    backbone, images = build_backbone("MobileFaceNet", embedding_size=16), torch.rand(4, 3, 112, 112) * 2 - 1
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(8 * F.normalize(backbone(images))[:, :4], torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def golden_value(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the values with which the golden numbers were computed."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif len(shape) == 1 and key.endswith(".weight"):
        n = 1 + 0.1 * n
    elif len(shape) == 1:
        n = 0.1 * n
    else:
        n = 0.5 * n * np.sqrt(1 / np.prod(shape[1:]))
    return torch.from_numpy(n.astype(np.float32))


@pytest.mark.parametrize("name", PUBLISHED)
def test_backbone_golden_keys_and_outputs(golden: Path, name: str) -> None:
    family = "backbone" if name.startswith("IR_") else "arcface_torch"
    golden_name = "mbf" if name == "MobileFaceNet" else name
    expected_keys = json.loads((golden / f"{family}_keys.json").read_text())[golden_name]
    expected = np.load(golden / f"{family}_outputs.npz")[golden_name]
    backbone = on_meta(name).eval()
    assert [[key, list(value.shape)] for key, value in backbone.state_dict().items()] == expected_keys
    filling = {key: golden_value(key, tuple(shape)) for key, shape in expected_keys}
    backbone.load_state_dict(filling, strict=True, assign=True)
    images = np.random.RandomState(7).uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    with torch.inference_mode():
        embeddings = backbone(torch.from_numpy(images))
    np.testing.assert_allclose(embeddings.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
