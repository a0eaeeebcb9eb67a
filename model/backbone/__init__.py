"""Backbones by name: networks that map an aligned face to an embedding."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from model.backbone.iresnet import IResNet
from model.backbone.irse import ImprovedResNet
from model.backbone.mobilefacenet import MobileFaceNet
from model.backbone.rescaled import RescaledInput
from model.backbone.vit import VisionTransformer

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "IR_50": partial(ImprovedResNet, 50, False),
    "IR_101": partial(ImprovedResNet, 101, False),
    "IR_152": partial(ImprovedResNet, 152, False),
    "IR_SE_50": partial(ImprovedResNet, 50, True),
    "IR_SE_101": partial(ImprovedResNet, 101, True),
    "IR_SE_152": partial(ImprovedResNet, 152, True),
    "MobileFaceNet_scale1": partial(MobileFaceNet, scale=1),  # the paper's network
    "MobileFaceNet": MobileFaceNet,  # InsightFace's mbf, scale 2
    # Fractions of all channels of scale 2, the hidden ones too: none of them is the paper's network.
    "MobileFaceNet_050": partial(MobileFaceNet, width=0.5),
    "MobileFaceNet_025": partial(MobileFaceNet, width=0.25),
    "iresnet18": partial(IResNet, 18),
    "iresnet34": partial(IResNet, 34),
    "iresnet50": partial(IResNet, 50),
    "iresnet100": partial(IResNet, 100),
    "vit_t": partial(VisionTransformer, width=256, depth=12),
    "vit_s": partial(VisionTransformer, width=512, depth=12),
    "vit_b": partial(VisionTransformer, width=512, depth=24),
    # CVLface's small and base: smaller patches, other layers, and no masking.
    "vit_s_patch8": partial(VisionTransformer, width=512, depth=12, patch=8, mlp_ratio=5, masked=False),
    "vit_b_patch8": partial(VisionTransformer, width=512, depth=24, patch=8, mlp_ratio=3, heads=16, masked=False),
}

# The last batch norm of each family, whose length is the embedding size, and how the names of the family begin.
_EMBEDDING_KEYS = {
    "output_layer.4.weight": "IR_",
    "features.layers.3.weight": "MobileFaceNet",
    "features.weight": "iresnet",
    "feature.3.weight": "vit_",
}


def build_backbone(name: str, input_size: int = 112, embedding_size: int = 512) -> nn.Module:
    """Return a new backbone: (N, 3, input_size, input_size) RGB in [-1, 1] -> (N, embedding_size), not normalized.

    Args:
        name: a key of BACKBONES.
        input_size: 112; the IR family also accepts 224.
        embedding_size: length of an embedding.

    Raises:
        ValueError: the name is unknown, or the backbone does not accept this size.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}. Choose one of {', '.join(BACKBONES)}")
    resizable = name.startswith("IR_")
    sizes = (112, 224) if resizable else (112,)
    if input_size not in sizes:
        raise ValueError(f"{name}: input_size is {input_size}. It must be {' or '.join(map(str, sizes))}")
    if resizable:
        return BACKBONES[name](input_size=input_size, embedding_size=embedding_size)
    return BACKBONES[name](embedding_size=embedding_size)


def identify_backbone(state_dict: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return the name and embedding size of the backbone (of input size 112) with these keys and shapes.

    The keys must not have a `module.` prefix (see strip_module_prefix). Raises ValueError if no backbone fits.
    """
    shapes = _shapes(state_dict)
    key = next((key for key in _EMBEDDING_KEYS if len(shapes.get(key, ())) == 1), "")
    names = [name for name in BACKBONES if key and name.startswith(_EMBEDDING_KEYS[key])]
    embedding_size = shapes[key][0] if key else 0
    most_common = len(shapes) / 2
    nearest = ""
    for name in names if embedding_size else ():
        with torch.device("meta"):  # shapes only: no memory, no random numbers
            candidate = build_backbone(name, embedding_size=embedding_size)
        expected = _shapes(candidate.state_dict())
        if expected == shapes:
            return name, embedding_size
        common = len(expected.items() & shapes.items())
        if common > most_common:
            most_common = common
            key = next(key for key in [*shapes, *expected] if shapes.get(key) != expected.get(key))
            saved, built = shapes.get(key, "absent"), expected.get(key, "absent")
            nearest = f"The nearest is {name}, but {key} is {saved} in the file and {built} in {name}. "
    raise ValueError(
        f"the {len(state_dict)} keys and shapes belong to no known backbone of input size 112. {nearest}"
        f"Known backbones: {', '.join(BACKBONES)}"
    )


def backbone_from_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[str, nn.Module]:
    """Return the name of the backbone that fits a state dict, and this backbone with the weights loaded.

    The keys may have `module.` prefixes, and may belong to a RescaledInput. Raises ValueError if no backbone fits.
    """
    try:
        state_dict = strip_module_prefix(state_dict)
        scale = state_dict.pop("input_scale", None)
        if scale is not None:
            if scale.dim() != 0:
                raise ValueError("its input_scale is not a number")
            state_dict = {key.removeprefix("backbone."): value for key, value in state_dict.items()}
        name, embedding_size = identify_backbone(state_dict)
    except AttributeError:  # a value is not a tensor, or a key is not a str
        raise ValueError("its content is not a dict of names and tensors") from None
    backbone = build_backbone(name, embedding_size=embedding_size)
    backbone.load_state_dict(state_dict, strict=True)
    return name, backbone if scale is None else RescaledInput(backbone, scale.item())


def strip_module_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the `module.` that DataParallel and DistributedDataParallel put before every key."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return shapes by key, without the batch norms' counters, which files from before PyTorch 0.4.1 lack."""
    return {key: tuple(value.shape) for key, value in state_dict.items() if not key.endswith(".num_batches_tracked")}
