"""The training loop that all trainings share: epochs, evaluation, log, checkpoints, signals and resume."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from util.checkpoint.io import CHECKPOINT_FILES, TrainState, check_free_space, checkpoint_bytes, save_checkpoint
from util.checkpoint.run_dir import (
    Resumable,
    Run,
    discard_empty_run,
    find_run_to_continue,
    load_resumable,
    lock_run,
    new_run,
    remove_old_epochs,
    remove_rolling,
    resumed_run,
    save_best,
)
from util.cli.options import AUTO
from util.console import logger
from util.data.loader import TrainingImages, TrainLoader
from util.device import sum_over_ranks, use_deterministic_algorithms
from util.distributed import DistEnv, broadcast_from_main
from util.errors import DataError, Interrupted, RunError
from util.training.control import StepControl, StopSignals
from util.training.engine import EpochProgress, Step, train_one_epoch
from util.training.log import BaseLog, Progress
from util.training.optim import StepSchedule
from util.training.run_record import RunRecord, describe_data


class TrainingLoop(ABC):
    """Epochs of training, evaluation, log and checkpoint; the best epoch; signals; resume.

    A subclass sets the attributes below in __init__, and calls find_resumable(), report_resume(), restore_counters()
    and open_run() there. It implements the abstract methods.
    """

    program = "train.py"  # that continues a run
    kinds: tuple[str, ...] = CHECKPOINT_FILES

    images: TrainingImages
    loader: TrainLoader
    networks: dict[str, nn.Module]  # that a checkpoint holds, by the names of its files
    optimizer: torch.optim.Optimizer
    schedule: StepSchedule
    training_step: Step
    run: Run

    def __init__(self, config: Any, devices: list[torch.device], env: DistEnv):
        """Keep `config`, a dataclass of settings, and start at epoch 0.

        Args:
            config: the settings.
            devices: the devices of this process. The first one computes the loss.
            env: the place of this process among the ranks.
        """
        self.config = config
        self.devices = devices
        self.device = devices[0]
        self.env = env
        self.global_batch_size = config.batch_size * env.world_size
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps, over all epochs
        self.progress = EpochProgress()  # of the next epoch
        self.best: float | None = None
        self.best_epoch = 0
        self.latest: Path | None = None  # the last checkpoint
        self.signals = StopSignals(env)
        self.control = StepControl(env, self.signals, self.device, config.save_every)
        if config.deterministic:
            use_deterministic_algorithms()

    def train(self) -> None:
        """Train the epochs that are left. Evaluate, log and save after each."""
        with self.signals, self.run_files() as log, closing(self.loader):
            self.control.saved()
            while self.epoch < self.config.epochs:
                self.stop_if_asked()
                with self.errors_with_checkpoint():
                    averages = self.train_epoch()
                    self.save_before_evaluation()
                    results = self.evaluate_or_stop()
                    self.finish_epoch(averages, results, log)
        logger.info(f"done: {self.latest}, best in {self.run.best}")

    @contextmanager
    def run_files(self) -> Iterator[BaseLog | None]:
        """Yield the log of the run, on rank 0. At the end, record how the run ended."""
        if not self.env.is_main_process:
            yield None
            return
        with lock_run(self.run):
            try:
                self.check_free_space("--checkpoint_dir")
                with (
                    RunRecord(self.run.log / "run.json", self.config.as_dict(), describe_data(self.images)),
                    closing(self.open_log()) as log,
                ):
                    yield log
            finally:
                if self.latest is None:
                    discard_empty_run(self.run)

    def check_free_space(self, flag: str | None = None) -> None:
        """Raise an error if a checkpoint does not fit on the disk: UsageError, which names `flag`, or RunError."""
        check_free_space(self.run.checkpoints, checkpoint_bytes(self.networks, self.optimizer), flag)

    def train_epoch(self) -> dict[str, float]:
        """Train what is left of one epoch. Return its averages, such as loss and lr, and counts of what was skipped."""
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        terminal = None if self.env.is_main_process else False
        with Progress(title, len(self.loader), self.global_batch_size, terminal, self.progress.step) as progress:
            averages = train_one_epoch(
                self.training_step,
                self.batches(),
                self.schedule,
                epoch=self.epoch,
                report=progress.report,
                report_every=progress.report_every,
                progress=self.progress,
                after_step=self.after_step,
            )
        if not self.progress.is_complete:
            self.end_of_steps()
            self.progress.is_complete = True
        skipped = {"skipped_steps": self.progress.skipped} if self.progress.skipped else {}
        bad = sum_over_ranks(self.loader.bad.bad, self.device)
        return averages | skipped | ({"bad_images": bad} if bad else {})

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches that are left of the epoch. Save a checkpoint if they cannot be read."""
        try:
            yield from self.loader.epoch(self.epoch, self.progress.step)
        except (DataError, RunError):
            if not self.env.is_distributed:  # other ranks wait in the middle of a step
                self.save_rolling()
            raise

    def after_step(self) -> None:
        """Stop if a signal came, and save the rolling checkpoint if it is due."""
        self.step += 1
        self.loader.bad.count_batch()
        self.control.count_step()
        if self.control.stop:
            self.stop(self.control.stop)
        if self.control.save and self.progress.step < len(self.loader):
            self.save_rolling()

    def stop_if_asked(self) -> None:
        """Stop if a rank received a signal. Collective: all ranks call it."""
        self.control.agree(True)
        if self.control.stop:
            self.stop(self.control.stop)

    def stop(self, number: int) -> NoReturn:
        """Save a checkpoint and raise Interrupted."""
        self.save_rolling()
        message = ""
        if self.env.is_main_process:
            saved = f"saved {self.latest}" if self.latest else "there is no checkpoint yet"
            message = f"Stopped by {signal.Signals(number).name}: {saved}. {self.how_to_continue()}"
        raise Interrupted(number, message)

    def how_to_continue(self) -> str:
        """Return the sentence that says which command continues the run."""
        if self.config.resume_dir == AUTO or self.latest is None:
            return "The same command continues from there." if self.latest else "Start the same command again."
        return f"Continue with: python {self.program} --resume_dir={self.run.checkpoints}"

    def save_before_evaluation(self) -> None:
        """Save the rolling checkpoint, unless less than a minute was trained since the last checkpoint. Collective."""
        self.control.agree(True, before_evaluation=True)
        if self.control.save:
            self.save_rolling()

    def evaluate_or_stop(self) -> Any:
        """Evaluate the networks. If a signal comes, save a checkpoint before the evaluation is finished."""
        try:
            with self.signals.raised():
                return self.evaluate()
        except Interrupted as stopped:
            if stopped.is_handled:
                raise
            self.stop(stopped.number)

    def finish_epoch(self, averages: dict[str, float], results: Any, log: BaseLog | None) -> None:
        """Log and save a finished epoch."""
        self.epoch += 1
        self.progress = EpochProgress(skipped_in_row=self.progress.skipped_in_row)
        is_best = self.update_best(self.score(results))
        if log:
            try:
                log.epoch(self.config.epochs, {"epoch": self.epoch, "step": self.step, **averages}, results)
            except (OSError, RuntimeError) as error:  # TensorBoard raises RuntimeError on a full disk
                raise RunError(f"{self.run.log}: cannot be written ({error}). Free some space") from None
        file = self.save()
        if self.env.is_main_process:
            if is_best:
                save_best(self.run, file)
            remove_rolling(self.run.checkpoints)
            remove_old_epochs(self.run, self.config.keep_last, self.best_epoch)
        self.control.saved()

    def save(self, rolling: bool = False) -> Path:
        """Save a checkpoint and return the path of its first file."""
        if self.env.is_main_process:
            self.check_free_space()
        self.latest = self.save_checkpoint(rolling)
        return self.latest

    def save_rolling(self) -> None:
        """Save the state within the epoch, unless the weights may be ruined or the epoch has just begun."""
        if self.progress.step and not self.progress.skipped_in_row:
            self.save(rolling=True)
            if self.env.is_distributed:
                torch.distributed.barrier()  # a rank that ended would have torchrun end rank 0, which writes
        self.control.saved()

    @contextmanager
    def errors_with_checkpoint(self) -> Iterator[None]:
        """Re-raise errors with the last checkpoint and how to continue. Turn CUDA out of memory into a RunError."""
        try:
            yield
        except (RunError, DataError, torch.OutOfMemoryError) as error:
            message = str(error).removesuffix(".")
            if isinstance(error, torch.OutOfMemoryError):
                message = f"{message.split('. ')[0]}. Lower --batch_size"
            latest = f"The last good checkpoint is {self.latest}. " if self.latest else ""
            kind = DataError if isinstance(error, DataError) else RunError
            raise kind(f"{message}. {latest}{self.how_to_continue()}") from None

    def update_best(self, score: float | None) -> bool:
        """Return whether this epoch is the best so far. Without a score, each epoch is."""
        if score is not None and self.best is not None and score <= self.best:
            return False
        self.best = score
        self.best_epoch = self.epoch
        return True

    def find_resumable(self) -> Resumable | None:
        """Load the checkpoint of --resume_dir, or None for a new run."""
        path = self.config.resume_dir
        if path == AUTO:
            find = partial(find_run_to_continue, self.config.checkpoint_dir, self.config.as_dict(), self.kinds[0])
            path = broadcast_from_main(find, self.env)
            if path is None:
                logger.info(f"--resume_dir={AUTO}: no run of these settings to continue: starting a new one")
        return load_resumable(path, self.kinds, mmap=self.env.is_distributed) if path else None

    def report_resume(self, resumed: Resumable, defaults: dict[str, Any]) -> None:
        """Print the checkpoint that the run resumes from, and the settings that changed since it was saved.

        Args:
            resumed: the checkpoint.
            defaults: values of settings that did not exist when it was saved.
        """
        state: TrainState = resumed.state
        self.latest = next(iter(resumed.files.values()))
        within = f" and {state.epoch_step} steps" if state.epoch_step else ""
        logger.info(f"resuming {self.latest} after epoch {state.epoch}{within}")
        saved = defaults | state.settings
        for name, value in self.config.as_dict().items():
            # Earlier versions saved LR_scale as a number, not as a list.
            if name != "resume_dir" and value not in (saved[name], [saved[name]]):
                logger.info(f"changed setting: --{name} was {saved[name]}, now {value}")
        if state.epoch >= self.config.epochs:
            logger.info(f"all of its {self.config.epochs} epochs are done; raise --epochs to continue")

    def restore_counters(self, state: TrainState, world_size: int = 1) -> None:
        """Continue with the epoch, the step within it, and the best epoch of a checkpoint of `world_size` ranks."""
        self.epoch = state.epoch
        self.step = state.step
        self.best = state.best
        self.best_epoch = state.best_epoch
        if "bad_images" in state.progress and self.env.is_main_process:
            self.loader.bad.load_state_dict(state.progress["bad_images"])
        if not state.epoch_step:
            return
        self.progress = EpochProgress(**state.progress["epoch"])
        if self.progress.totals is not None:
            self.progress.totals = self.progress.totals.to(self.device)
        global_batch_size = state.settings["batch_size"] * world_size
        if global_batch_size != self.global_batch_size:
            samples = state.epoch_step * global_batch_size
            self.progress.move(min(samples // self.global_batch_size, len(self.loader)))
            logger.info(f"other batches than before: continuing at step {self.progress.step} of the epoch")

    def progress_dict(self) -> dict[str, Any]:
        """Return the content of `progress` in a checkpoint."""
        return {"epoch": asdict(self.progress), "bad_images": self.loader.bad.state_dict()}

    def open_run(self, prefix: str, resumed: Resumable | None) -> Run:
        """Return the folders of a new run, or of the resumed run. Only rank 0 touches the disk."""

        def make() -> Run:
            folders = (self.config.checkpoint_dir, self.config.best_checkpoint_dir, self.config.log_dir)
            if resumed:
                return resumed_run(resumed, *folders)
            return new_run(*folders, prefix=prefix, now=datetime.now())

        run = broadcast_from_main(make, self.env)
        logger.info(f"checkpoints go to {run.checkpoints}")
        return run

    def save_checkpoint(self, rolling: bool) -> Path:
        """Write the files of this epoch, or the rolling ones. Return the path of the first network's file."""
        return save_checkpoint(self.run.checkpoints, self.networks, self.state_dict(), rolling)

    @abstractmethod
    def open_log(self) -> BaseLog:
        """Open the log of the run, on rank 0."""

    @abstractmethod
    def end_of_steps(self) -> None:
        """Check that the weights are finite after the steps of an epoch, before the evaluation."""

    @abstractmethod
    def evaluate(self) -> Any:
        """Evaluate the networks. The result is for score() and for the log."""

    @abstractmethod
    def score(self, results: Any) -> float | None:
        """Return the number that is largest for the best epoch."""

    @abstractmethod
    def state_dict(self) -> TrainState:
        """Return what the Optimizer file holds."""
