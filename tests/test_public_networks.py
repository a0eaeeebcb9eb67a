"""Networks of other projects: files with random weights in each project's layout give the outputs that it would."""

import json
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model.backbone import BACKBONES, build_backbone
from model.backbone.fold import fold_batch_norm
from model.backbone.vit import VisionTransformer
from tests.test_fold import filled
from util.checkpoint import io
from util.errors import DataError, RunError
from util.evaluate import embed
from util.pairs import load_pairs
from util.public_networks import default_eval_crop, read_public_network

IMAGES = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(3)) * 2 - 1  # RGB in [-1, 1]


@torch.inference_mode()
def run(network: nn.Module, images: Tensor = IMAGES) -> Tensor:
    return network.eval()(images)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.fixture(scope="module")
def iresnet() -> nn.Module:
    return filled("iresnet18")


class Layout:
    """Weights by key, made when they are first used, and the layers that use them."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def random(self, key: str, *shape: int) -> Tensor:
        if key not in self.state:
            normal = torch.randn(shape, generator=self.generator)
            fan_in = normal[0].numel()
            self.state[key] = normal * (0.5 / fan_in) ** 0.5 if len(shape) > 1 else 0.1 * normal
        return self.state[key]

    def conv(
        self, key: str, x: Tensor, out: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> Tensor:
        weight = self.random(f"{key}.weight", out, x.shape[1] // groups, kernel, kernel)
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)

    def norm(self, key: str, x: Tensor, affine: bool = True) -> Tensor:
        size = x.shape[1]
        mean = self.random(f"{key}.running_mean", size)
        variance = self.state.setdefault(f"{key}.running_var", 0.5 + torch.rand(size, generator=self.generator))
        self.state[f"{key}.num_batches_tracked"] = torch.tensor(7)
        weight = (
            self.state.setdefault(f"{key}.weight", 1 + 0.1 * torch.randn(size, generator=self.generator))
            if affine
            else None
        )
        bias = self.random(f"{key}.bias", size) if affine else None
        return F.batch_norm(x, mean, variance, weight, bias)

    def prelu(self, key: str, x: Tensor) -> Tensor:
        return F.prelu(x, self.random(f"{key}.weight", x.shape[1]))


def adaface(images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the state dict and the embeddings of a random IR-18 as in AdaFace's net.py, before its normalization."""
    layout = Layout()
    x = layout.conv("input_layer.0", images, 64, kernel=3, padding=1)
    x = layout.prelu("input_layer.2", layout.norm("input_layer.1", x))
    for block, channels in enumerate((64, 64, 128, 128, 256, 256, 512, 512)):
        stride = 2 if block % 2 == 0 else 1
        key = f"body.{block}"
        if x.shape[1] == channels:
            shortcut = F.max_pool2d(x, 1, stride)
        else:
            shortcut = layout.conv(f"{key}.shortcut_layer.0", x, channels, kernel=1, stride=stride)
            shortcut = layout.norm(f"{key}.shortcut_layer.1", shortcut)
        x = layout.norm(f"{key}.res_layer.0", x)
        x = layout.conv(f"{key}.res_layer.1", x, channels, kernel=3, padding=1)
        x = layout.prelu(f"{key}.res_layer.3", layout.norm(f"{key}.res_layer.2", x))
        x = layout.conv(f"{key}.res_layer.4", x, channels, kernel=3, stride=stride, padding=1)
        x = layout.norm(f"{key}.res_layer.5", x) + shortcut
    x = layout.norm("output_layer.0", x).flatten(1)
    x = F.linear(x, layout.random("output_layer.3.weight", 16, x.shape[1]), layout.random("output_layer.3.bias", 16))
    return layout.state, layout.norm("output_layer.4", x, affine=False)


