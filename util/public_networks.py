"""Read networks that this toolkit or other projects published, without executing anything in their files.

Layouts, read from the source of each project:

- face.evoLVe, and the IR(-SE) networks of InsightFace_Pytorch: plain state dicts with the same keys, so nothing tells
  one from the other. RGB and the crop of face.evoLVe are assumed; InsightFace_Pytorch's take BGR and whole crops.
- InsightFace_Pytorch's MobileFaceNet: a plain state dict, BGR.
- arcface_torch (iresnet, mbf, ViT): a plain state dict, or `state_dict_backbone` of a checkpoint; RGB.
- AdaFace: a Lightning checkpoint; keys of `state_dict` begin with `model.`; BGR.
- MagFace: keys of `state_dict` begin with `features.module.`, or `module.features.`; BGR, pixels in [0, 1].
- CVLface: safetensors with keys that begin with `model.net.`, or a state dict with `net.`; the configuration beside the
  file names the channel order. Its networks that need keypoints (KPRPE), its Swin and its part-fViT are not known here.
- ONNX: see util.onnx_network. InsightFace's are RGB in [-1, 1]; those of applications.export say what they take.

AdaFace's IR-18, 34, 50 and 101, which CVLface has too, are iresnet18, 34, 50 and 100 with other keys.
"""

import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.backbone import RescaledInput, backbone_from_state_dict, strip_module_prefix
from util.checkpoint.io import is_bomb, load, recorded_crc
from util.checkpoint.run_dir import find_backbone, sibling_file
from util.console import logger
from util.errors import DataError
from util.face import INPUT_FACTORS
from util.onnx_network import OnnxNetwork

# What networks take that do not take RGB in -1..1.
_CHANNEL_ORDERS = {"AdaFace": "BGR", "MagFace": "BGR", "InsightFace_Pytorch": "BGR"}
_INPUT_SCALES = {"MagFace": "0..1"}

_STATE_DICTS = ("state_dict", "state_dict_backbone")  # where a checkpoint holds its network
_FIRST_LAYERS = ("input_layer.0", "conv1", "layers.0.layers.0", "patch_embed.proj", "conv1.conv")
_PREFIXES = {
    "": None,
    "model.": None,
    "model.net.": "CVLface",
    "net.": "CVLface",
    "features.module.": "MagFace",
    "features.": "MagFace",
}


@dataclass(frozen=True, kw_only=True)
class PublicNetwork:
    """A network that was read from a file.

    Attributes:
        name: its name in BACKBONES, or "ONNX".
        family: the project whose layout the file has.
        embedding_size: length of an embedding.
        network: (N, 3, 112, 112) RGB in [-1, 1] -> (N, embedding_size), whatever the file's network takes.
        channel_order: RGB or BGR, what the file's network takes.
        input_scale: the range of pixel values that the file's network takes.
        crop: what it is shown of a face, one of util.face.CROPS.
        metadata: what the file of an ONNX network says of itself.
        takes_bytes: whether the file's network takes uint8, and `network` converts the images for it.
    """

    name: str
    family: str
    embedding_size: int
    network: nn.Module
    channel_order: str
    input_scale: str
    crop: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    takes_bytes: bool = False

    @property
    def is_trainable(self) -> bool:
        """Return whether it can be trained further. An ONNX network cannot."""
        return self.family != "ONNX"

    def describe(self) -> str:
        """Return the line that programs print."""
        shown = "whole 112x112 crops" if self.crop == "whole" else "the central 112 of 128 pixels"
        return (
            f"{self.name} ({self.family}): embedding size {self.embedding_size}, takes {self.channel_order} in "
            f"{self.input_scale}, is shown {shown}"
        )


def default_eval_crop(family: str) -> str:
    """Return which crop the networks of a family are made for: "128" (resize to 128, cut 112 out) or "whole"."""
    return "128" if family in ("face.evoLVe", "this toolkit") else "whole"


