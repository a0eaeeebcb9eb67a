"""InsightFace's vision transformers (arcface_torch), with its module names: public checkpoints load strictly.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021); An et al., "Killing Two Birds with One Stone: Efficient and
Robust Training of Face Recognition CNNs by Partial FC" (2022). There is no class token: the features of all patches
together make the embedding.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone.recompute import Block

DROP_PATH = 0.1  # of the last block; stochastic depth grows linearly from 0 at the first block
MASKED = 0.1  # of the patches, in training


class VisionTransformer(nn.Module):
    """(N, 3, 112, 112) RGB in [-1, 1] -> (N, embedding_size), not normalized.

    vit_t, vit_s and vit_b are arcface_torch's. Its further names (vit_t_dp005_mask0 and so on) are the same networks
    trained with less stochastic depth or masking, so their weights load too.

    With `masked`, in training, a random tenth of the patches skips the blocks, and a learned token stands for each
    after them.

    Initial weights: linear layers, positions and token normal with standard deviation 0.02, the convolution as in
    PyTorch.

    Args:
        embedding_size: length of an embedding.
        width: channels of a patch.
        depth: number of blocks.
        patch: side of a patch, in pixels. What remains of 112 pixels at the right and bottom is not seen.
        heads: heads of the attention.
        mlp_ratio: hidden channels of a block's perceptron, as a multiple of `width`.
        masked: mask patches in training.
    """

    def __init__(
        self,
        embedding_size: int = 512,
        *,
        width: int,
        depth: int,
        patch: int = 9,
        heads: int = 8,
        mlp_ratio: int = 4,
        masked: bool = True,
    ):
        super().__init__()
        patches = (112 // patch) ** 2
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, patch), flatten=nn.Flatten(2)))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if masked else None
        self.blocks = nn.ModuleList(
            _Block(width, heads, mlp_ratio, drop_path=DROP_PATH * index / (depth - 1)) for index in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(patches * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).transpose(1, 2) + self.pos_embed  # (N, patches, width)
        if self.training and self.mask_token is not None:
            order = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
            seen = order[:, : int(x.shape[1] * (1 - MASKED)), None].expand(-1, -1, x.shape[2])
            encoded = self._encode(x.gather(1, seen))
            x = self.mask_token.to(encoded.dtype).expand_as(x).scatter(1, seen, encoded)
        else:
            x = self._encode(x)
        return self.feature(x.flatten(1))

    def _encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(Block):
    """Attention and a perceptron, each after a layer norm and with a shortcut around it."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        hidden = width * mlp_ratio
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.ReLU6(), fc2=nn.Linear(hidden, width))
        )
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, branch: Tensor) -> Tensor:
        """Drop the branch for some samples in training: stochastic depth, Huang et al. (2016)."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (N, patches, 3 * width) -> three tensors of (N, heads, patches, width / heads).
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