def mobilefacenet(images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the state dict and the embeddings of a random MobileFaceNet as in InsightFace_Pytorch's model.py."""
    layout = Layout()

    def conv_block(key: str, x: Tensor, out: int, kernel: int, stride: int = 1, groups: int = 1) -> Tensor:
        x = layout.conv(f"{key}.conv", x, out, kernel, stride, padding=kernel // 2, groups=groups)
        return layout.prelu(f"{key}.prelu", layout.norm(f"{key}.bn", x))

    def depth_wise(key: str, x: Tensor, out: int, groups: int, stride: int) -> Tensor:
        x = conv_block(f"{key}.conv", x, groups, kernel=1)
        x = conv_block(f"{key}.conv_dw", x, groups, kernel=3, stride=stride, groups=groups)
        return layout.norm(f"{key}.project.bn", layout.conv(f"{key}.project.conv", x, out, kernel=1))

    def residual(key: str, x: Tensor, blocks: int, groups: int) -> Tensor:
        for block in range(blocks):
            x = x + depth_wise(f"{key}.model.{block}", x, x.shape[1], groups, stride=1)
        return x

    x = conv_block("conv1", images, 64, kernel=3, stride=2)
    x = conv_block("conv2_dw", x, 64, kernel=3, groups=64)
    x = residual("conv_3", depth_wise("conv_23", x, 64, 128, stride=2), 4, groups=128)
    x = residual("conv_4", depth_wise("conv_34", x, 128, 256, stride=2), 6, groups=256)
    x = residual("conv_5", depth_wise("conv_45", x, 128, 512, stride=2), 2, groups=256)
    x = conv_block("conv_6_sep", x, 512, kernel=1)
    x = layout.norm("conv_6_dw.bn", layout.conv("conv_6_dw.conv", x, 512, kernel=7, groups=512)).flatten(1)
    return layout.state, layout.norm("bn", F.linear(x, layout.random("linear.weight", 24, 512)))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def as_saved(file: Path, content: object, **settings: object) -> Path:
    torch.save(content, file, **settings)
    return file


# Networks whose keys are ours


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("IR_SE_50", "face.evoLVe"),
        ("MobileFaceNet_scale1", "InsightFace"),
        ("MobileFaceNet_025", "this toolkit"),
        ("vit_t", "InsightFace"),
    ],
)
def test_read_recognizes_name_and_family(tmp_path, name, family):
    backbone = filled(name)
    found = read_public_network(as_saved(tmp_path / "net.pth", backbone.state_dict()))
    assert (found.name, found.family, found.embedding_size) == (name, family, 16)
    assert (found.channel_order, found.input_scale, found.is_trainable) == ("RGB", "-1..1", True)
    assert found.crop == ("whole" if family == "InsightFace" else "128")
    assert torch.equal(run(found.network), run(backbone))


def test_read_takes_files_in_the_format_of_old_torch(tmp_path, iresnet):
    state = {k: v for k, v in prefixed("module.", iresnet.state_dict()).items() if "num_batches" not in k}
    found = read_public_network(as_saved(tmp_path / "old.pth", state, _use_new_zipfile_serialization=False))
    assert found.name == "iresnet18" and torch.equal(run(found.network), run(iresnet))


def test_read_takes_the_backbone_out_of_a_checkpoint(tmp_path, iresnet):
    """arcface_torch's train_v2.py keeps it beside the head and the optimizer."""
    content = {"epoch": 3, "state_dict_backbone": iresnet.state_dict(), "state_dict_softmax_fc": {"weight": IMAGES}}
    found = read_public_network(as_saved(tmp_path / "checkpoint_gpu_0.pt", content))
    assert (found.name, found.family) == ("iresnet18", "InsightFace")
    assert torch.equal(run(found.network), run(iresnet))


def test_read_public_mobilefacenet(shared):
    found = read_public_network(shared / "models" / "mobilefacenet_s1_ms1m.pth")
    line = "MobileFaceNet_scale1 (InsightFace): embedding size 128, takes RGB in -1..1, is shown whole 112x112 crops"
    assert found.describe() == line


def test_public_mobilefacenet_tells_people_apart(shared):
    """Take 15 pairs of LFW that show one person, and 15 that show two."""
    network = read_public_network(shared / "models" / "mobilefacenet_s1_ms1m.pth").network.eval()
    pairs = load_pairs(shared / "lfw" / "pairs.txt", shared / "lfw" / "aligned_112")
    assert pairs.issame[:15].all() and not pairs.issame[300:315].any()
    embeddings = embed(network, np.concatenate([pairs.images(0, 30), pairs.images(600, 630)])).numpy()
    cosines = (embeddings[0::2] * embeddings[1::2]).sum(1)
    assert cosines[:15].min() > 0.57  # 0.61, and 0.54 with BGR images
    assert cosines[15:].max() < 0.25


