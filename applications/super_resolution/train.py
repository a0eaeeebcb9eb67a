"""Trains a network that enlarges faces: RCAN, for one scale. From the repository root:

python -m applications.super_resolution.train --data data/imgs_casia --scale 4          # the paper's size, on GPU 0
python -m applications.super_resolution.train --data faces.rec --scale 8 --gpu_num [0,1] --batch_size 64
python -m applications.super_resolution.train --data data/imgs --gpu_num cpu --epochs 10 --steps 300   # --size small
python -m applications.super_resolution.train --data data/imgs --val_data data/lfw_align_112/lfw
python -m applications.super_resolution.train --resume_dir checkpoints/SR_x4_2022-07-28-19-15

To keep faces the same person to a recognition network, add --identity_weight 0.1 --identity_backbone Backbone_Best.pth
"""

from __future__ import annotations

import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from applications.super_resolution.settings import TrainSettings, parse_train
from util.errors import RunError, UsageError, run_script

# torch takes seconds to import: what needs it is imported in functions, once the command line is known to be right.
if TYPE_CHECKING:
    import torch

    from applications.super_resolution.log import SuperResolutionLog
    from applications.super_resolution.quality import Evaluation, Quality, Validation
    from model.super_resolution import RCAN
    from util.checkpoint.io import SuperResolutionState
    from util.checkpoint.run_dir import Resumable, Run
    from util.data.loader import TrainingImages, TrainLoader

# Settings that say what the best epoch is judged by.
_JUDGED_BY = ("data", "val_data", "val_share", "val_images", "seed")


def main(arguments: list[str]) -> None:
    settings = parse_train(arguments, inherit=saved_settings)

    from util.checkpoint import io, run_dir
    from util.device import select_devices

    devices = select_devices(settings.gpu_num)
    settings = settings.with_size("small" if devices[0].type == "cpu" else "default")
    resumed = run_dir.load_resumable(settings.resume_dir, io.SR_CHECKPOINT_FILES) if settings.resume_dir else None
    images, validation = open_data(settings)
    network = build_network(settings, resumed)
    if resumed:
        report_resumed(resumed, settings)
    training = Training(settings, devices, network, images, validation, resumed)
    training.run(open_run(settings, resumed))


def saved_settings(resume_dir: str) -> dict[str, Any]:
    """The settings of the run to continue, which hold unless the command line or its file says otherwise."""
    from util.checkpoint.io import SR_CHECKPOINT_FILES
    from util.checkpoint.run_dir import load_state

    return load_state(resume_dir, SR_CHECKPOINT_FILES).settings


def report_resumed(resumed: Resumable, settings: TrainSettings) -> None:
    """Prints where the run goes on, and which settings differ; one younger than the run counts as the same."""
    state = resumed.state
    print(f"resuming {resumed.files['SR']} after epoch {state.epoch}")
    now = settings.as_dict()
    before = now | state.settings
    for name in now:
        if name != "resume_dir" and now[name] != before[name]:
            print(f"changed setting: --{name} was {before[name]}, now {now[name]}")
    if state.epoch >= settings.epochs:
        print(f"all of its {settings.epochs} epochs are done; raise --epochs to go on")


def open_data(settings: TrainSettings) -> tuple[TrainingImages, Validation]:
    """The images to train on and those to validate on, both named on the console."""
    from applications.super_resolution.faces import hold_out, open_faces, some_faces
    from applications.super_resolution.quality import Validation
    from util.data.loader import open_training_images

    images = open_training_images(settings.data)
    if settings.val_data is not None:
        judged, faces = settings.val_data, open_faces(settings.val_data)
    else:
        images, held_out = hold_out(images, settings.val_share, settings.seed)
        judged, faces = f"{len(held_out.classes)} people held out of it", (len(held_out), held_out.image)
    print(f"training on {images.root}: {len(images)} images of {len(images.classes)} people")
    if settings.steps is None and len(images) < settings.batch_size:
        raise UsageError(
            f"--batch_size={settings.batch_size}: {images.root} has only {len(images)} images to train on; give at "
            f"most that, or say with --steps how many batches make an epoch"
        )
    chosen = some_faces(*faces, settings.val_images, settings.seed)
    print(f"validating on {len(chosen)} images of {judged}", flush=True)
    return images, Validation(chosen, settings.scale, settings.batch_size)


