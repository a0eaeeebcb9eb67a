"""Identity loss: a recognition network should see the same identity in an enlarged face and in the real face."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from util.checkpoint.run_dir import find_backbone
from util.errors import DataError
from util.face import CROP_FROM, FACE_SIZE
from util.public_networks import read_public_network

_FLAG = "--identity_backbone"


def crop_for_evaluation(images: torch.Tensor) -> torch.Tensor:
    """Crop (N, 3, S, S) float images to (N, 3, 112, 112) like util.transform.eval_crop, but differentiable."""
    start = (CROP_FROM - FACE_SIZE) // 2
    resized = F.interpolate(images, (CROP_FROM, CROP_FROM), mode="bilinear", align_corners=False)
    return resized[:, :, start : start + FACE_SIZE, start : start + FACE_SIZE]


class IdentityLoss(nn.Module):
    """1 - cosine between the embeddings of two images of a face, the mean over a batch.

    The backbone is frozen: it stays in eval mode, and its weights get no gradients. It is shown the images as
    crop_for_evaluation() crops them, or whole.
    """

    def __init__(self, backbone: nn.Module, is_full: bool = False):
        super().__init__()
        self._backbone = backbone.requires_grad_(False)
        self._is_full = is_full
        self.eval()

    def train(self, mode: bool = True) -> "IdentityLoss":
        return super().train(False)

    def forward(self, enlarged: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the loss of two (N, 3, 112, 112) RGB batches in [0, 1]. Only `enlarged` gets gradients."""
        with torch.no_grad():
            target = self._embed(real)
        return 1 - F.cosine_similarity(self._embed(enlarged.clamp(0, 1)), target).mean()

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        shown = images if self._is_full else crop_for_evaluation(images)
        return self._backbone(shown * 2 - 1)


def load_identity(path: str | Path) -> tuple[str, IdentityLoss]:
    """Load the recognition network that `path` stands for. Return its description and the identity loss under it."""
    file = find_backbone(path, flag=_FLAG)
    network = read_public_network(file, source=f"{_FLAG}={file}")
    if not network.is_trainable:
        raise DataError(f"{_FLAG}={file}: an ONNX network passes no gradients on. Give a PyTorch file of it.")
    return network.describe(), IdentityLoss(network.network, is_full=network.crop == "whole")
