"""Gradient checkpointing: the same gradients, statistics and random numbers from less memory."""

import copy

import pytest
import torch
from torch import nn

from model.backbone.iresnet import IResNet
from model.backbone.irse import _Block as IRSEBlock
from model.backbone.mobilefacenet import MobileFaceNet
from model.backbone.recompute import Block, recompute_blocks
from model.backbone.vit import VisionTransformer
from util.device import prepare_module


def ir_se(embedding_size: int) -> nn.Module:
    """Return a short network of the IR-SE blocks. IR_SE_50 itself takes seconds."""
    blocks = (IRSEBlock(32, 64, stride=2, squeeze=True), IRSEBlock(64, 64, stride=2, squeeze=True))
    first = nn.Conv2d(3, 32, 7, stride=4)
    return nn.Sequential(first, *blocks, nn.Flatten(), nn.Dropout(), nn.Linear(64 * 7 * 7, embedding_size))


NETWORKS = {
    "IR_SE": lambda: ir_se(8),
    "iresnet": lambda: IResNet(18, embedding_size=8),
    "MobileFaceNet": lambda: MobileFaceNet(embedding_size=8, width=0.125),
    "vit": lambda: VisionTransformer(8, width=16, depth=3, heads=2),
}


def gradients(backbone: nn.Module, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """Return the gradients of two steps together, and the state of the random generator after them."""
    torch.manual_seed(1)
    runner = prepare_module(backbone, [torch.device("cpu")], dtype=dtype).train()
    for images in torch.rand(2, 3, 3, 112, 112):
        runner(images).square().sum().backward()
    named = {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    return named, torch.get_rng_state()


def kept_bytes(backbone: nn.Module) -> int:
    """Return the size of the tensors that forward keeps for backward, the weights included."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backbone.train()(torch.rand(3, 3, 112, 112))
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_blocks_give_the_same_gradients(name, dtype):
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    recomputed = copy.deepcopy(plain)
    recompute_blocks(recomputed)
    assert sum(isinstance(each, Block) for each in recomputed.modules()) >= 2
    expected, random_state = gradients(plain, dtype)
    found, random_state_after = gradients(recomputed, dtype)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    for key, value in plain.state_dict().items():  # the running statistics too
        assert torch.equal(value, recomputed.state_dict()[key]), key
    assert torch.equal(random_state, random_state_after)


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_blocks_keep_less(name):
    backbone = NETWORKS[name]()
    activations = kept_bytes(backbone)
    recompute_blocks(backbone)
    assert kept_bytes(backbone) < activations * 0.6


def test_recomputed_blocks_change_nothing_in_evaluation():
    backbone = ir_se(8).eval()
    recomputed = copy.deepcopy(backbone)
    recompute_blocks(recomputed)
    images = torch.rand(2, 3, 112, 112, requires_grad=True)
    assert torch.equal(backbone(images), recomputed(images))


def test_an_error_in_backward_leaves_the_buffers():
    backbone = ir_se(8).train()
    recompute_blocks(backbone)
    embeddings = backbone(torch.rand(2, 3, 112, 112))
    buffers = dict(backbone.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    backbone[2].res_layer[4].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embeddings.sum().backward()
    for name, buffer in backbone.named_buffers():
        assert buffer is buffers[name] and torch.equal(buffer, before[name])
