"""Trains a face recognition model. From the repository root:

python train.py                                                  # the images in data/, on GPU 0
python train.py --gpu_num=[0,1] --batch_size=256                 # on two GPUs
torchrun --nproc_per_node=8 train.py --batch_size=128            # on eight GPUs, 128 images on each
torchrun --nproc_per_node=8 -- train.py --m=0.35 --s=32          # torchrun stops at --m and --s without --
python train.py --LR_train=True --LR_scale=4 --LR_eval=True      # half of the images in low resolution
python train.py --backbone=MobileFaceNet --head=CosFace --m=0.35 --train_data=/sets/faces --gpu_num=cpu
python train.py --train_data=/sets/faces_emore/train.rec         # InsightFace's records, as they are published
python train.py --resume_dir=checkpoints/HRTRAIN_2022-07-28-19-15  # go on where a run was stopped
python train.py --config=run.yaml --print_config                 # the settings as they would be used
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import TrainConfig, parse_train
from util.distributed import DistEnv, broadcast_from_main, distributed_session
from util.errors import UsageError, run_script

# torch takes seconds to import: what needs it is imported in functions, once the command line is known to be right.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from util.checkpoint.io import RecognitionState
    from util.checkpoint.run_dir import Resumable, Run
    from util.data.loader import TrainingImages, TrainLoader
    from util.pairs import PairSet
    from util.training.engine import TrainingStep
    from util.training.optim import Schedule
    from util.verification import VerificationResult


def main(arguments: list[str]) -> None:
    config = parse_train(arguments, inherit=saved_settings)

    env = DistEnv.from_environ()
    with distributed_session(config.gpu_num, env) as devices:
        train(config, devices, env)


def train(config: TrainConfig, devices: list[torch.device], env: DistEnv) -> None:
    import torch

    from util.checkpoint import run_dir

    resumed = run_dir.load_resumable(config.resume_dir, mmap=env.is_distributed) if config.resume_dir else None
    images, pair_sets = open_data(config, env)
    if resumed:
        check_network(resumed.state.settings, config)
        run_dir.check_classes(resumed, images.classes, images.root)
        print(f"resuming {resumed.files['Backbone']} after epoch {resumed.state.epoch}")
        report_changes(resumed.state.settings, config.as_dict())
        before = resumed.state.world_size
        if before != env.world_size:
            print(f"the run had {before} processes, and has {env.world_size} now: so change its batches and its steps")
        if resumed.state.epoch >= config.epochs:
            print(f"all of its {config.epochs} epochs are done; raise --epochs to go on")
    if env.is_distributed:
        print(
            f"{env.world_size} processes with {config.batch_size} images each: batches of {global_batch(config, env)}"
        )
    torch.manual_seed(config.seed)
    training = Training(config, devices, images, pair_sets, resumed, env)
    training.run(broadcast_from_main(lambda: open_run(config, resumed), env))


def global_batch(config: TrainConfig, env: DistEnv) -> int:
    """The images of a step, in all processes."""
    return config.batch_size * env.world_size


def saved_settings(resume_dir: str) -> dict[str, Any]:
    """The settings of the run to continue, which hold unless the command line or its file says otherwise."""
    from util.checkpoint.run_dir import load_state

    return load_state(resume_dir).settings


def check_network(before: dict[str, Any], config: TrainConfig) -> None:
    """Raises UsageError if a network that the run does not have is asked for."""
    for name in ("backbone", "embedding_size", "head"):
        if getattr(config, name) != before[name]:
            raise UsageError(
                f"--{name}={getattr(config, name)}: the run to resume has {before[name]}; leave --{name} out, or start "
                f"a new run without --resume_dir"
            )


def report_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Prints the settings that differ; one that is younger than the run had its default then, which changes nothing."""
    before = TrainConfig().as_dict() | before
    if isinstance(before["LR_scale"], int):  # saved when there could be but one
        before["LR_scale"] = [before["LR_scale"]]
    for name, value in now.items():
        if name != "resume_dir" and value != before[name]:
            print(f"changed setting: --{name} was {before[name]}, now {value}")


def open_data(config: TrainConfig, env: DistEnv) -> tuple[TrainingImages, list[PairSet]]:
    """The training images and the verification sets that there are, both named on the console."""
    from util.data.loader import find_train_data, open_training_images
    from util.pairs import find_pair_sets

    images = open_training_images(find_train_data(config.data_dir, config.train_data))
    print(f"training on {images.root}: {len(images)} images of {len(images.classes)} people")
    if len(images) < global_batch(config, env):
        each = f" in each of {env.world_size} processes" if env.is_distributed else ""
        raise UsageError(
            f"--batch_size={config.batch_size}{each}: {images.root} has only {len(images)} images; give at most "
            f"{len(images) // env.world_size}"
        )
    if len(images.classes) < env.world_size:
        raise UsageError(
            f"{images.root}: {len(images.classes)} people, and each of {env.world_size} processes holds some of them; "
            f"start fewer processes"
        )
    pair_sets, missing = find_pair_sets(config.data_dir, config.named_pair_sets)
    if pair_sets:
        print("validating on " + ", ".join(f"{pairs.name} ({len(pairs)} pairs)" for pairs in pair_sets))
    if missing:
        print(f"not in {config.data_dir}, so left out of the validation: {', '.join(missing)}")
    if not pair_sets:
        print("no verification set: no accuracy is measured, and the best checkpoint is the newest")
    return images, pair_sets