# AdaFace


class Callback:
    """What Lightning keeps in a checkpoint, under the name of its class there."""


@pytest.fixture
def lightning(monkeypatch) -> types.ModuleType:
    """Return Lightning's module of callbacks, as far as a checkpoint needs it."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return module


def test_read_adaface_checkpoint_of_lightning(tmp_path, lightning, monkeypatch):
    state, expected = adaface(IMAGES.flip(1))
    callback = lightning.ModelCheckpoint()
    callback.best = torch.zeros(3)
    content = {
        "state_dict": prefixed("model.", state) | {"head.kernel": torch.zeros(16, 4)},
        "callbacks": {lightning.ModelCheckpoint: {"best_model_path": "x", "object": callback}},
        "hyper_parameters": lightning.AttributeDict(arch="ir_18", lr_milestones=[1, 2]),
        "lr_schedulers": [{"last_lr": np.float64(0.1)}],
    }
    file = as_saved(tmp_path / "adaface_ir18.ckpt", content)
    for name in list(sys.modules):
        if name.startswith("pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name)
    found = read_public_network(file)
    assert (found.name, found.family, found.embedding_size) == ("iresnet18", "AdaFace", 16)
    assert (found.channel_order, found.input_scale, found.crop) == ("BGR", "-1..1", "whole")
    assert_same(run(found.network), expected)
    assert_same(run(fold_batch_norm(found.network)), expected)
    # Trained further and saved, it is an iresnet that takes RGB.
    again = read_public_network(as_saved(tmp_path / "Backbone_1_9.pth", found.network.state_dict()))
    assert (again.family, again.channel_order) == ("InsightFace", "RGB")
    assert torch.equal(run(again.network), run(found.network))


def test_adaface_first_shortcut_subsamples_in_training_too(tmp_path):
    state, _ = adaface(IMAGES)
    network = read_public_network(as_saved(tmp_path / "adaface.ckpt", state)).network
    shortcut = network.layer1[0].downsample
    mean, variance = state["body.0.res_layer.0.running_mean"], state["body.0.res_layer.0.running_var"]
    torch.manual_seed(0)
    x = torch.randn(16, 64, 24, 24) * variance.sqrt()[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(shortcut.eval()(x), x[:, :, ::2, ::2], rtol=1e-5, atol=1e-5)
    # In training the statistics are those of the batch, and its 2304 pixels a channel are near the running ones.
    assert (shortcut.train()(x) - x[:, :, ::2, ::2]).square().mean().sqrt() < 0.05


def test_read_refuses_adaface_with_squeeze_and_excitation(tmp_path):
    state, _ = adaface(IMAGES)
    state["body.0.res_layer.se_block.fc1.weight"] = torch.zeros(4, 64, 1, 1)
    with pytest.raises(DataError, match="not a backbone's state dict"):
        read_public_network(as_saved(tmp_path / "adaface.ckpt", state))


# MagFace


@pytest.mark.parametrize("prefix", ["features.module.", "module.features."])
def test_read_magface_and_what_is_trained_from_it(tmp_path, iresnet, prefix):
    head = (
        {"fc.weight": torch.zeros(4, 16)} if prefix.startswith("features") else {"module.fc.weight": torch.zeros(4, 16)}
    )
    state = prefixed(prefix, iresnet.state_dict()) | head
    found = read_public_network(
        as_saved(tmp_path / "magface.pth", {"epoch": 25, "arch": "iresnet18", "state_dict": state})
    )
    assert (found.name, found.family, found.channel_order) == ("iresnet18", "MagFace", "BGR")
    assert (found.input_scale, found.crop) == ("0..1", "whole")
    magface = filled("iresnet18")
    for module in magface.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.eps = 2e-5
    expected = run(magface, (IMAGES.flip(1) + 1) / 2)
    assert_same(run(found.network), expected)
    assert_same(run(fold_batch_norm(found.network)), expected)
    again = read_public_network(as_saved(tmp_path / "Backbone_1_9.pth", found.network.state_dict()))
    assert (again.name, again.channel_order, again.input_scale) == ("iresnet18", "RGB", "0..1")
    assert torch.equal(run(again.network), run(found.network))


@pytest.mark.parametrize("scale", [0.7, [0.5, 0.5]])
def test_read_refuses_an_unknown_stored_scale(tmp_path, iresnet, scale):
    state = prefixed("backbone.", iresnet.state_dict()) | {"input_scale": torch.tensor(scale)}
    with pytest.raises(DataError, match=r"first keys: (input_scale|backbone)"):
        read_public_network(as_saved(tmp_path / "Backbone_1_9.pth", state))


# CVLface


@pytest.mark.parametrize("color_space", [None, "RGB", "BGR"])
def test_read_cvlface_safetensors(tmp_path, color_space):
    state, expected = adaface(IMAGES.flip(1) if color_space == "BGR" else IMAGES)
    save_file(prefixed("model.net.", state), tmp_path / "model.safetensors")
    if color_space:
        (tmp_path / "config.json").write_text(json.dumps({"conf": {"color_space": color_space, "name": "ir18"}}))
    found = read_public_network(tmp_path / "model.safetensors")
    assert (found.name, found.family) == ("iresnet18", "CVLface")
    assert (found.channel_order, found.crop) == (color_space or "RGB", "whole")
    assert_same(run(found.network), expected)


def test_read_cvlface_model_with_its_yaml(tmp_path, iresnet):
    (tmp_path / "model.yaml").write_text("input_size: [3, 112, 112]\ncolor_space: 'BGR'\nname: 'ir18'\n")
    found = read_public_network(as_saved(tmp_path / "model.pt", prefixed("net.", iresnet.state_dict())))
    assert (found.name, found.family, found.channel_order) == ("iresnet18", "CVLface", "BGR")
    assert_same(run(found.network), run(iresnet, IMAGES.flip(1)))


def test_read_cvlface_vit(tmp_path, monkeypatch):
    """Its small and base ViT have no token for masked patches; a smaller one stands for them."""
    monkeypatch.setitem(
        BACKBONES,
        "vit_b_patch8",
        lambda embedding_size: VisionTransformer(
            embedding_size, width=32, depth=2, patch=8, heads=16, mlp_ratio=3, masked=False
        ),
    )
    vit = build_backbone("vit_b_patch8", embedding_size=16)
    save_file(prefixed("model.net.", vit.state_dict()), tmp_path / "model.safetensors")
    found = read_public_network(tmp_path / "model.safetensors")
    assert (found.name, found.family, found.embedding_size) == ("vit_b_patch8", "CVLface", 16)
    assert torch.equal(run(found.network), run(vit))


# InsightFace_Pytorch


def test_read_mobilefacenet_of_insightface_pytorch(tmp_path):
    state, expected = mobilefacenet(IMAGES.flip(1))
    found = read_public_network(as_saved(tmp_path / "model_mobilefacenet.pth", OrderedDict(state)))
    assert (found.name, found.embedding_size) == ("MobileFaceNet_scale1", 24)
    assert (found.family, found.channel_order, found.crop) == ("InsightFace_Pytorch", "BGR", "whole")
    assert_same(run(found.network), expected)


# Options


def test_read_channel_order_and_scale_of_the_user(tmp_path, iresnet):
    file = as_saved(tmp_path / "net.pth", iresnet.state_dict())
    for order, scale, shown in (
        ("BGR", None, IMAGES.flip(1)),
        ("RGB", "-1..1", IMAGES),
        (None, "0..1", (IMAGES + 1) / 2),
        ("BGR", "0..255", (IMAGES.flip(1) + 1) * 127.5),
    ):
        found = read_public_network(file, channel_order=order, input_scale=scale)
        assert (found.channel_order, found.input_scale) == (order or "RGB", scale or "-1..1")
        assert_same(run(found.network), run(iresnet, shown))


def test_default_eval_crop_depends_on_the_family():
    assert [default_eval_crop(family) for family in ("face.evoLVe", "this toolkit")] == ["128"] * 2
    assert {default_eval_crop(family) for family in ("InsightFace", "AdaFace", "MagFace", "CVLface", "ONNX")} == {
        "whole"
    }


@pytest.mark.parametrize(
    ("settings", "crop"), [({"train_crop": "whole"}, "whole"), ({"train_crop": "128"}, "128"), ({"lr": 0.1}, "128")]
)
def test_read_takes_the_crop_of_our_own_runs(tmp_path, iresnet, settings, crop):
    file = as_saved(tmp_path / "Backbone_1_2.pth", iresnet.state_dict())
    optimizer = as_saved(tmp_path / "Optimizer_1_2.pth", {"settings": settings, "optimizer": {}})
    found = read_public_network(file)
    assert (found.name, found.family, found.crop) == ("iresnet18", "this toolkit", crop)
    assert read_public_network(file, crop="whole").crop == "whole"
    for content in ({"settings": 3}, {"epoch": 3}, [4]):  # of another program
        as_saved(optimizer, content)
        assert (read_public_network(file).family, read_public_network(file).crop) == ("InsightFace", "whole")


def test_read_knows_a_file_of_ours_without_its_optimizer(tmp_path, iresnet):
    with io.checkpoint_writer({"Backbone": tmp_path / "Backbone_Best.pth"}) as write:
        write("Backbone", iresnet.state_dict())
    found = read_public_network(tmp_path / "Backbone_Best.pth")
    assert (found.family, found.crop) == ("this toolkit", "128")
    assert torch.equal(run(found.network), run(iresnet))


# ONNX. Its files are protocol buffers: fields of (number << 3 | type), then a number or a length and bytes.


def field(number: int, *values: int | str | bytes) -> bytes:
    encoded = b""
    for value in values:
        if isinstance(value, int):
            encoded += varint(number << 3) + varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            encoded += varint(number << 3 | 2) + varint(len(content)) + content
    return encoded


def varint(value: int) -> bytes:
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def tensor_info(name: str, *shape: int | str) -> bytes:
    dimensions = b"".join(field(1, field(2 if isinstance(size, str) else 1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dimensions)))


def initializer(name: str, values: np.ndarray) -> bytes:
    return field(1, *values.shape) + field(2, 1) + field(8, name) + field(9, values.astype("<f4").tobytes())


def onnx_model(
    path: Path, shape: tuple[int | str, ...], nodes: list[bytes], outputs: int, weights: bytes = b""
) -> Path:
    """Write a model from the input x to the outputs y0, y1 …"""
    graph = field(1, *nodes) + field(2, "graph") + weights + field(11, tensor_info("x", *shape))
    graph += b"".join(field(12, tensor_info(f"y{index}", shape[0], "D")) for index in range(outputs))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))
    return path


def onnx_network(path: Path, batch: int | str = "N") -> tuple[Path, nn.Module]:
    """Write the ONNX file of a small network, and return it with the same network of torch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(4 * 14 * 14, 6)).eval()
    sizes = [field(5, field(1, name) + field(8, 8, 8) + field(20, 7)) for name in ("kernel_shape", "strides")]
    transposed = field(5, field(1, "transB") + field(3, 1) + field(20, 2))
    nodes = [
        field(1, "x", "weight", "bias") + field(2, "a") + field(4, "Conv") + b"".join(sizes),
        field(1, "a") + field(2, "b") + field(4, "Flatten"),
        field(1, "b", "matrix", "shift") + field(2, "y0") + field(4, "Gemm") + transposed,
    ]
    tensors = zip(("weight", "bias", "matrix", "shift"), network.parameters(), strict=True)
    weights = b"".join(field(5, initializer(name, value.detach().numpy())) for name, value in tensors)
    return onnx_model(path, (batch, 3, 112, 112), nodes, 1, weights), network


