"""Train a backbone and a margin head on face images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.backbone import RescaledInput, build_backbone
from model.backbone.fold import fold_batch_norm
from model.backbone.recompute import recompute_blocks
from model.head import PartialFC, build_head, shard_range
from model.loss import build_loss
from util.checkpoint.io import (
    AVERAGE_FILE,
    RecognitionState,
    check_finite,
    get_rng_state,
    load_state_dict_strict,
    set_rng_state,
)
from util.checkpoint.run_dir import Resumable, check_classes
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
from util.distributed import DistEnv, seed_epoch
from util.errors import UsageError
from util.evaluate import average_accuracy, evaluate
from util.face import FACE_SIZE
from util.pairs import find_pair_sets
from util.public_networks import read_initial_network
from util.super_resolution import load_networks
from util.training.centers import set_centers_to_means
from util.training.engine import TrainingStep
from util.training.log import RunLog
from util.training.loop import TrainingLoop
from util.training.optim import Schedule, build_adamw, build_sgd
from util.training.report import Results
from util.verification import VerificationResult


class Trainer(TrainingLoop):
    """Train a backbone and a margin head on face images."""

    schedule: Schedule
    training_step: TrainingStep

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
        super().__init__(config, devices, env)
        resumed = self.find_resumable()

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
            Augmentation(
                crop=config.train_crop,
                strong=config.augment == "strong",
                low_res_sizes=low_res_sizes,
                low_res_prob=config.LR_prob,
            ),
            seed=config.seed,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            rank=env.rank,
            world_size=env.world_size,
            max_bad=config.max_bad,
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
        if config.init and not resumed:
            network = read_initial_network(config.init, config.channel_order, config.input_scale)
            logger.info(f"starting from {config.init}: {network.describe()}")
            if network.crop != config.train_crop:
                logger.warning(f"warning: --train_crop={config.train_crop}: this network was trained otherwise")
            self.backbone = network.network
        else:
            self.backbone = build_backbone(config.backbone, embedding_size=config.embedding_size)
            if resumed and "input_scale" in resumed.networks["Backbone"]:
                self.backbone = RescaledInput(self.backbone, 1.0)  # its scale is loaded with the weights
        if config.grad_checkpoint:
            recompute_blocks(self.backbone)
        runner = prepare_module(self.backbone, devices, compiled=config.compile, dtype=self.dtype)
        if env.is_distributed:
            runner = wrap_ddp(runner, self.device)

        # Head: this rank's rows of it.
        rows = shard_range(num_classes, env.rank, env.world_size)
        try:
            self.head = build_head(
                config.head, config.embedding_size, num_classes, rows=rows, seed=config.seed, **config.head_settings
            )
        except ValueError as error:
            raise UsageError(f"--s, --m and --head_options: {error}.") from None
        self.head.to(self.device)
        if config.init_head == "mean" and not resumed:
            set_centers_to_means(
                self.head,
                prepare_module(fold_batch_norm(self.backbone), devices, dtype=self.dtype),
                self.images,
                crop=config.train_crop,
                device=self.device,
                batch_size=config.val_batch_size or default_eval_batch_size(devices),
                skip_bad=config.max_bad > 0,
            )

        # Super-resolution networks for the evaluation. They use random numbers, so they come after the head.
        self.super_resolution = load_networks(config.sr_path, config.sr_scales, devices)

        # Loss.
        loss = build_loss(config.loss)
        loss_fn = None
        if env.is_distributed or config.sample_rate < 1:
            loss_fn = PartialFC(self.head, loss, config.sample_rate, seed=config.seed)

        # Optimizer.
        self.networks = {"Backbone": self.backbone, "Head": self.head}
        backbone_lr = config.backbone_lr if config.init else None
        trained = (self.backbone, self.head)
        if config.optimizer == "adamw":
            self.optimizer = build_adamw(trained, config.lr, config.weight_decay, backbone_lr=backbone_lr)
        else:
            self.optimizer = build_sgd(
                trained,
                config.lr,
                config.momentum,
                weight_decay=config.weight_decay,
                dtype=self.dtype,
                backbone_lr=backbone_lr,
            )
        self.scaler = grad_scaler(self.dtype, self.device)

        # Average of the weights and running statistics, which starts as the first ones.
        self.average: AveragedModel | None = None
        self.evaluated = self.backbone
        if config.ema:
            self.average = AveragedModel(self.backbone, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            self.average.n_averaged.fill_(1)  # at 0 the first update would replace the average
            self.evaluated = self.average.module.requires_grad_(False)
            self.networks[AVERAGE_FILE] = self.evaluated
            logger.info(
                f"the average of the weights (--ema={config.ema:g}) is evaluated, and saved in {AVERAGE_FILE} files"
            )

        # Step.
        self.training_step = TrainingStep(
            runner,
            self.head,
            loss,
            optimizer=self.optimizer,
            device=self.device,
            accumulate=config.accumulate,
            scaler=self.scaler,
            loss_fn=loss_fn,
            agree=self.control.agree,
            clip_grad_norm=config.clip_grad_norm,
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
            margin=self.head.m,
            margin_warmup_epochs=config.margin_warmup_epochs,
            decay=config.schedule,
            epochs=config.epochs,
        )

        if config.freeze_epochs:
            logger.info(f"the head is trained alone in the first {config.freeze_epochs} of {config.epochs} epochs")

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
        defaults = type(self.config)().as_dict()
        saved = defaults | state.settings
        for name in ("backbone", "embedding_size", "head", "optimizer", "backbone_lr"):
            value = getattr(self.config, name)
            if value != saved[name]:
                raise UsageError(
                    f"--{name}={value}: the run to resume has {saved[name]}. Leave --{name} out, or start a "
                    f"new run without --resume_dir."
                )
        check_classes(resumed, self.images.classes, self.images.root)
        self.report_resume(resumed, defaults=defaults)
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
        if self.average:
            kind = AVERAGE_FILE if AVERAGE_FILE in resumed.networks else "Backbone"  # the average starts here
            load_state_dict_strict(self.evaluated, resumed.networks[kind], resumed.files[kind])
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.restore_counters(state, state.world_size)
        set_rng_state(state.rng_state)
        if len(state.rank_states) == self.env.world_size:
            self.load_rank_state(state.rank_states[self.env.rank])
        elif self.env.is_distributed:
            seed_epoch(self.config.seed, self.epoch, self.env.rank)

    def load_rank_state(self, rank_state: dict[str, Any]) -> None:
        """Restore what differs between ranks: random generators, running statistics, counts of bad images."""
        set_rng_state(rank_state["rng_state"])
        self.backbone.load_state_dict(rank_state["buffers"], strict=False)
        self.loader.bad.load_state_dict(rank_state["bad_images"])
        if self.average:
            self.evaluated.load_state_dict(rank_state.get("average", rank_state["buffers"]), strict=False)

    def rank_states(self) -> list[dict[str, Any]]:
        """Return the states of all ranks for load_rank_state(), on rank 0. Collective: all ranks call it."""
        state = {"rng_state": get_rng_state(), "buffers": cpu_buffers(self.backbone)}
        state["bad_images"] = self.loader.bad.state_dict()
        if self.average:
            state["average"] = cpu_buffers(self.evaluated)
        states: list[dict[str, Any]] = [{}] * self.env.world_size
        torch.distributed.all_gather_object(states, state)
        return states

    def state_dict(self) -> RecognitionState:
        """Return what the Optimizer file holds."""
        return RecognitionState(
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            epoch=self.epoch,
            step=self.step,
            epoch_step=self.progress.step,
            progress=self.progress_dict(),
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

    def train_epoch(self) -> dict[str, float]:
        """Train what is left of one epoch. Return loss, prec1, prec5, lr and margin."""
        if self.env.is_distributed and not self.progress.step:
            # Dropout differs between ranks, and is the same after a resume.
            seed_epoch(self.config.seed, self.epoch, self.env.rank)
        self.training_step.is_frozen = self.epoch < self.config.freeze_epochs
        last_step = (self.epoch + 1) * len(self.loader) - 1
        return super().train_epoch() | {"margin": self.schedule.margin_at(last_step)}

    def after_step(self) -> None:
        if self.average and not self.progress.skipped_in_row:
            self.average.update_parameters(self.backbone)
        super().after_step()

    def end_of_steps(self) -> None:
        """Average the running statistics over the ranks, and check that the weights are finite."""
        if self.env.is_distributed and not self.training_step.is_frozen:
            average_buffers(self.backbone)
            if self.average:
                average_buffers(self.evaluated)
        check_finite(self.backbone, "backbone")
        check_finite(self.head, "head")

    def evaluate(self) -> Results:
        """Evaluate on the verification sets, {view: {set: result}}. Ranks share the work."""
        results: dict[str, dict[str, VerificationResult]] = {}
        # Compiling would not pay.
        runner = prepare_module(fold_batch_norm(self.evaluated), self.devices, dtype=self.dtype)
        for pairs in self.pair_sets:
            self.stop_if_asked()
            evaluated = evaluate(
                runner,
                [pairs],
                device=self.device,
                batch_size=self.config.val_batch_size or default_eval_batch_size(self.devices),
                views=self.config.views,
                lr_scale=self.config.LR_scale,
                super_resolution=self.super_resolution,
                crop=self.config.train_crop,
            )
            for view, sets in evaluated.items():
                results.setdefault(view, {}).update(sets)
        return results

    def score(self, results: Results) -> float | None:
        """Return the average accuracy at full resolution, None without verification sets."""
        return average_accuracy(results["HR"]) if results else None

    def save_checkpoint(self, rolling: bool) -> Path:
        if not self.env.is_distributed:
            return super().save_checkpoint(rolling)
        state = replace(self.state_dict(), rank_states=self.rank_states())
        return save_sharded_checkpoint(
            self.run.checkpoints,
            self.backbone,
            self.head,
            optimizer=self.optimizer,
            state=state,
            rolling=rolling,
            average=self.networks.get(AVERAGE_FILE),
        )


def cpu_buffers(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the running statistics of a network on the CPU."""
    return {name: buffer.cpu() for name, buffer in network.named_buffers()}
