"""The training loop: TrainingLoop is shared by all trainings, Trainer trains a backbone and a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from model.backbone import build_backbone
from model.backbone.fold import fold_batch_norm
from model.head import PartialFC, build_head, shard_range
from model.loss import build_loss
from util.checkpoint.io import (
    RecognitionState,
    TrainState,
    check_finite,
    get_rng_state,
    load_state_dict_strict,
    save_checkpoint,
    set_rng_state,
)
from util.checkpoint.run_dir import (
    Resumable,
    Run,
    check_classes,
    load_resumable,
    new_run,
    resumed_run,
    save_best,
)
from util.checkpoint.sharded import load_shard, save_sharded_checkpoint
from util.console import logger
from util.data.loader import Augmentation, TrainLoader, find_train_data, open_training_images
from util.device import (
    average_buffers,
    default_eval_batch_size,
    default_num_workers,
    grad_scaler,
    num_cpus,
    prepare_module,
    resolve_dtype,
    wrap_ddp,
)
from util.distributed import DistEnv, broadcast_from_main, seed_epoch
from util.errors import RunError, UsageError
from util.evaluate import average_accuracy, evaluate
from util.face import FACE_SIZE
from util.pairs import find_pair_sets
from util.super_resolution import load_networks
from util.training.engine import TrainingStep, train_one_epoch
from util.training.log import BaseLog, Progress, RunLog
from util.training.optim import Schedule, build_sgd
from util.training.report import Results


class TrainingLoop(ABC):
    """Epochs of training, evaluation, log and checkpoint; the best epoch; resume.

    A subclass builds its networks and `self.loader` in __init__, and calls report_resume(), restore_counters() and
    open_run() there. It implements the abstract methods.
    """

    loader: TrainLoader
    run: Run

    def __init__(self, config: Any, env: DistEnv):
        """Keep `config`, a dataclass of settings, and start at epoch 0."""
        self.config = config
        self.env = env
        self.global_batch_size = config.batch_size * env.world_size
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps, over all epochs
        self.best: float | None = None
        self.best_epoch = 0
        self.latest = "none yet"  # the last checkpoint

    def train(self) -> None:
        """Train the epochs that are left. Evaluate, log and save after each."""
        log = self.open_log() if self.env.is_main_process else None
        while self.epoch < self.config.epochs:
            with add_last_checkpoint_to_errors(self.latest):
                averages = self.train_epoch()
            results = self.evaluate()
            is_best = self.update_best(self.score(results))
            try:
                if log:
                    record = {"epoch": self.epoch, "step": self.step, **averages}
                    log.epoch(self.config.epochs, record, results)
                file = self.save_checkpoint()
                if is_best and self.env.is_main_process:
                    save_best(self.run, file)
            except (OSError, RuntimeError) as error:  # torch's writer and TensorBoard raise RuntimeError on a full disk
                if self.env.is_distributed and not isinstance(error, OSError):
                    raise  # a lost rank, see distributed_session()
                raise RunError(
                    f"{self.run.checkpoints}: epoch {self.epoch} cannot be written ({error}). Make room, and continue "
                    f"with --resume_dir. The last good checkpoint is {self.latest}"
                ) from None
            self.latest = str(file)
        if log:
            log.close()
        logger.info(f"done: {self.latest}, best in {self.run.best}")

    def train_epoch(self) -> dict[str, float]:
        """Train one epoch and return its averages, such as loss and lr."""
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        terminal = None if self.env.is_main_process else False
        with Progress(title, len(self.loader), self.global_batch_size, terminal) as progress:
            averages = self.train_steps(progress)
        self.epoch += 1
        self.step += len(self.loader)
        return averages

    def update_best(self, score: float | None) -> bool:
        """Return whether this epoch is the best so far. Without a score, each epoch is."""
        if score is not None and self.best is not None and score <= self.best:
            return False
        self.best = score
        self.best_epoch = self.epoch
        return True

    def report_resume(self, resumed: Resumable, defaults: dict[str, Any]) -> None:
        """Print the checkpoint that the run resumes from, and the settings that changed since it was saved.

        Args:
            resumed: the checkpoint.
            defaults: values of settings that did not exist when it was saved.
        """
        state: TrainState = resumed.state
        self.latest = str(next(iter(resumed.files.values())))
        logger.info(f"resuming {self.latest} after epoch {state.epoch}")
        saved = defaults | state.settings
        for name, value in self.config.as_dict().items():
            # Earlier versions saved LR_scale as a number, not as a list.
            if name != "resume_dir" and value not in (saved[name], [saved[name]]):
                logger.info(f"changed setting: --{name} was {saved[name]}, now {value}")
        if state.epoch >= self.config.epochs:
            logger.info(f"all of its {self.config.epochs} epochs are done; raise --epochs to continue")

    def restore_counters(self, state: TrainState) -> None:
        """Continue with the epoch, the step and the best epoch of a checkpoint."""
        self.epoch = state.epoch
        self.step = state.step
        self.best = state.best
        self.best_epoch = state.best_epoch

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

    @abstractmethod
    def open_log(self) -> BaseLog:
        """Open the log of the run, on rank 0."""

    @abstractmethod
    def train_steps(self, progress: Progress) -> dict[str, float]:
        """Train the steps of one epoch and check that the weights are finite."""

    @abstractmethod
    def evaluate(self) -> Any:
        """Evaluate the networks. The result is for score() and for the log."""

    @abstractmethod
    def score(self, results: Any) -> float | None:
        """Return the number that is largest for the best epoch."""

    @abstractmethod
    def state_dict(self) -> TrainState:
        """Return what the Optimizer file holds."""

    @abstractmethod
    def save_checkpoint(self) -> Path:
        """Write the files of this epoch and return the path of the first network's file."""


