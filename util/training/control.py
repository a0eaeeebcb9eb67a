"""When to stop and when to save within an epoch, decided together by all ranks."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from util.cli.types import Interval
from util.distributed import DistEnv
from util.errors import (
    STOP_SIGNALS,
    Interrupted,
    leave_at_once,
    leave_on_stop_signal,
    on_stop_signal,
    write_at_once,
)

# A terminal sends Ctrl-C to torchrun and to the ranks, and torchrun sends it to the ranks again.
_SAME_SIGNAL = 10  # seconds
_EVALUATION_RISK = 60  # seconds of training that may be unsaved while an evaluation, which can take hours, runs


class StopSignals:
    """Keep the first of STOP_SIGNALS until the training loop asks for it. A second one ends the process at once.

    with StopSignals(DistEnv()) as signals:
        train_a_step()                  # signals.received is the number of the signal, or 0
        with signals.raised():
            evaluate()                  # a signal raises Interrupted here
    """

    def __init__(self, env: DistEnv):
        self.received = 0
        self._env = env
        self._time = 0.0
        self._is_raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        on_stop_signal(self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # After a first signal a second one ends the process, also in the rest of the program.
        if self.received and not self._env.is_distributed:
            leave_on_stop_signal()

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise Interrupted for a signal in the block. Ranks cannot: each would stop at another place, and wait."""
        if not self._env.is_distributed:
            self._is_raised = True
            if self.received:
                raise Interrupted(self.received)
        try:
            yield
        finally:
            self._is_raised = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            is_repeated = self._env.is_distributed and time.monotonic() - self._time < _SAME_SIGNAL
            if is_repeated or number == signal.SIGHUP:  # a shell that ends sends it again
                return
            leave_at_once(number, frame)
        self.received = number
        self._time = time.monotonic()
        if self._env.is_main_process:
            name = signal.Signals(number).name
            write_at_once(f"{name}: saving a checkpoint after this step; a second signal ends at once")
        if self._is_raised:
            raise Interrupted(number)


class StepControl:
    """Whether to save and whether to stop after a step, the same on all ranks.

    Args:
        env: this process among the ranks.
        signals: received by this process.
        device: of the tensors that ranks exchange.
        save_every: the interval of the rolling checkpoint. The clock of rank 0 decides.

    Attributes:
        stop: the number of the signal to stop for, 0 for none.
        save: whether the rolling checkpoint is due.
    """

    def __init__(self, env: DistEnv, signals: StopSignals, device: torch.device, save_every: Interval):
        self.stop = 0
        self.save = False
        self._env = env
        self._signals = signals
        self._device = device
        self._save_every = save_every
        self.saved()

    def saved(self) -> None:
        """Begin a new interval: a checkpoint is saved."""
        self._steps = 0
        self._time = time.monotonic()

    def agree(self, condition: Tensor | bool, before_evaluation: bool = False) -> bool:
        """Return whether `condition` holds on all ranks. The same message exchanges `stop` and `save`.

        Within a step, the step counts as done. Before an evaluation `save` is set earlier: after a minute.
        """
        interval = self._save_every
        steps = self._steps if before_evaluation else self._steps + 1
        seconds = min(interval.seconds, _EVALUATION_RISK) if before_evaluation else interval.seconds
        is_due = bool(interval.steps and steps >= interval.steps) or bool(
            interval.seconds and time.monotonic() - self._time >= seconds
        )
        if not self._env.is_distributed:
            self.stop, self.save = self._signals.received, is_due
            return bool(condition)
        here = [self._signals.received, is_due and self._env.is_main_process]
        message = torch.tensor([0, *here], dtype=torch.int32, device=self._device)
        message[0] = ~torch.as_tensor(condition)
        dist.all_reduce(message, dist.ReduceOp.MAX)
        is_refused, self.stop, is_due = message.tolist()
        self.save = bool(is_due)
        return not is_refused

    def count_step(self) -> None:
        self._steps += 1
