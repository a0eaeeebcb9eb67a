"""The identity term: what recognition sees of an enlarged face, and whom its gradient reaches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from applications.super_resolution.identity import IdentityLoss, crop_for_evaluation, load_identity
from model.backbone import build_backbone
from model.super_resolution import RCAN
from util.errors import DataError
from util.super_resolution import to_unit
from util.transform import eval_crop, normalize


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "Backbone_Best.pth"
    state = build_backbone("MobileFaceNet_025", embedding_size=32).state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, path)
    return path


def test_the_crop_is_that_of_evaluation():
    images = np.random.default_rng(3).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    ours = crop_for_evaluation(to_unit(torch.from_numpy(images))) * 255
    theirs = torch.from_numpy(eval_crop(images)).permute(0, 3, 1, 2)
    assert (ours - theirs).abs().max() < 1.01  # OpenCV computes in fixed point, and rounds
    assert (ours - theirs).abs().mean() < 0.3


def test_identity_loss_is_one_minus_cosine(backbone_file):
    description, identity = load_identity(backbone_file)
    assert description.startswith("MobileFaceNet_025 (this toolkit): embedding size 32")
    rng = np.random.default_rng(3)
    one, other = (
        np.kron(rng.integers(0, 256, (2, 14, 14, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8)) for _ in "ab"
    )
    backbone = identity._backbone
    with torch.no_grad():
        embeddings = [backbone(normalize(torch.from_numpy(eval_crop(images)))) for images in (one, other)]
        expected = (1 - torch.cosine_similarity(*embeddings)).mean()
        found = identity(*(to_unit(torch.from_numpy(images)) for images in (one, other)))
    assert found == pytest.approx(expected.item(), abs=2e-3) and expected > 0.01
    assert identity(*2 * [to_unit(torch.from_numpy(one))]).item() == pytest.approx(0, abs=1e-6)


def test_gradients_reach_the_network_and_not_the_backbone(backbone_file):
    _, identity = load_identity(backbone_file.parent)
    identity.train()  # as a training loop might
    before = {key: value.clone() for key, value in identity.state_dict().items()}
    network = RCAN(4, 4, 1, 1, 2)
    identity(network(torch.rand(2, 3, 28, 28)), torch.rand(2, 3, 112, 112)).backward()
    assert all(weight.grad is not None for weight in network.parameters())
    assert network.conv2.weight.grad.abs().sum() > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in identity.parameters())
    assert not any(module.training for module in identity.modules())
    assert all(torch.equal(value, before[key]) for key, value in identity.state_dict().items())


def test_identity_loss_gradient_increases_the_cosine(backbone_file):
    identity = IdentityLoss(load_identity(backbone_file)[1]._backbone)
    torch.manual_seed(1)
    images, real = torch.rand(1, 3, 112, 112, requires_grad=True), torch.rand(1, 3, 112, 112)
    optimizer = torch.optim.Adam([images], lr=0.02)
    losses = []
    for _ in range(6):
        loss = identity(images, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_identity_shows_a_public_network_whole_faces(tmp_path):
    backbone = build_backbone("MobileFaceNet_scale1", embedding_size=16).eval()
    torch.save(backbone.state_dict(), tmp_path / "public.pth")
    description, identity = load_identity(tmp_path / "public.pth")
    assert description.endswith("is shown whole 112x112 crops")
    one, other = torch.rand(2, 1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = 1 - torch.cosine_similarity(backbone(2 * one - 1), backbone(2 * other - 1))
    assert identity(one, other).item() == pytest.approx(expected.item(), abs=1e-6) and expected > 1e-4


def test_identity_refuses_an_onnx_network(tmp_path, monkeypatch):
    network = SimpleNamespace(is_trainable=False)
    monkeypatch.setattr("applications.super_resolution.identity.read_public_network", lambda *_, **__: network)
    (tmp_path / "net.onnx").touch()
    with pytest.raises(DataError, match=r"^--identity_backbone=.*net\.onnx: an ONNX network passes no gradients on\."):
        load_identity(tmp_path / "net.onnx")


def test_files_that_are_no_backbones_are_refused(tmp_path):
    torch.save(RCAN(2, 4, 1, 1, 2).state_dict(), tmp_path / "SR_Best.pth")
    for path, message in (("SR_Best.pth", "SR_Best.pth: not a backbone's state dict"), ("gone", "gone: no such file")):
        with pytest.raises(DataError, match=message) as caught:
            load_identity(tmp_path / path)
        assert str(caught.value).startswith("--identity_backbone=")