def open_run(config: TrainConfig, resumed: Resumable | None) -> Run:
    """The folders of a new run, or those of the resumed one, where epochs that it will do again are set aside."""
    from util.checkpoint import run_dir

    folders = (config.checkpoint_dir, config.best_checkpoint_dir, config.log_dir)
    if resumed is None:
        prefix = f"LRTRAIN_LRx{'-'.join(map(str, config.LR_scale))}" if config.LR_train else "HRTRAIN"
        run = run_dir.new_run(*folders, prefix=prefix, now=datetime.now())
    else:
        run = run_dir.resumed_run(resumed, *folders)
    print(f"checkpoints go to {run.checkpoints}", flush=True)
    return run


def make_loader(config: TrainConfig, images: TrainingImages, devices: list[torch.device], env: DistEnv) -> TrainLoader:
    from util.data.loader import Augmentation, TrainLoader
    from util.device import default_num_workers, num_cpus
    from util.transform import SIZE

    lr_sizes = tuple(SIZE // scale for scale in config.LR_scale) if config.LR_train else ()
    cores = num_cpus() // env.local_world_size
    workers = default_num_workers(devices, cores) if config.num_workers is None else config.num_workers
    return TrainLoader(
        images,
        config.batch_size,
        Augmentation(strong=config.augment == "strong", lr_sizes=lr_sizes, lr_prob=config.LR_prob),
        seed=config.seed,
        num_workers=workers,
        pin_memory=devices[0].type == "cuda",
        rank=env.rank,
        world_size=env.world_size,
    )


def make_schedule(config: TrainConfig, steps_per_epoch: int, env: DistEnv) -> Schedule:
    from util.training.optim import Schedule

    rate = config.lr * (env.world_size if config.scale_lr else 1)
    if rate != config.lr:
        print(f"learning rate {rate:g}: --lr={config.lr:g}, scaled by the number of processes")
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        lr=rate,
        warmup_epochs=config.warmup_epochs,
        stages=config.stages,
        margin=config.m,
        margin_warmup_epochs=config.margin_warmup_epochs,
    )