def build_network(settings: TrainSettings, resumed: Resumable | None) -> RCAN:
    """A new network of the sizes that are asked for, or that of the resumed run, which must be one of those.

    Raises UsageError for sizes that cannot be built, or that the run does not have.
    """
    import torch

    from model.super_resolution import RCAN, init_as_interpolation

    if resumed is None:
        torch.manual_seed(settings.seed)
        try:
            network = RCAN(settings.scale, **settings.network_sizes)
            init_as_interpolation(network)
        except ValueError as error:
            raise UsageError(f"--num_features and --reduction: {error}") from None
        return network
    from util.super_resolution import rcan_from_file_state

    network = rcan_from_file_state(resumed.networks["SR"], resumed.files["SR"])
    has = {"scale": network.scale, **network.sizes}
    for name, value in {"scale": settings.scale, **settings.network_sizes}.items():
        if has[name] != value:
            raise UsageError(
                f"--{name}={value}: the run to resume has {has[name]}; leave it (and --size) out, or start a new run "
                f"without --resume_dir"
            )
    return network


def open_run(settings: TrainSettings, resumed: Resumable | None) -> Run:
    """The folders of a new run, or those of the resumed one, where epochs that it will do again are set aside."""
    from util.checkpoint import run_dir
    from util.super_resolution import run_prefix

    folders = (settings.checkpoint_dir, settings.best_checkpoint_dir, settings.log_dir)
    if resumed is None:
        run = run_dir.new_run(*folders, prefix=run_prefix(settings.scale), now=datetime.now())
    else:
        run = run_dir.resumed_run(resumed, *folders)
    print(f"checkpoints go to {run.checkpoints}", flush=True)
    return run


def make_loader(settings: TrainSettings, images: TrainingImages, devices: list[torch.device]) -> TrainLoader:
    from applications.super_resolution.faces import PairDataset, View
    from util.data.loader import TrainLoader
    from util.device import default_num_workers, num_cpus

    workers = default_num_workers(devices, num_cpus()) if settings.num_workers is None else settings.num_workers
    return TrainLoader(
        images,
        settings.batch_size,
        View(settings.scale, settings.patch, settings.crop_share),
        seed=settings.seed,
        num_workers=workers,
        pin_memory=devices[0].type == "cuda",
        steps=settings.steps,
        dataset=PairDataset,
    )