def read_public_network(
    path: Path,
    channel_order: str | None = None,
    input_scale: str | None = None,
    *,
    crop: str | None = None,
    source: str | None = None,
) -> PublicNetwork:
    """Read a network from a state dict or checkpoint of torch, a safetensors file or an ONNX file.

    The first convolution of a BGR network is reversed, so that the network, and a copy that is trained further, is RGB.

    Args:
        path: the file.
        channel_order: one of util.face.CHANNEL_ORDERS, where it is not the family's.
        input_scale: one of util.face.INPUT_SCALES, where it is not the family's.
        crop: one of util.face.CROPS. None: the family's, or for a file of this toolkit the one of its training.
        source: the flag or file that an error message starts with. None: the file.

    Raises:
        DataError: the file cannot be read, or holds no network that is known.
    """
    if not path.is_file():
        raise DataError(f"{source or path}: no such file. Give a file with a network.")
    stored_scale = None
    metadata: Mapping[str, str] = {}
    takes_bytes = False
    if path.suffix.lower() == ".onnx":
        name = family = "ONNX"
        onnx_network = OnnxNetwork(path)
        network: nn.Module = onnx_network
        metadata = onnx_network.metadata
        takes_bytes = onnx_network.takes_bytes
        channel_order = channel_order or metadata.get("channel_order")
        crop = crop or metadata.get("crop")
        stored_scale = "0..255" if takes_bytes else metadata.get("input_scale")
    else:
        name, family, network = _read_torch(path, source)
        if isinstance(network, RescaledInput):  # trained further by this toolkit
            stored_scale = {factor: scale for scale, factor in INPUT_FACTORS.items()}[network.input_scale.item()]
            network = network.backbone
    own_settings = settings_of_run(path)
    if own_settings is not None:
        family = "this toolkit"
        crop = crop or ("whole" if own_settings.get("train_crop") == "whole" else "128")
    if channel_order is None:
        channel_order = _configured_order(path) if family == "CVLface" else _CHANNEL_ORDERS.get(family, "RGB")
    if channel_order == "BGR":
        _reverse_channels(network)
    embedding_size = _embedding_size(network)
    input_scale = input_scale or stored_scale or _INPUT_SCALES.get(family, "-1..1")
    if input_scale in INPUT_FACTORS and not takes_bytes:
        network = RescaledInput(network, INPUT_FACTORS[input_scale])
    return PublicNetwork(
        name=name,
        family=family,
        embedding_size=embedding_size,
        network=network,
        channel_order=channel_order,
        input_scale=input_scale,
        crop=crop or default_eval_crop(family),
        metadata=metadata,
        takes_bytes=takes_bytes,
    )


def open_network(
    path: str | Path, channel_order: str | None, input_scale: str | None, *, crop: str | None
) -> tuple[Path, PublicNetwork]:
    """Read the network of a flag --network, report what it is, and return its file and the network.

    Args:
        path: a file, or the folder of a run, whose best Backbone file is taken.
        channel_order: see read_public_network(), as for the others.
        input_scale: the same.
        crop: the same.

    Raises:
        DataError: there is no file, or it cannot be read, or holds no network that is known.
    """
    file = find_backbone(path, flag="--network")
    network = read_public_network(file, channel_order, input_scale, crop=crop)
    logger.info(f"{file}: {network.describe()}")
    return file, network


def read_initial_network(init: str, channel_order: str | None, input_scale: str | None) -> PublicNetwork:
    """Read the network that a training starts from: a file, or the Backbone file of a run's folder.

    See read_public_network() for the arguments. Raises DataError, also for a network that cannot be trained.
    """
    network = read_public_network(
        find_backbone(init, flag="--init"), channel_order, input_scale, source=f"--init={init}"
    )
    if not network.is_trainable:
        raise DataError(f"--init={init}: an ONNX network cannot be trained further. Give a PyTorch file of it.")
    return network


def settings_of_run(path: Path) -> dict[str, Any] | None:
    """Return the settings of the run that a file of this toolkit is from: {} if they are lost, None for other files."""
    with suppress(DataError):
        settings = load(sibling_file(path, "Optimizer"), mmap=True, check=False).get("settings")
        if isinstance(settings, dict):
            return settings
    return None if recorded_crc(path) is None else {}


