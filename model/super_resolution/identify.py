"""The RCAN that fits a state dict, detected from its keys and shapes."""

import re
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from model.backbone import strip_module_prefix
from model.super_resolution.rcan import RCAN

_BLOCK = re.compile(r"rgs\.(\d+)\.module\.(\d+)\.module\.0\.weight")
_DOUBLING = re.compile(r"upscale\.\d+\.weight")


def identify_rcan(state_dict: Mapping[str, Tensor]) -> tuple[int, dict[str, int]]:
    """Return (scale, sizes), so that RCAN(scale, **sizes) has the keys and shapes of the state dict.

    The keys may have `module.` prefixes. Raises ValueError with the first key that does not fit.
    """
    shapes = {str(key).removeprefix("module."): tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    groups = set()  # residual groups
    blocks = set()  # blocks within a group
    squeezed = []  # channels after the squeeze of channel attention
    for key, shape in shapes.items():
        if match := _BLOCK.fullmatch(key):
            groups.add(match[1])
            blocks.add(match[2])
        if key.endswith(".module.1.weight") and len(shape) == 4:
            squeezed.append(shape[0])
    if not groups or not squeezed or not squeezed[0] or len(shapes.get("sf.weight", ())) != 4:
        raise ValueError(f"the {len(shapes)} keys do not belong to RCAN, which has sf.weight and rgs.0.module.0 ...")
    features = shapes["sf.weight"][0]
    sizes = {
        "num_features": features,
        "num_rg": len(groups),
        "num_rcab": len(blocks),
        "reduction": features // squeezed[0] or 1,
    }
    scale = 2 ** sum(_DOUBLING.fullmatch(key) is not None for key in shapes)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        expected = {key: tuple(value.shape) for key, value in RCAN(scale, **sizes).state_dict().items()}
    for key in chain(expected, shapes):
        if expected.get(key) != shapes.get(key):
            raise ValueError(
                f"{key} is {shapes.get(key, 'missing')}, but {expected.get(key, 'missing')} in the RCAN that fits the "
                f"other keys"
            )
    return scale, sizes


def rcan_from_state_dict(state_dict: Mapping[str, Tensor]) -> RCAN:
    """Return the RCAN that fits a state dict, with its weights and in eval mode. Raises ValueError if none fits."""
    scale, sizes = identify_rcan(state_dict)
    network = RCAN(scale, **sizes)
    network.load_state_dict(strip_module_prefix(state_dict), strict=True)
    return network.eval()
