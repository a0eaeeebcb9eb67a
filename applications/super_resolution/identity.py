"""The identity term: an enlarged face is to be the same person to a recognition network as the real one."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from util.checkpoint.io import load_backbone
from util.checkpoint.run_dir import find_network
from util.transform import RESIZED, SIZE

_FLAG = "--identity_backbone"


def crop_for_evaluation(images: torch.Tensor) -> torch.Tensor:
    """util.transform.eval_crop, through which gradients flow: (N, 3, S, S) float -> (N, 3, 112, 112)."""
    start = (RESIZED - SIZE) // 2
    resized = F.interpolate(images, (RESIZED, RESIZED), mode="bilinear", align_corners=False)
    return resized[:, :, start : start + SIZE, start : start + SIZE]


class IdentityLoss(nn.Module):
    """1 - cosine between the embeddings of two images of a face, the mean over a batch.

    The backbone stays as it is: in eval mode, and no gradient reaches its weights.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self._backbone = backbone.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "IdentityLoss":
        return super().train(False)

    def forward(self, enlarged: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Two times (N, 3, 112, 112) RGB in [0, 1] -> a number. Gradients flow to `enlarged` alone."""
        with torch.no_grad():
            wanted = self._embed(real)
        return 1 - F.cosine_similarity(self._embed(enlarged.clamp(0, 1)), wanted).mean()

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        return self._backbone(crop_for_evaluation(images) * 2 - 1)


def load_identity(path: str | Path) -> tuple[str, IdentityLoss]:
    """The name of the recognition network in a Backbone file, or in a run's best or newest, and the term with it."""
    file = find_network(path, "Backbone", flag=_FLAG)
    name, backbone = load_backbone(file, f"{_FLAG}={file}")
    return name, IdentityLoss(backbone)
