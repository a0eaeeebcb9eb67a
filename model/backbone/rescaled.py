"""A backbone whose images are in another range than [-1, 1]."""

import torch
from torch import Tensor, nn


class RescaledInput(nn.Module):
    """Takes images in [-1, 1], and shows them to a backbone in [0, 2 * scale].

    The range cannot move into the first convolution: its padding of zeros means another color then. The scale is in the
    state dict, so a copy that was trained further is loaded with it.
    """

    input_scale: Tensor

    def __init__(self, backbone: nn.Module, scale: float):
        super().__init__()
        self.register_buffer("input_scale", torch.tensor(scale))
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone((images + 1) * self.input_scale)
