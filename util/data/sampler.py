"""The order of the images in an epoch, on one process or many, and the random numbers of each sample."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class BatchIndices:
    """The images of one batch: `indices` (B,), at positions start, start + 1, ... of the epoch's order."""

    epoch: int
    start: int
    indices: np.ndarray


class BalancedSampler(Sampler[BatchIndices]):
    """Draws images with replacement so that every class is drawn equally often (weight 1 / class size).

    The order is a pure function of (seed, epoch), and the same on all ranks. A step has a global batch: `world_size`
    batches of `batch_size` images, of which rank r takes batch r. So R ranks with batches of B images see in each step
    what one process with batches of R * B images sees. The last partial global batch is dropped, so all ranks make the
    same number of steps.
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
        """Set up the sampler for images with the classes `labels`, (N,) integers. The rest is as in TrainLoader."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: ranks count from 0 to {world_size - 1}")
        self.epoch = 0
        self.start_step = 0  # of the next iteration; the steps before it are left out
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._global_batch_size = batch_size * world_size
        self._num_samples = len(labels) if steps is None else steps * self._global_batch_size
        # Images sorted by class: class c has _by_class[_starts[c] : _starts[c] + _sizes[c]].
        self._by_class = np.argsort(labels, kind="stable")
        self._sizes = np.bincount(labels)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def __len__(self) -> int:
        """Return the number of steps of an epoch, the same on every rank."""
        return self._num_samples // self._global_batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices of the images of an epoch for all ranks: (N,) or (steps * global batch size,)."""
        rng = np.random.default_rng([self._seed, epoch])
        classes = rng.integers(len(self._sizes), size=self._num_samples)
        within_class = (rng.random(self._num_samples) * self._sizes[classes]).astype(np.int64)
        return self._by_class[self._starts[classes] + within_class]

    def __iter__(self) -> Iterator[BatchIndices]:
        order = self.order(self.epoch)
        for step in range(self.start_step, len(self)):
            start = step * self._global_batch_size + self._rank * self._batch_size
            yield BatchIndices(self.epoch, start, order[start : start + self._batch_size])


class SampleRng:
    """Random numbers of each sample: a pure function of (seed, epoch, position in the order).

    Philox encrypts a counter under a key (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). One
    generator with the key (seed, epoch) therefore moves to any sample at once. Seeding a new generator would take as
    long as resizing an image. Each position has 2^64 values of the counter for itself.
    """

    def __init__(self, seed: int, epoch: int):
        self._philox = np.random.Philox(key=np.array([seed, epoch], np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def for_sample(self, position: int) -> np.random.Generator:
        """Return the generator of the sample at a position. It is valid until the next call."""
        # The rest of the state says that no number has been drawn yet.
        self._state["state"]["counter"][1] = position
        self._philox.state = self._state
        return self._generator