def _read_torch(path: Path, source: str | None) -> tuple[str, str, nn.Module]:
    """Return name, family and network, of a file of torch or safetensors."""
    content = _load(path)
    stored = next((content[key] for key in _STATE_DICTS if isinstance(content.get(key), Mapping)), content)
    try:
        family, state = _to_our_keys(strip_module_prefix(stored))
        name, network = backbone_from_state_dict(state)
    except (KeyError, ValueError, AttributeError, TypeError, RuntimeError) as error:  # a key is no str, …
        raise DataError(f"{source or path}: {_why_unknown(path, content, stored, error)}") from None
    if family is None:
        family = "InsightFace"
        if name.startswith("IR_"):
            family = "face.evoLVe"
        elif name in ("MobileFaceNet_050", "MobileFaceNet_025"):
            family = "this toolkit"
    return name, family, network


def _why_unknown(path: Path, content: Mapping[Any, Any], stored: Mapping[Any, Any], error: Exception) -> str:
    """Return what is wrong with a file that holds no known network, and what to do."""
    wrapped = next((key for key, value in content.items() if isinstance(value, dict) and _is_state_dict(value)), None)
    if {"optimizer", "settings"} <= content.keys() or "param_groups" in content:
        reason = "it is the state of an optimizer"
    elif list(content) == ["weight"]:
        reason = "it is the weight of a head"
    elif wrapped is not None and stored is content:
        return (
            f"the weights are under the key {wrapped!r}. Take them out: "
            f"torch.save(torch.load({str(path)!r}, weights_only=True)[{wrapped!r}], 'Backbone.pth')"
        )
    else:
        first_keys = ", ".join(" ".join(str(key).split())[:80] for key in list(stored)[:3]) or "none"
        nearest = re.search(r"The nearest is .*? in the file and .*? in \w+\.", str(error))
        reason = f"first keys: {first_keys}" + (f". {nearest[0]}" if nearest else "").removesuffix(".")
    return (
        f"not a backbone's state dict that is known here ({reason}). Give a Backbone file, or a network of "
        f"face.evoLVe, InsightFace, AdaFace, MagFace or CVLface."
    )


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _reverse_channels(network: nn.Module) -> None:
    """Make a BGR network take RGB."""
    if isinstance(network, OnnxNetwork):
        network.reverses_channels = True
    else:
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        first.weight.data = first.weight.data.flip(1)


def _embedding_size(network: nn.Module) -> int:
    if isinstance(network, OnnxNetwork):
        return network.embedding_size
    *_, last = (module for module in network.modules() if isinstance(module, nn.BatchNorm1d))
    return last.num_features


