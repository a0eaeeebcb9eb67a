"""Which images make up the batches of an epoch, on one process or on many, and the random numbers of each."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Batch:
    """Which images make up one batch: positions start, start + 1, ... of the epoch's order."""

    epoch: int
    start: int
    indices: np.ndarray  # (B,)


class BalancedSampler(Sampler[Batch]):
    """Draws images with replacement, every class as often as any other (weight 1 / class size).

    The order is a pure function of (seed, epoch), and the same on all ranks. Of each step's global batch, which is
    `world_size` batches of `batch_size` images, rank r takes the r-th: R ranks with batches of B see in each step what one
    process with batches of R * B sees. An epoch has `steps` steps, or by default as many as N images fill; a last
    partial global batch is dropped, so all ranks make the same number of steps.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: ranks count from 0 to {world_size - 1}")
        self.epoch = 0
        self._batch_size, self._seed, self._rank = batch_size, seed, rank
        self._global_batch = batch_size * world_size
        self._total = len(labels) if steps is None else steps * self._global_batch
        self._by_class = np.argsort(labels, kind="stable")
        self._sizes = np.bincount(labels)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def __len__(self) -> int:
        """The number of steps of an epoch, on every rank."""
        return self._total // self._global_batch

    def order(self, epoch: int) -> np.ndarray:
        """The indices of the images of an epoch for all ranks, (N,) or (steps * global batch,)."""
        rng = np.random.default_rng([self._seed, epoch])
        classes = rng.integers(len(self._sizes), size=self._total)
        within = (rng.random(self._total) * self._sizes[classes]).astype(np.int64)
        return self._by_class[self._starts[classes] + within]

    def __iter__(self) -> Iterator[Batch]:
        order = self.order(self.epoch)
        for step in range(len(self)):
            start = step * self._global_batch + self._rank * self._batch_size
            yield Batch(self.epoch, start, order[start : start + self._batch_size])


class SampleRng:
    """The random numbers of the samples of an epoch, each a pure function of (seed, epoch, position in the order).

    Philox encrypts a counter under a key (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), so one
    generator with the key (seed, epoch) moves to any sample at once, where seeding a new one takes as long as resizing
    an image. Each position has 2^64 numbers of the counter for itself.
    """

    def __init__(self, seed: int, epoch: int):
        self._philox = np.random.Philox(key=np.array([seed, epoch], np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def at(self, position: int) -> np.random.Generator:
        """The generator of one sample, good until the next call."""
        self._state["state"]["counter"][1] = position
        self._philox.state = self._state  # the rest of it says that no number has been drawn yet
        return self._generator
