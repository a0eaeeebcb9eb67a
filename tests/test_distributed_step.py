"""A training step of several ranks against a training step of one."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from model.head import PartialFC, build_head, shard_range
from model.loss import build_loss
from tests.multiprocess import in_processes
from util.device import wrap_ddp
from util.training.engine import TrainingStep
from util.training.optim import build_sgd

CPU = torch.device("cpu")
CLASSES, BATCH = 7, 12

pytestmark = pytest.mark.slow


class Backbone(nn.Sequential):
    """Backbone (N, 3, 8, 8) -> (N, 6), whose output or gradient on one rank can be made infinite."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 36, 6))
        self.overflow, self.forwards = "", 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        embeddings = super().forward(images)
        if self.overflow == "output":
            return embeddings * float("inf")
        if self.overflow == "gradient":
            embeddings.register_hook(lambda gradient: gradient * float("inf"))
        return embeddings


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (BATCH, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def weights(rank: int, world_size: int, accumulate: int, overflow: str = "", clip_grad_norm: float = 0.0) -> dict:
    """Return the weights after two steps, the first with an `overflow` on the last rank, and what was reduced."""
    backbone, loss = Backbone(), build_loss("focal")
    torch.manual_seed(4)
    head = build_head("ArcFace", 6, CLASSES, s=8.0, m=0.3, rows=shard_range(CLASSES, rank, world_size))
    optimizer = build_sgd([backbone, head], 0.1, 0.9, 5e-4, torch.float16 if overflow else torch.float32)
    scaler = torch.amp.GradScaler("cpu", enabled=bool(overflow))
    images, labels = (values.chunk(world_size)[rank] for values in batch())
    runner = wrap_ddp(backbone, CPU) if world_size > 1 else backbone
    all_reduces = []
    if world_size > 1:
        runner.register_comm_hook(all_reduces, counted_mean)
    loss_fn = PartialFC(head, loss)
    step = TrainingStep(
        runner,
        head,
        loss,
        optimizer,
        CPU,
        accumulate=accumulate,
        scaler=scaler,
        loss_fn=loss_fn,
        clip_grad_norm=clip_grad_norm,
    )
    before = [p.detach().clone() for p in (*backbone.parameters(), head.weight)]
    backbone.overflow = overflow if rank == world_size - 1 else ""
    step(images, labels)
    unchanged = all(torch.equal(p, old) for p, old in zip((*backbone.parameters(), head.weight), before, strict=True))
    backbone.overflow = ""
    step(images, labels)
    return {
        "backbone": backbone.state_dict(),
        "head": head.weight.detach(),
        "unchanged": unchanged,
        "all_reduces": len(all_reduces),
        "forwards": backbone.forwards,
        "scale": scaler.get_scale(),
    }


def counted_mean(all_reduces: list, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    all_reduces.append(bucket.index())
    return allreduce_hook(None, bucket)


def test_micro_batches_on_two_ranks_give_the_same_weights(tmp_path: Path) -> None:
    expected = weights(0, 1, accumulate=1)
    full = in_processes(2, tmp_path, partial(weights, accumulate=1))
    split = in_processes(2, tmp_path, partial(weights, accumulate=3))
    for found in (full, split):
        for one in found:
            for key, value in expected["backbone"].items():
                torch.testing.assert_close(one["backbone"][key], value, rtol=1e-5, atol=1e-6)
        head = torch.cat([one["head"] for one in found])
        torch.testing.assert_close(head, expected["head"], rtol=1e-5, atol=1e-6)
    assert split[0]["forwards"] == 3 * full[0]["forwards"] == 6
    assert split[0]["all_reduces"] == full[0]["all_reduces"] == 2


def test_clipping_on_two_ranks_gives_the_weights_of_one(tmp_path: Path) -> None:
    free = weights(0, 1, accumulate=1)
    expected = weights(0, 1, accumulate=1, clip_grad_norm=0.5)
    found = in_processes(2, tmp_path, partial(weights, accumulate=1, clip_grad_norm=0.5))
    assert (free["head"] - expected["head"]).abs().max() > 1e-3
    for one in found:
        for key, value in expected["backbone"].items():
            torch.testing.assert_close(one["backbone"][key], value, rtol=1e-5, atol=1e-6)
    head = torch.cat([one["head"] for one in found])
    torch.testing.assert_close(head, expected["head"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overflow", ["output", "gradient"])
def test_step_that_overflows_on_one_rank_is_skipped_by_all(overflow: str, tmp_path: Path) -> None:
    one, other = in_processes(2, tmp_path, partial(weights, accumulate=1, overflow=overflow))
    assert one["unchanged"] and other["unchanged"]
    assert one["scale"] == other["scale"] == 2.0**15
    for key, value in one["backbone"].items():
        assert value.isfinite().all() and torch.equal(value, other["backbone"][key])
    assert one["head"].isfinite().all() and other["head"].isfinite().all()
