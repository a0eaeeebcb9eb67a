"""Which RCAN a state dict belongs to: its keys and shapes say it, whoever wrote the file."""

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
    """(scale, sizes), so that RCAN(scale, **sizes) has these keys and shapes. `module.` prefixes do no harm.

    Raises ValueError that names a key which does not fit.
    """
    shapes = {str(key).removeprefix("module."): tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    blocks = [match.groups() for match in map(_BLOCK.fullmatch, shapes) if match]
    groups = {group for group, _ in blocks}
    squeezed = [shape[0] for key, shape in shapes.items() if key.endswith(".module.1.weight") and len(shape) == 4]
    if not groups or not squeezed or not squeezed[0] or len(shapes.get("sf.weight", ())) != 4:
        raise ValueError(f"the {len(shapes)} keys are not those of RCAN, which has sf.weight and rgs.0.module.0 ...")
    features = shapes["sf.weight"][0]
    sizes = {
        "num_features": features,
        "num_rg": len(groups),
        "num_rcab": len({block for _, block in blocks}),
        "reduction": features // squeezed[0] or 1,
    }
    scale = 2 ** sum(_DOUBLING.fullmatch(key) is not None for key in shapes)
    with torch.device("meta"):  # shapes only: no memory, no random numbers drawn
        expected = {key: tuple(value.shape) for key, value in RCAN(scale, **sizes).state_dict().items()}
    for key in chain(expected, shapes):
        if expected.get(key) != shapes.get(key):
            found, wanted = (keys.get(key, "absent") for keys in (shapes, expected))
            raise ValueError(f"{key} is {found}, and {wanted} in the RCAN that the other keys belong to")
    return scale, sizes


def rcan_from_state_dict(state_dict: Mapping[str, Tensor]) -> RCAN:
    """The RCAN of a state dict, with its weights and in eval mode. Raises ValueError as identify_rcan does."""
    scale, sizes = identify_rcan(state_dict)
    network = RCAN(scale, **sizes)
    network.load_state_dict(strip_module_prefix(state_dict), strict=True)
    return network.eval()
