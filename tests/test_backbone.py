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
from model.backbone.mobilefacenet import MobileFaceNet
from model.backbone.vit import VisionTransformer

BIG = {"IR_101", "IR_152", "IR_SE_101", "IR_SE_152", "iresnet100"}
LIKE_VIT_T = {"vit_s", "vit_b", "vit_s_patch8", "vit_b_patch8"}  # with more weights; tested without memory alone
ALL = [
    pytest.param(name, marks=[pytest.mark.slow] if name in BIG else []) for name in BACKBONES if name not in LIKE_VIT_T
]
ONE_OF_EACH_FAMILY = ["MobileFaceNet", "IR_SE_50", "iresnet18", "vit_t"]

# Only this project has fractions of MobileFaceNet. A public network of scale 1 is tested on real faces, and the ViT has
# golden numbers of its own.
WITH_GOLDEN_NUMBERS = [name for name in ALL if "MobileFaceNet_" not in str(name) and "vit_" not in str(name)]
# Millions of trainable parameters with 512-dimensional embeddings; for iresnet as InsightFace publishes them.
MILLIONS = {
    "MobileFaceNet_scale1": 1.201,
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
    "vit_t": 19.138,
    "vit_s": 76.023,
    "vit_b": 113.833,
    "vit_s_patch8": 95.952,
    "vit_b_patch8": 114.870,
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
    for block in getattr(backbone, "blocks", ()):
        block.drop_path = 0  # stochastic depth may drop a branch for both images
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


@pytest.mark.parametrize(("scale", "first", "second"), [(1, 64, 128), (2, 128, 256), (4, 256, 512)])
def test_mobilefacenet_channels_are_insightface_s(scale: int, first: int, second: int) -> None:
    """InsightFace's mbf: `scale` multiplies the output channels; hidden channels and groups stay."""
    network = MobileFaceNet(scale=scale)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes["layers.0.layers.0.weight"] == (first, 3, 3, 3)
    assert network.layers[1].layers[0].groups == 64
    for stage, hidden, inside, outside in (
        ("layers.2.", 128, first, first),
        ("layers.3.layers.3.", 128, first, first),
        ("layers.4.", 256, first, second),
        ("layers.5.layers.5.", 256, second, second),
        ("layers.6.", 512, second, second),
        ("layers.7.layers.1.", 256, second, second),
    ):
        assert shapes[f"{stage}layers.0.layers.0.weight"] == (hidden, inside, 1, 1)
        assert shapes[f"{stage}layers.1.layers.0.weight"] == (hidden, 1, 3, 3)
        assert shapes[f"{stage}layers.2.layers.0.weight"] == (outside, hidden, 1, 1)
    assert shapes["conv_sep.layers.0.weight"] == (512, second, 1, 1)
    assert shapes["features.layers.0.layers.0.weight"] == (512, 1, 7, 7)


def test_public_mobilefacenet_loads_strictly(shared: Path) -> None:
    state_dict = torch.load(shared / "models" / "mobilefacenet_s1_ms1m.pth", weights_only=True)
    backbone = build_backbone("MobileFaceNet_scale1", embedding_size=128)
    backbone.load_state_dict(state_dict, strict=True)
    assert sum(value.numel() for key, value in state_dict.items() if "num_batches" not in key) == 1_022_720


def vit_output(state: dict[str, np.ndarray], image: np.ndarray, patch: int, heads: int) -> np.ndarray:
    """Re-derive arcface_torch's ViT for one image (3, 112, 112), patch by patch and head by head, in float64."""

    def layer_norm(x: np.ndarray, key: str) -> np.ndarray:
        centered = x - x.mean(1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-5)
        return scaled * state[f"{key}.weight"] + state[f"{key}.bias"]

    def linear(x: np.ndarray, key: str) -> np.ndarray:
        return x @ state[f"{key}.weight"].T + state.get(f"{key}.bias", 0)

    def batch_norm(x: np.ndarray, key: str) -> np.ndarray:
        scaled = (x - state[f"{key}.running_mean"]) / np.sqrt(state[f"{key}.running_var"] + 2e-5)
        return scaled * state[f"{key}.weight"] + state[f"{key}.bias"]

    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    side = 112 // patch
    rows = []
    for row in range(side):
        for column in range(side):
            window = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            rows.append((kernel * window).sum((1, 2, 3)) + bias)
    x = np.array(rows) + state["pos_embed"][0]
    width = x.shape[1]
    size = width // heads
    for block in range(2):
        joint = linear(layer_norm(x, f"blocks.{block}.norm1"), f"blocks.{block}.attn.qkv")
        attended = np.empty_like(x)
        for head in range(heads):
            query, key, value = (joint[:, part * width + head * size :][:, :size] for part in range(3))
            scores = np.exp(query @ key.T * size**-0.5)
            attended[:, head * size : (head + 1) * size] = scores / scores.sum(1, keepdims=True) @ value
        x = x + linear(attended, f"blocks.{block}.attn.proj")
        hidden = linear(layer_norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1")
        x = x + linear(np.clip(hidden, 0, 6), f"blocks.{block}.mlp.fc2")
    flat = layer_norm(x, "norm").reshape(1, -1)
    return batch_norm(linear(batch_norm(linear(flat, "feature.0"), "feature.1"), "feature.2"), "feature.3")[0]


@pytest.mark.parametrize(("patch", "heads", "mlp_ratio", "masked"), [(9, 8, 4, True), (8, 4, 3, False)])
def test_vit_equals_its_slow_derivation(patch: int, heads: int, mlp_ratio: int, masked: bool) -> None:
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 2, "patch": patch, "heads": heads, "mlp_ratio": mlp_ratio, "masked": masked}
    network = VisionTransformer(6, **settings).eval()
    state = {key: golden_value(key, tuple(value.shape)) for key, value in network.state_dict().items()}
    assert ("mask_token" in state) is masked
    network.load_state_dict(state)
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    doubles = {key: value.numpy().astype(np.float64) for key, value in state.items()}
    expected = [vit_output(doubles, image.numpy().astype(np.float64), patch, heads) for image in images]
    with torch.inference_mode():
        np.testing.assert_allclose(network(images), expected, rtol=1e-4, atol=1e-5)


def test_vit_keys_are_arcface_torch_s() -> None:
    keys = set(VisionTransformer(width=8, depth=2).state_dict())
    block = {
        f"{name}.{kind}"
        for name in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert keys == (
        {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "mask_token", "norm.weight", "norm.bias"}
        | {f"blocks.{index}.{name}" for index in range(2) for name in block | {"attn.qkv.weight"}}
        | {"feature.0.weight", "feature.2.weight"}
        | {f"feature.{index}.{kind}" for index in (1, 3) for kind in norm}
    )


def test_vit_masks_a_tenth_of_the_patches_in_training() -> None:
    torch.manual_seed(0)
    network = VisionTransformer(width=8, depth=2)
    network.blocks, network.norm = nn.ModuleList(), nn.Identity()
    seen = []
    network.feature.register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(1, (144, 8))))
    images = torch.rand(3, 3, 112, 112)
    network.train()(images)
    network.eval()(images)
    masked = (seen[0] == network.mask_token).all(2)
    assert masked.sum(1).tolist() == [144 - 129] * 3 and not (masked[0] == masked[1]).all()
    assert torch.equal(seen[0][~masked], seen[1][~masked])  # every other patch is at its place


