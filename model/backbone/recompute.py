"""Gradient checkpointing: blocks that compute their activations again in backward instead of keeping them.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A block of a backbone. With `is_recomputed`, it only keeps its input for backward, where it runs again.

    The gradients are the same. Dropout draws the same numbers in both runs. Running statistics are updated in the first
    run alone.
    """

    is_recomputed = False

    def __call__(self, x: Tensor) -> Tensor:
        if not (self.is_recomputed and self.training and torch.is_grad_enabled()):
            return super().__call__(x)
        return checkpoint(
            super().__call__,
            x,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), self._with_copied_buffers()),
        )

    @contextmanager
    def _with_copied_buffers(self) -> Iterator[None]:
        """Let batch norms update copies of their running statistics, which are then dropped."""
        buffers = [
            (each, name, buffer) for each in self.modules() for name, buffer in each.named_buffers(recurse=False)
        ]
        for module, name, buffer in buffers:
            setattr(module, name, buffer.clone())
        try:
            yield
        finally:
            for module, name, buffer in buffers:
                setattr(module, name, buffer)


def recompute_blocks(backbone: nn.Module) -> None:
    """Let the blocks of a backbone compute their activations again in backward."""
    for module in backbone.modules():
        if isinstance(module, Block):
            module.is_recomputed = True