@pytest.mark.parametrize("batch", ["N", 1, 2])
def test_read_onnx_equals_the_network_it_was_made_of(tmp_path, batch):
    file, network = onnx_network(tmp_path / "net.onnx", batch)
    found = read_public_network(file)
    assert (found.name, found.family, found.embedding_size) == ("ONNX", "ONNX", 6)
    assert (found.channel_order, found.crop, found.is_trainable) == ("RGB", "whole", False)
    images = torch.cat([IMAGES, IMAGES[:1] / 2])
    assert_same(run(found.network, images), run(network, images))
    assert_same(run(fold_batch_norm(found.network).to(memory_format=torch.channels_last), images), run(network, images))
    other = read_public_network(file, channel_order="BGR", input_scale="0..255")
    assert_same(run(other.network, images), run(network, (images.flip(1) + 1) * 127.5))


def test_onnx_network_passes_no_gradients_on(tmp_path):
    network = read_public_network(onnx_network(tmp_path / "net.onnx")[0]).network
    with pytest.raises(RunError, match="passes no gradients on"):
        network(IMAGES.clone().requires_grad_())


@pytest.mark.parametrize(
    ("shape", "outputs", "message"),
    [
        (
            ("N", 3, 160, 160),
            1,
            r"inputs 'x' tensor\(float\) \['N', 3, 160, 160\].*Take a network with one float32 input",
        ),
        (("N", 112, 112, 3), 1, r"\['N', 112, 112, 3\].*\(N, 3, 112, 112\)"),
        (("N", 3, 112, 112), 2, r"outputs 'y0' tensor.*, 'y1' tensor.*and one output"),
    ],
)
def test_read_onnx_names_inputs_and_outputs_that_do_not_fit(tmp_path, shape, outputs, message):
    nodes = [field(1, "x") + field(2, f"y{index}") + field(4, "Flatten") for index in range(outputs)]
    file = onnx_model(tmp_path / "net.onnx", shape, nodes, outputs)
    with pytest.raises(DataError, match=message):
        read_public_network(file)


