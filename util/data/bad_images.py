"""Training images that cannot be used: replaced, reported once, counted, and fatal when they are too many."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from util.console import logger
from util.errors import DataError

MIN_SEEN = 1000  # images, before their fraction can end a run


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used: its place, and the one-line reason, which names the place."""

    name: str
    reason: str


class BadImages:
    """Counts the images of a run and the bad ones among them.

    The loader adds each batch when it hands the batch over, which may be ahead of the training step. The training loop
    calls count_batch() once a step. So the state after a step belongs to what was trained.

    A run ends when more than the fraction `max_bad` of the images seen were bad, but not before MIN_SEEN images, and
    not for a single file, or a small set would end with its first bad image. With 0, the loader raises that error.
    """

    def __init__(self, root: object, max_bad: float):
        self.seen = 0  # images read, those that replace bad ones included
        self.bad = 0
        self.names: dict[str, None] = {}  # each bad image once, in the order of their appearance
        self.max_bad = max_bad
        self._root = root
        self._ahead: deque[tuple[int, Sequence[BadImage]]] = deque()

    def add(self, size: int, bad: Sequence[BadImage]) -> None:
        """Add a batch of `size` images that is handed over, and the bad images that others replace in it."""
        self._ahead.append((size, bad))

    def count_batch(self) -> None:
        """Count the oldest batch that was added and log its new bad images. Raise DataError if there are too many."""
        size, found = self._ahead.popleft()
        self.seen += size + len(found)
        self.bad += len(found)
        for image in found:
            if image.name not in self.names:
                self.names[image.name] = None
                logger.warning(f"{image.reason} Another image is used instead.")
        if self.seen >= MIN_SEEN and len(self.names) > 1 and self.bad > self.max_bad * self.seen:
            text = f"{self.bad:,} of {self.seen:,} images cannot be used"
            rule = f"more than --max_bad={self.max_bad:g} allows, first {next(iter(self.names))}"
            fix = "Remove them (python -m applications.prepare.check lists them), or raise --max_bad."
            raise DataError(f"{self._root}: {text}, {rule}. {fix}")

    def discard_ahead(self) -> None:
        """Forget batches that were handed over and not trained on."""
        self._ahead.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the names, for exact resume."""
        return {"seen": self.seen, "bad": self.bad, "names": list(self.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the counts of a checkpoint."""
        self.seen = state["seen"]
        self.bad = state["bad"]
        self.names = dict.fromkeys(state["names"])