class Training:
    """The networks, their optimizer and their data; built from the configuration, then, for a resumed run, restored."""

    def __init__(
        self,
        config: TrainConfig,
        devices: list[torch.device],
        images: TrainingImages,
        pair_sets: list[PairSet],
        resumed: Resumable | None,
        env: DistEnv,
    ):
        from model.backbone import build_backbone
        from model.head import build_head, shard_range
        from util.device import grad_scaler, prepare_module, resolve_dtype
        from util.super_resolution import load_networks
        from util.training.optim import build_sgd

        self.config, self.devices, self.images, self.pair_sets, self.env = config, devices, images, pair_sets, env
        self.device = devices[0]  # of the head
        self.backbone = build_backbone(config.backbone, embedding_size=config.embedding_size)
        classes, margin = len(images.classes), {"s": config.s, "m": config.m}
        rows = shard_range(classes, env.rank, env.world_size)
        self.head = build_head(config.head, config.embedding_size, classes, **margin, rows=rows)
        self.dtype = resolve_dtype(config.precision, self.device)
        trained = prepare_module(self.backbone, devices, config.compile, self.dtype)
        self.super_resolution = load_networks(config.sr_path, config.sr_scales, devices)
        self.head.to(self.device)
        networks = (self.backbone, self.head)
        self.optimizer = build_sgd(networks, config.lr, config.momentum, config.weight_decay, self.dtype)
        self.scaler = grad_scaler(self.dtype, self.device)
        self.training_step = self._make_step(trained)
        self.loader = make_loader(config, images, devices, env)
        self.schedule = make_schedule(config, len(self.loader), env)
        self.epoch, self.step, self.latest = 0, 0, "none yet"
        self.best_accuracy, self.best_epoch = None, 0
        if resumed:
            self._restore(resumed)

    def _make_step(self, trained: nn.Module) -> TrainingStep:
        from model.head import PartialFC
        from model.loss import build_loss
        from util.device import wrap_ddp
        from util.training.engine import TrainingStep

        config, loss, objective = self.config, build_loss(self.config.loss), None
        if self.env.is_distributed:
            trained = wrap_ddp(trained, self.device)
        if self.env.is_distributed or config.sample_rate < 1:
            objective = PartialFC(self.head, loss, config.sample_rate, config.seed)
        networks = (trained, self.head, loss)
        return TrainingStep(*networks, self.optimizer, self.device, config.accumulate, self.scaler, objective)

    def _restore(self, resumed: Resumable) -> None:
        from util.checkpoint import io
        from util.checkpoint.sharded import load_shard

        io.load_state_dict_strict(self.backbone, resumed.networks["Backbone"], resumed.files["Backbone"])
        if self.env.is_distributed:
            load_shard(self.head, self.optimizer, resumed)
        else:
            io.load_state_dict_strict(self.head, resumed.networks["Head"], resumed.files["Head"])
            self.optimizer.load_state_dict(resumed.state.optimizer)
        if scaler := resumed.state.scaler:  # empty but for fp16
            self.scaler.load_state_dict(scaler)
        self.epoch, self.step = resumed.state.epoch, resumed.state.step
        self.best_accuracy, self.best_epoch = resumed.state.best, resumed.state.best_epoch
        self.latest = str(resumed.files["Backbone"])
        io.set_rng_state(resumed.state.rng_state)

    def run(self, run: Run) -> None:
        """Trains the epochs that are left; after each come validation, log and checkpoint."""

        from util.checkpoint import run_dir
        from util.training.log import RunLog

        log = RunLog(run, self.epoch, self.step) if self.env.is_main_process else None
        if log and self.epoch == 0:
            log.samples(self.loader.first_images())
        while self.epoch < self.config.epochs:
            with run_dir.add_last_checkpoint_to_errors(self.latest):
                averages = self._train_epoch()
            results = self._validate()
            is_best = self._note_accuracy(results.get("HR"))
            if log:
                log.epoch(self.config.epochs, self._record(averages), results)
            file = self._save(run)
            if is_best and self.env.is_main_process:
                run_dir.save_best(run, file)
            self.latest = str(file)
        if log:
            log.close()
        print(f"done: {self.latest}, best in {run.best}")

    def _save(self, run: Run) -> Path:
        from util.checkpoint.io import save_checkpoint
        from util.checkpoint.sharded import save_sharded_checkpoint

        if self.env.is_distributed:
            return save_sharded_checkpoint(
                run.checkpoints, self.backbone, self.head, optimizer=self.optimizer, state=self._state()
            )
        return save_checkpoint(run.checkpoints, {"Backbone": self.backbone, "Head": self.head}, self._state())

    def _train_epoch(self) -> dict[str, float]:
        from util.checkpoint.io import check_finite
        from util.device import average_buffers
        from util.distributed import seed_epoch
        from util.training.engine import train_one_epoch
        from util.training.log import Progress

        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        if self.env.is_distributed:  # dropout differs between processes, and a resumed run has that of this epoch again
            seed_epoch(self.config.seed, self.epoch, self.env.rank)
        terminal = None if self.env.is_main_process else False
        with Progress(title, len(self.loader), global_batch(self.config, self.env), terminal) as progress:
            averages = train_one_epoch(
                self.training_step,
                self.loader.epoch(self.epoch),
                self.schedule,
                self.epoch,
                progress.report,
                progress.report_every,
            )
        if self.env.is_distributed:
            average_buffers(self.backbone)
        check_finite(self.backbone, "backbone")
        check_finite(self.head, "head")
        self.epoch += 1
        self.step += len(self.loader)
        return averages

    def _validate(self) -> dict[str, dict[str, VerificationResult]]:
        from model.backbone.fold import fold_batch_norm
        from util.device import default_eval_batch_size, prepare_module
        from util.evaluate import evaluate

        if not self.pair_sets:
            return {}
        config = self.config
        return evaluate(
            prepare_module(
                fold_batch_norm(self.backbone), self.devices, dtype=self.dtype
            ),  # to compile it would not pay
            self.pair_sets,
            self.device,
            config.val_batch_size or default_eval_batch_size(self.devices),
            config.views,
            config.LR_scale,
            self.super_resolution,
        )

    def _note_accuracy(self, results: dict[str, VerificationResult] | None) -> bool:
        """Whether this epoch is the best so far; without verification sets, each is."""
        from util.evaluate import average_accuracy

        accuracy = average_accuracy(results) if results else None
        if accuracy is not None and self.best_accuracy is not None and accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_epoch = accuracy, self.epoch
        return True

    def _record(self, averages: dict[str, float]) -> dict[str, float]:
        return {"epoch": self.epoch, "step": self.step, **averages, "margin": self.head.m}

    def _state(self) -> RecognitionState:
        from util.checkpoint.io import RecognitionState, get_rng_state

        return RecognitionState(
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            epoch=self.epoch,
            step=self.step,
            best=self.best_accuracy,
            best_epoch=self.best_epoch,
            rng_state=get_rng_state(),
            classes=self.images.classes,
            settings=self.config.as_dict(),
            world_size=self.env.world_size,
        )


if __name__ == "__main__":
    run_script(main)