# Other files


class Evil:
    def __reduce__(self):
        return (eval, ("open('ran', 'w')",))


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"state_dict": {"conv1.weight": evil}}])
def test_read_executes_nothing_in_a_file(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"evil\.pth: "):
        read_public_network(as_saved(tmp_path / "evil.pth", wrap(Evil())))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(wrap(Evil()), protocol=2))
    with pytest.raises(DataError, match="not a checkpoint"):
        read_public_network(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_read_does_not_unpack_a_bomb(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/version", "3")
        archive.writestr("bomb/data.pkl", bytes(10_000_000))
    monkeypatch.setattr("torch.serialization.get_unsafe_globals_in_checkpoint", lambda file: pytest.fail("it is read"))
    with pytest.raises(DataError, match=r"bomb\.pth: "):
        read_public_network(tmp_path / "bomb.pth")


def test_read_allows_nothing_to_files_that_are_read_later(tmp_path, lightning):
    file = as_saved(tmp_path / "net.ckpt", {"callback": lightning.ModelCheckpoint(), "state_dict": {}})
    with pytest.raises(DataError, match="first keys: none"):
        read_public_network(file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"fc.weight": torch.zeros(3), "fc.bias": torch.zeros(3), "a": 1, "b": 2}, "fc.weight, fc.bias, a"),
        ({"conv1.weight": torch.zeros(3)}, "conv1.weight"),
        ({"conv1.weight": "text", 3: torch.zeros(1)}, "conv1.weight, 3"),
        ({"features.module.conv1.weight": 1, "features.module.bn1.running_var": "x"}, "features.module.conv1.weight, "),
        ({"state_dict": {"backbone.stem\n.weight": torch.zeros(3)}}, "backbone.stem .weight"),
        ({}, "none"),
    ],
)
def test_read_names_the_first_keys_of_an_unknown_file(tmp_path, content, keys):
    with pytest.raises(DataError) as caught:
        read_public_network(as_saved(tmp_path / "net.pth", content), source="--init")
    assert str(caught.value).startswith("--init: not a backbone's state dict") and f"(first keys: {keys}" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net.onnx"])
@pytest.mark.parametrize("content", [b"", b"\x80\x02nonsense", struct.pack("<Q", 1 << 62) + b"{}"])
def test_read_reports_damaged_files_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*[.] (Take|Give) ") as caught:
        read_public_network(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_read_reports_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "gone.onnx"):
        with pytest.raises(DataError, match="no such file"):
            read_public_network(path)
