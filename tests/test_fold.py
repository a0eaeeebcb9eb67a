"""Folded batch norms: the same embeddings from fewer operations, and the original network unchanged."""

import copy
import math
import zlib

import pytest
import torch
from torch import nn

from model.backbone import build_backbone
from model.backbone.fold import fold_batch_norm
from tests.test_backbone import ALL


def filled(name: str, **settings: int) -> nn.Module:
    """Return a backbone whose batch norms have random scales, shifts and statistics."""
    with torch.device("meta"):
        backbone = build_backbone(name, embedding_size=16, **settings).eval()
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    backbone.load_state_dict({key: _value(key, shape) for key, shape in shapes.items()}, assign=True)
    return backbone


def _value(key: str, shape: torch.Size) -> torch.Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) > 1:
        return normal * (0.25 / math.prod(shape[1:])) ** 0.5
    if key.endswith("running_var"):
        return 1 + 0.1 * normal.abs()
    return normal.new_tensor(key.endswith(".weight")) + 0.1 * normal if shape else torch.tensor(0)


def random_images(count: int, size: int = 112) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.inference_mode()
def difference(backbone: nn.Module, folded: nn.Module, images: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest element of the embeddings."""
    expected = backbone(images)
    return ((folded(images) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ALL)
def test_fold_keeps_the_embeddings(name):
    backbone = filled(name)
    assert difference(backbone, fold_batch_norm(backbone), random_images(1)) < 1e-5


def test_fold_keeps_the_embeddings_of_224_pixels():
    backbone = filled("IR_50", input_size=224)
    assert difference(backbone, fold_batch_norm(backbone), random_images(1, 224)) < 1e-5


@pytest.mark.parametrize("name", ["IR_SE_50", "iresnet18", "MobileFaceNet"])
def test_fold_leaves_no_batch_norm_next_to_a_convolution(name):
    left = [module for module in fold_batch_norm(build_backbone(name)).modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(left) == (0 if name == "MobileFaceNet" else 1)  # the one before the linear layer, of 7x7 pixels


def test_fold_handles_channels_with_scale_zero():
    backbone = filled("iresnet18")
    with torch.no_grad():
        backbone.layer2[0].bn1.weight[::2] = 0
        backbone.layer3[1].bn2.weight[:] = 0
    assert difference(backbone, fold_batch_norm(backbone), random_images(1)) < 1e-5


def test_fold_leaves_the_backbone_unchanged():
    backbone = build_backbone("IR_SE_50", embedding_size=16).train()
    before = copy.deepcopy(backbone.state_dict())
    folded = fold_batch_norm(backbone)
    assert backbone.training and not folded.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    with torch.no_grad():
        for tensor in folded.state_dict().values():
            tensor.zero_()
    after = backbone.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_fold_works_with_channels_last():
    backbone = filled("IR_SE_50")
    folded = fold_batch_norm(backbone).to(memory_format=torch.channels_last)
    assert difference(backbone, folded, random_images(2).to(memory_format=torch.channels_last)) < 1e-5