def test_vit_drops_branches_of_some_samples_in_training() -> None:
    torch.manual_seed(0)
    first, *_, last = VisionTransformer(width=8, depth=11).blocks
    assert [first.drop_path, last.drop_path] == [0, 0.1]
    last.drop_path = 0.5
    branch = torch.rand(100, 4, 8) + 1
    dropped = last.train()._drop(branch)
    kept = dropped.flatten(1).any(1)
    assert 35 < kept.sum() < 65 and torch.equal(dropped[kept], 2 * branch[kept])
    assert torch.equal(last.eval()._drop(branch), branch)


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


@pytest.mark.parametrize("name", WITH_GOLDEN_NUMBERS)
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


def test_vit_golden_outputs_of_arcface_torch() -> None:
    """The numbers are from backbones/vit.py of InsightFace at revision 1fe6356, in float32, on the same weights."""
    expected = np.load(Path(__file__).with_name("golden") / "vit_outputs.npz")["vit_t"]
    backbone = on_meta("vit_t").eval()
    filling = {key: golden_value(key, tuple(value.shape)) for key, value in backbone.state_dict().items()}
    backbone.load_state_dict(filling, strict=True, assign=True)
    images = np.random.RandomState(7).uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    with torch.inference_mode():
        embeddings = backbone(torch.from_numpy(images))
    np.testing.assert_allclose(embeddings.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