class Trainer(TrainingLoop):
    """Train a backbone and a margin head on face images."""

    def __init__(self, config: Any, devices: list[torch.device], env: DistEnv):
        """Build everything from the settings, then restore the checkpoint of --resume_dir.

        Args:
            config: a TrainConfig.
            devices: the devices of this process. The first one holds the head.
            env: the place of this process among the ranks.

        Raises:
            UsageError: settings that do not fit the data or the resumed run.
            DataError: data or checkpoints that cannot be used.
        """
        super().__init__(config, env)
        self.devices = devices
        self.device = devices[0]
        resumed = load_resumable(config.resume_dir, mmap=env.is_distributed) if config.resume_dir else None

        # Data.
        self.images = open_training_images(find_train_data(config.data_dir, config.train_data))
        num_classes = len(self.images.classes)
        logger.info(f"training on {self.images.root}: {len(self.images)} images of {num_classes} people")
        self.check_images()
        num_workers = config.num_workers
        if num_workers is None:
            num_workers = default_num_workers(devices, num_cpus() // env.local_world_size)
        low_res_sizes = tuple(FACE_SIZE // scale for scale in config.LR_scale) if config.LR_train else ()
        self.loader = TrainLoader(
            self.images,
            config.batch_size,
            Augmentation(strong=config.augment == "strong", low_res_sizes=low_res_sizes, low_res_prob=config.LR_prob),
            seed=config.seed,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            rank=env.rank,
            world_size=env.world_size,
        )

        # Verification sets.
        self.pair_sets, missing = find_pair_sets(config.data_dir, config.pair_set_paths)
        if self.pair_sets:
            logger.info("validating on " + ", ".join(f"{pairs.name} ({len(pairs)} pairs)" for pairs in self.pair_sets))
        if missing:
            logger.info(f"not in {config.data_dir}, so left out of the validation: {', '.join(missing)}")
        if not self.pair_sets:
            logger.info("no verification set: no accuracy is measured, and the best checkpoint is the newest")
        if resumed:
            self.check_resumed(resumed)
        if env.is_distributed:
            logger.info(
                f"{env.world_size} processes with {config.batch_size} images each: batches of {self.global_batch_size}"
            )

        # Backbone.
        torch.manual_seed(config.seed)
        self.dtype = resolve_dtype(config.precision, self.device)
        self.backbone = build_backbone(config.backbone, embedding_size=config.embedding_size)
        runner = prepare_module(self.backbone, devices, compiled=config.compile, dtype=self.dtype)
        if env.is_distributed:
            runner = wrap_ddp(runner, self.device)

        # Head: this rank's rows of it.
        rows = shard_range(num_classes, env.rank, env.world_size)
        self.head = build_head(config.head, config.embedding_size, num_classes, s=config.s, m=config.m, rows=rows)
        self.head.to(self.device)

        # Super-resolution networks for the evaluation. They use random numbers, so they come after the head.
        self.super_resolution = load_networks(config.sr_path, config.sr_scales, devices)

        # Loss.
        loss = build_loss(config.loss)
        loss_fn = None
        if env.is_distributed or config.sample_rate < 1:
            loss_fn = PartialFC(self.head, loss, config.sample_rate, seed=config.seed)

        # Optimizer.
        self.optimizer = build_sgd(
            (self.backbone, self.head), config.lr, config.momentum, weight_decay=config.weight_decay, dtype=self.dtype
        )
        self.scaler = grad_scaler(self.dtype, self.device)
        self.training_step = TrainingStep(
            runner,
            self.head,
            loss,
            optimizer=self.optimizer,
            device=self.device,
            accumulate=config.accumulate,
            scaler=self.scaler,
            loss_fn=loss_fn,
        )

        # Schedule.
        lr = config.lr
        if config.scale_lr and env.is_distributed:
            lr *= env.world_size
            logger.info(f"learning rate {lr:g}: --lr={config.lr:g}, scaled by the number of processes")
        self.schedule = Schedule(
            steps_per_epoch=len(self.loader),
            lr=lr,
            warmup_epochs=config.warmup_epochs,
            stages=config.stages,
            margin=config.m,
            margin_warmup_epochs=config.margin_warmup_epochs,
        )

        # Resume, and folders.
        if resumed:
            self.load_state_dict(resumed)
        prefix = f"LRTRAIN_LRx{'-'.join(map(str, config.LR_scale))}" if config.LR_train else "HRTRAIN"
        self.run = self.open_run(prefix, resumed)

    def check_images(self) -> None:
        """Raise UsageError if there are too few images for a batch, or too few identities for the ranks."""
        images, env = self.images, self.env
        if len(images) < self.global_batch_size:
            on_each = f" in each of {env.world_size} processes" if env.is_distributed else ""
            raise UsageError(
                f"--batch_size={self.config.batch_size}{on_each}: {images.root} has only {len(images)} images. "
                f"Give at most {len(images) // env.world_size}."
            )
        if len(images.classes) < env.world_size:
            raise UsageError(
                f"{images.root}: {len(images.classes)} people are too few for {env.world_size} processes, which each "
                f"hold some of the classes. Start fewer processes."
            )

    def check_resumed(self, resumed: Resumable) -> None:
        """Check that a checkpoint fits the settings and the data, and print what changed since it was saved."""
        state: RecognitionState = resumed.state
        for name in ("backbone", "embedding_size", "head"):
            value = getattr(self.config, name)
            if value != state.settings[name]:
                raise UsageError(
                    f"--{name}={value}: the run to resume has {state.settings[name]}. Leave --{name} out, or start a "
                    f"new run without --resume_dir."
                )
        check_classes(resumed, self.images.classes, self.images.root)
        self.report_resume(resumed, defaults=type(self.config)().as_dict())
        if state.world_size != self.env.world_size:
            logger.info(
                f"resuming with {self.env.world_size} processes (was {state.world_size}): batches and steps per epoch "
                f"change"
            )

    def load_state_dict(self, resumed: Resumable) -> None:
        """Restore networks, optimizer, counters and random generators."""
        state: RecognitionState = resumed.state
        load_state_dict_strict(self.backbone, resumed.networks["Backbone"], resumed.files["Backbone"])
        if self.env.is_distributed:
            load_shard(self.head, self.optimizer, resumed)
        else:
            load_state_dict_strict(self.head, resumed.networks["Head"], resumed.files["Head"])
            self.optimizer.load_state_dict(state.optimizer)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.restore_counters(state)
        set_rng_state(state.rng_state)

    def state_dict(self) -> RecognitionState:
        """Return what the Optimizer file holds."""
        return RecognitionState(
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            epoch=self.epoch,
            step=self.step,
            best=self.best,
            best_epoch=self.best_epoch,
            rng_state=get_rng_state(),
            classes=self.images.classes,
            settings=self.config.as_dict(),
            world_size=self.env.world_size,
        )

    def open_log(self) -> RunLog:
        log = RunLog(self.run, self.epoch, self.step)
        if self.epoch == 0:
            log.samples(self.loader.first_images())
        return log

    def train_steps(self, progress: Progress) -> dict[str, float]:
        """Train the steps of one epoch. Return loss, prec1, prec5, lr and margin."""
        if self.env.is_distributed:  # dropout differs between ranks, and is the same after a resume
            seed_epoch(self.config.seed, self.epoch, self.env.rank)
        averages = train_one_epoch(
            self.training_step,
            self.loader.epoch(self.epoch),
            self.schedule,
            epoch=self.epoch,
            report=progress.report,
            report_every=progress.report_every,
        )
        if self.env.is_distributed:
            average_buffers(self.backbone)
        check_finite(self.backbone, "backbone")
        check_finite(self.head, "head")
        last_step = (self.epoch + 1) * len(self.loader) - 1
        return averages | {"margin": self.schedule.margin_at(last_step)}

    def evaluate(self) -> Results:
        """Evaluate the backbone on the verification sets, {view: {set: result}}. Ranks share the work."""
        if not self.pair_sets:
            return {}
        return evaluate(
            prepare_module(fold_batch_norm(self.backbone), self.devices, dtype=self.dtype),  # compiling would not pay
            self.pair_sets,
            device=self.device,
            batch_size=self.config.val_batch_size or default_eval_batch_size(self.devices),
            views=self.config.views,
            lr_scale=self.config.LR_scale,
            super_resolution=self.super_resolution,
        )

    def score(self, results: Results) -> float | None:
        """Return the average accuracy at full resolution, None without verification sets."""
        return average_accuracy(results["HR"]) if results else None

    def save_checkpoint(self) -> Path:
        """Write the files of this epoch and return the path of the Backbone file."""
        folder, state = self.run.checkpoints, self.state_dict()
        if self.env.is_distributed:
            return save_sharded_checkpoint(folder, self.backbone, self.head, optimizer=self.optimizer, state=state)
        return save_checkpoint(folder, {"Backbone": self.backbone, "Head": self.head}, state)


@contextmanager
def add_last_checkpoint_to_errors(latest: str) -> Iterator[None]:
    """Re-raise errors of an epoch with the path of the last checkpoint. Turn CUDA out of memory into a RunError."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{str(error).removesuffix('.')}. The last good checkpoint is {latest}") from None
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise RunError(f"{reason}. Lower --batch_size. The last good checkpoint is {latest}") from None
