"""A training step of several processes against that of one."""

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
    """(N, 3, 8, 8) -> (N, 6). Output and gradient of the samples of one process can be spoilt."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 36, 6))
        self.spoils, self.forwards = "", 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        embeddings = super().forward(images)
        if self.spoils == "output":
            return embeddings * float("inf")
        if self.spoils == "gradient":
            embeddings.register_hook(lambda gradient: gradient * float("inf"))
        return embeddings


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (BATCH, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def weights(rank: int, ranks: int, accumulate: int, spoils: str = "") -> dict:
    """The weights after two steps, the first of which the last process may spoil, and how much was exchanged."""
    backbone, loss = Backbone(), build_loss("focal")
    torch.manual_seed(4)
    head = build_head("ArcFace", 6, CLASSES, s=8.0, m=0.3, rows=shard_range(CLASSES, rank, ranks))
    optimizer = build_sgd([backbone, head], 0.1, 0.9, 5e-4, torch.float16 if spoils else torch.float32)
    scaler = torch.amp.GradScaler("cpu", enabled=bool(spoils))
    images, labels = (values.chunk(ranks)[rank] for values in batch())
    runner = wrap_ddp(backbone, CPU) if ranks > 1 else backbone
    exchanged = []
    if ranks > 1:
        runner.register_comm_hook(exchanged, counted_mean)
    objective = PartialFC(head, loss)
    step = TrainingStep(runner, head, loss, optimizer, CPU, accumulate, scaler, objective)
    before = [p.detach().clone() for p in (*backbone.parameters(), head.weight)]
    backbone.spoils = spoils if rank == ranks - 1 else ""
    step(images, labels)
    stayed = all(torch.equal(p, old) for p, old in zip((*backbone.parameters(), head.weight), before, strict=True))
    backbone.spoils = ""
    step(images, labels)
    return {
        "backbone": backbone.state_dict(),
        "head": head.weight.detach(),
        "stayed": stayed,
        "exchanged": len(exchanged),
        "forwards": backbone.forwards,
        "scale": scaler.get_scale(),
    }


def counted_mean(exchanged: list, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    exchanged.append(bucket.index())
    return allreduce_hook(None, bucket)


def test_parts_of_a_batch_in_each_process_give_the_weights_of_one_and_are_exchanged_once(tmp_path: Path) -> None:
    whole = weights(0, 1, accumulate=1)
    once = in_processes(2, tmp_path, partial(weights, accumulate=1))
    parted = in_processes(2, tmp_path, partial(weights, accumulate=3))
    for found in (once, parted):
        for one in found:
            for key, value in whole["backbone"].items():
                torch.testing.assert_close(one["backbone"][key], value, rtol=1e-5, atol=1e-6)
        together = torch.cat([one["head"] for one in found])
        torch.testing.assert_close(together, whole["head"], rtol=1e-5, atol=1e-6)
    assert parted[0]["forwards"] == 3 * once[0]["forwards"] == 6
    assert parted[0]["exchanged"] == once[0]["exchanged"] == 2


@pytest.mark.parametrize("spoils", ["output", "gradient"])
def test_a_step_that_overflows_in_one_process_is_left_out_by_all(spoils: str, tmp_path: Path) -> None:
    one, other = in_processes(2, tmp_path, partial(weights, accumulate=1, spoils=spoils))
    assert one["stayed"] and other["stayed"]
    assert one["scale"] == other["scale"] == 2.0**15
    for key, value in one["backbone"].items():
        assert value.isfinite().all() and torch.equal(value, other["backbone"][key])
    assert one["head"].isfinite().all() and other["head"].isfinite().all()