class _Ignored:
    """Stands for an object in a checkpoint whose class is not torch's: a callback, for instance. It does nothing."""

    def __new__(cls, *_args: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None:
        pass


def _load(path: Path) -> dict[str, Any]:
    """Load a file of safetensors or of torch without executing anything in it.

    Lightning keeps objects of its own classes beside the weights. Each becomes an _Ignored, or an empty dict: torch's
    weights-only loader calls nothing but what is named to it here.
    """
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:
            raise DataError(f"{path}: not a safetensors file that can be read ({error}). Take another.") from None
    stand_ins: list[Any] = [
        (dict if name.lower().endswith("dict") else _Ignored, name) for name in _unknown_classes(path)
    ]
    with torch.serialization.safe_globals(stand_ins), suppress(DataError):
        return load(path)
    return load(path)  # without the stand-ins, the message names the class of what is not read


def _unknown_classes(path: Path) -> list[str]:
    """Return the names of the classes and functions in a file of torch that its weights-only loader does not know."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacks = not is_bomb(archive, path)
        return torch.serialization.get_unsafe_globals_in_checkpoint(path) if unpacks else []
    except Exception:  # older than torch 1.6, or damaged: load() reads it or tells what is wrong
        return []


def _to_our_keys(state: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Tensor]]:
    """Return the family of a state dict, if its keys tell, and the state dict of our backbone with these weights."""
    if "input_scale" in state:
        if state["input_scale"].tolist() not in INPUT_FACTORS.values():
            raise ValueError("unknown range")
        return None, dict(state)
    for prefix, family in _PREFIXES.items():
        layers = ("conv1",) if family == "MagFace" else _FIRST_LAYERS  # its networks are iresnets
        if any(f"{prefix}{layer}.weight" in state for layer in layers):
            break
    else:
        prefix, family = "", None
    # A head, which some checkpoints have too, has another prefix.
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if family == "MagFace":
        # Its batch norms add 2e-5 to the variance, ours 1e-5.
        state = {key: value + 1e-5 if key.endswith("running_var") else value for key, value in state.items()}
    elif "conv1.conv.weight" in state:
        return "InsightFace_Pytorch", _convert_mobilefacenet(state)
    elif "output_layer.4.running_mean" in state and "output_layer.4.weight" not in state:
        return family or "AdaFace", _convert_adaface(state)
    return family, state


def _convert_adaface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn AdaFace's IR network into an iresnet: the same layers with other keys.

    Two layers have no counterpart. AdaFace's last batch norm has no scale and shift: they become 1 and 0. Its first
    shortcut only subsamples: it becomes a convolution that copies each channel, and a batch norm that changes nothing.
    In training too, as the statistics of its input are in the block's first batch norm, which has the same input.
    """
    names = {"input_layer.0": "conv1", "input_layer.1": "bn1", "input_layer.2": "prelu"}
    names |= {"output_layer.0": "bn2", "output_layer.3": "fc", "output_layer.4": "features"}
    stage = place = block = 0
    while f"body.{block}.res_layer.0.weight" in state:
        if block == 0 or f"body.{block}.shortcut_layer.0.weight" in state:
            stage += 1
            place = 0
        ours = f"layer{stage}.{place}"
        for index, layer in enumerate(("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")):
            names[f"body.{block}.res_layer.{index}"] = f"{ours}.{layer}"
        for index in range(2):
            names[f"body.{block}.shortcut_layer.{index}"] = f"{ours}.downsample.{index}"
        place += 1
        block += 1
    converted = {}
    for key, value in state.items():
        layer, _, parameter = key.rpartition(".")
        converted[f"{names[layer]}.{parameter}"] = value
    mean = converted["layer1.0.bn1.running_mean"]
    variance = converted["layer1.0.bn1.running_var"]
    shortcut = {
        "0.weight": torch.eye(len(mean))[:, :, None, None],
        "1.weight": (variance + 1e-5).sqrt(),
        "1.bias": mean,
        "1.running_mean": mean,
        "1.running_var": variance,
    }
    converted |= {f"layer1.0.downsample.{key}": value for key, value in shortcut.items()}
    embedding_size = len(converted["features.running_mean"])
    return converted | {"features.weight": torch.ones(embedding_size), "features.bias": torch.zeros(embedding_size)}


_MOBILE_STAGES = {
    "conv1": "layers.0",
    "conv2_dw": "layers.1",
    "conv_23": "layers.2",
    "conv_3": "layers.3.layers",
    "conv_34": "layers.4",
    "conv_4": "layers.5.layers",
    "conv_45": "layers.6",
    "conv_5": "layers.7.layers",
    "conv_6_sep": "conv_sep",
    "conv_6_dw": "features.layers.0",
    "linear": "features.layers.2",
    "bn": "features.layers.3",
}
_MOBILE_LAYERS = {
    "conv": "layers.0",
    "bn": "layers.1",
    "prelu": "layers.2",
    "conv_dw": "layers.1",
    "project": "layers.2",
}


def _convert_mobilefacenet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of InsightFace_Pytorch's MobileFaceNet to the layers of MobileFaceNet_scale1."""
    converted = {}
    for key, value in state.items():
        stage, _, rest = key.partition(".")
        layers = [_MOBILE_LAYERS.get(part, part) for part in rest.removeprefix("model.").split(".")]
        converted[".".join([_MOBILE_STAGES[stage], *layers])] = value
    return converted


def _configured_order(path: Path) -> str:
    """Return the channel order in the configuration next to a file of CVLface, or RGB, its default."""
    for file in (path.with_name("config.json"), path.with_name("model.yaml")):
        if file.is_file():
            with file.open(errors="replace") as stream:
                found = re.search(r"color_space\W+(RGB|BGR)", stream.read(100_000))
            if found:
                return found[1]
    return "RGB"