class Training:
    """The network, its optimizer and its data; where a run is resumed, as they were after the epoch."""

    def __init__(
        self,
        settings: TrainSettings,
        devices: list[torch.device],
        network: RCAN,
        images: TrainingImages,
        validation: Validation,
        resumed: Resumable | None,
    ):
        import torch

        from applications.super_resolution.engine import cosine_at
        from util.device import prepare_module

        self.settings, self.device, self.validation = settings, devices[0], validation
        self.network, self.runner = network, prepare_module(network, devices)
        self.data = {"images": len(images), "people": len(images.classes), "validation images": len(validation)}
        self.identity = self._load_identity()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)
        self.loader = make_loader(settings, images, devices)
        self.lr_at = partial(cosine_at, steps=settings.epochs * len(self.loader), highest=settings.lr)
        self.epoch, self.step, self.latest = 0, 0, "none yet"
        self.best_psnr, self.best_epoch = None, 0
        if resumed:
            self._restore(resumed)
        weights = sum(parameter.numel() for parameter in network.parameters())
        sizes = ", ".join(f"{name} {value}" for name, value in network.sizes.items())
        print(
            f"RCAN x{network.scale}: {sizes} ({weights:,} weights); {len(self.loader)} steps an epoch, lr up to "
            f"{settings.lr:g}"
        )

    def _load_identity(self) -> torch.nn.Module | None:
        if not self.settings.identity_weight:
            return None
        import torch

        from applications.super_resolution.identity import load_identity

        name, identity = load_identity(self.settings.identity_backbone)
        print(f"identity: {self.settings.identity_weight:g} * (1 - cosine) under {name}")
        return identity.to(self.device, memory_format=torch.channels_last)

    def _restore(self, resumed: Resumable) -> None:
        state = resumed.state
        self.optimizer.load_state_dict(state.optimizer)
        self.epoch, self.step = state.epoch, state.step
        self.latest = str(resumed.files["SR"])
        now, before = self.settings.as_dict(), state.settings
        same = self.data == state.data and all(now[name] == before[name] for name in _JUDGED_BY)
        if same:
            self.best_psnr, self.best_epoch = state.best, state.best_epoch
        else:
            print(f"other data than before ({state.data}): the best epoch is looked for anew")

    def run(self, run: Run) -> None:
        """Trains the epochs that are left; after each come validation, checkpoint and log."""
        from applications.super_resolution.log import SuperResolutionLog
        from util.checkpoint.run_dir import add_last_checkpoint_to_errors

        log = SuperResolutionLog(run, self.epoch, self.step)
        while self.epoch < self.settings.epochs:
            with add_last_checkpoint_to_errors(self.latest):
                averages = self._train_epoch()
            results = self.validation(self.runner, self.device)
            self._save(run, log, averages, results)
        log.close()
        print(f"done: {self.latest}, best in {run.best}")

    def _train_epoch(self) -> dict[str, float]:
        from applications.super_resolution.engine import train_one_epoch
        from util.checkpoint.io import check_finite
        from util.training.log import Progress

        title = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        with Progress(title, len(self.loader), self.settings.batch_size) as progress:
            averages = train_one_epoch(
                self.runner,
                self.optimizer,
                self.loader.epoch(self.epoch),
                len(self.loader),
                self.epoch,
                self.lr_at,
                self.device,
                progress.report,
                progress.report_every,
                self.identity,
                self.settings.identity_weight,
            )
        check_finite(self.network, "network", "Lower --lr")
        self.epoch += 1
        self.step += len(self.loader)
        return averages

    def _save(self, run: Run, log: SuperResolutionLog, averages: dict[str, float], results: Evaluation) -> None:
        """Logs and saves an epoch, and as the best if it is. RunError on a full disk."""
        from util.checkpoint import io, run_dir

        is_best = self._note(results.network)
        record = {"epoch": self.epoch, "step": self.step, **averages}
        try:
            log.epoch(self.settings.epochs, record, results)
            file = io.save_checkpoint(run.checkpoints, {"SR": self.network}, self._state())
            if is_best:
                run_dir.save_best(run, file)
        except (OSError, RuntimeError) as error:  # the latter is what torch's writer raises
            raise RunError(
                f"{run.checkpoints}: epoch {self.epoch} cannot be written ({error}); make room, and go on with "
                f"--resume_dir. The last good checkpoint is {self.latest}"
            ) from None
        self.latest = str(file)

    def _note(self, quality: Quality) -> bool:
        """Whether this epoch is the best so far."""
        if self.best_psnr is not None and quality.psnr_luma <= self.best_psnr:
            return False
        self.best_psnr, self.best_epoch = quality.psnr_luma, self.epoch
        return True

    def _state(self) -> SuperResolutionState:
        from util.checkpoint.io import SuperResolutionState

        return SuperResolutionState(
            optimizer=self.optimizer.state_dict(),
            epoch=self.epoch,
            step=self.step,
            best=self.best_psnr,
            best_epoch=self.best_epoch,
            data=self.data,
            settings=self.settings.as_dict(),
        )


if __name__ == "__main__":
    run_script(main)
