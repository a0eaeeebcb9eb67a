"""Train RCAN, a super-resolution network, in the loop of util.training.loop."""

from __future__ import annotations

import torch

from applications.super_resolution.engine import CosineSchedule, SuperResolutionStep
from applications.super_resolution.faces import PairDataset, PairTransform, hold_out, open_faces, some_faces
from applications.super_resolution.identity import load_identity
from applications.super_resolution.log import SuperResolutionLog
from applications.super_resolution.quality import Evaluation, Validation
from applications.super_resolution.settings import TrainSettings
from model.super_resolution import RCAN, init_as_interpolation
from util.checkpoint.io import SR_CHECKPOINT_FILES, SuperResolutionState, check_finite
from util.console import logger
from util.data.loader import TrainingImages, TrainLoader, open_training_images
from util.device import default_num_workers, num_cpus, prepare_module
from util.distributed import DistEnv
from util.errors import UsageError
from util.super_resolution import rcan_from_file_state, run_prefix
from util.training.loop import TrainingLoop

# Settings that select the validation images. If one changes, earlier PSNR values are not comparable.
_VALIDATION_SETTINGS = ("data", "val_data", "val_share", "val_images", "seed")


class SuperResolutionTrainer(TrainingLoop):
    """Train a network that enlarges faces by one scale."""

    program = "-m applications.super_resolution.train"
    kinds = SR_CHECKPOINT_FILES

    def __init__(self, settings: TrainSettings, devices: list[torch.device]):
        """Build everything from the settings, then restore the checkpoint of --resume_dir.

        Raises:
            UsageError: settings that do not fit the data or the resumed run.
            DataError: data or checkpoints that cannot be used.
        """
        super().__init__(settings, devices, DistEnv())
        resumed = self.find_resumable()

        # Data: images to train on, and faces to validate on.
        images: TrainingImages = open_training_images(settings.data)
        if settings.val_data is not None:
            total, read = open_faces(settings.val_data)
            source = settings.val_data
        else:
            images, held_out = hold_out(images, settings.val_share, settings.seed)
            total, read = len(held_out), held_out.image
            source = f"{len(held_out.classes)} people held out of it"
        logger.info(f"training on {images.root}: {len(images)} images of {len(images.classes)} people")
        if settings.steps is None and len(images) < settings.batch_size:
            raise UsageError(
                f"--batch_size={settings.batch_size}: {images.root} has only {len(images)} images to train on. Give "
                f"at most that, or give the batches of an epoch with --steps."
            )
        faces = some_faces(total, read, settings.val_images, settings.seed)
        logger.info(f"validating on {len(faces)} images of {source}")
        self.validation = Validation(faces, settings.scale, settings.batch_size)
        num_workers = settings.num_workers
        if num_workers is None:
            num_workers = default_num_workers(devices, num_cpus())
        self.loader = TrainLoader(
            images,
            settings.batch_size,
            PairTransform(settings.scale, settings.patch, settings.crop_share),
            seed=settings.seed,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            steps=settings.steps,
            dataset=PairDataset,
            max_bad=settings.max_bad,
        )
        self.images = images
        self.data = {"images": len(images), "people": len(images.classes), "validation images": len(faces)}

        # Network: from the checkpoint, or a new one that starts as interpolation.
        if resumed:
            self.network = rcan_from_file_state(resumed.networks["SR"], resumed.files["SR"])
            self.check_network(settings)
            self.report_resume(resumed, defaults=settings.as_dict())
        else:
            torch.manual_seed(settings.seed)
            try:
                self.network = RCAN(settings.scale, **settings.network_sizes)
                init_as_interpolation(self.network)
            except ValueError as error:
                raise UsageError(f"--num_features and --reduction: {error}") from None
        self.networks = {"SR": self.network}
        self.runner = prepare_module(self.network, devices)

        # Loss: L1, and optionally the identity term.
        self.identity = None
        if settings.identity_weight:
            name, identity = load_identity(str(settings.identity_backbone))
            logger.info(f"identity: {settings.identity_weight:g} * (1 - cosine) under {name}")
            self.identity = identity.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

        # Optimizer and schedule.
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr)
        self.schedule = CosineSchedule(len(self.loader), settings.epochs, settings.lr)
        self.training_step = SuperResolutionStep(
            self.runner,
            self.optimizer,
            self.device,
            identity=self.identity,
            identity_weight=settings.identity_weight,
            agree=self.control.agree,
        )

        # Resume, and folders.
        if resumed:
            self.load_state_dict(resumed.state)
        weights = sum(parameter.numel() for parameter in self.network.parameters())
        sizes = ", ".join(f"{name} {value}" for name, value in self.network.sizes.items())
        logger.info(
            f"RCAN x{self.network.scale}: {sizes} ({weights:,} weights); {len(self.loader)} steps an epoch, lr up to "
            f"{settings.lr:g}"
        )
        self.run = self.open_run(run_prefix(settings.scale), resumed)

    def check_network(self, settings: TrainSettings) -> None:
        """Raise UsageError if the settings request another network than the resumed run has."""
        saved = {"scale": self.network.scale, **self.network.sizes}
        for name, value in {"scale": settings.scale, **settings.network_sizes}.items():
            if saved[name] != value:
                raise UsageError(
                    f"--{name}={value}: the run to resume has {saved[name]}. Leave it (and --size) out, or start a new "
                    f"run without --resume_dir."
                )

    def load_state_dict(self, state: SuperResolutionState) -> None:
        """Restore the optimizer and the counters. The best epoch is kept only if the validation images are the same."""
        self.optimizer.load_state_dict(state.optimizer)
        self.restore_counters(state)
        settings = self.config.as_dict()
        is_same = all(settings[name] == state.settings[name] for name in _VALIDATION_SETTINGS)
        if self.data != state.data or not is_same:
            self.best = None
            self.best_epoch = 0
            logger.info(f"other data than before ({state.data}): the search for the best epoch starts again")

    def state_dict(self) -> SuperResolutionState:
        """Return what the Optimizer file holds."""
        return SuperResolutionState(
            optimizer=self.optimizer.state_dict(),
            epoch=self.epoch,
            step=self.step,
            epoch_step=self.progress.step,
            progress=self.progress_dict(),
            best=self.best,
            best_epoch=self.best_epoch,
            data=self.data,
            settings=self.config.as_dict(),
        )

    def open_log(self) -> SuperResolutionLog:
        return SuperResolutionLog(self.run, self.epoch, self.step)

    def end_of_steps(self) -> None:
        check_finite(self.network, "network", "Lower --lr")

    def evaluate(self) -> Evaluation:
        """Measure the network on the validation faces."""
        return self.validation(self.runner, self.device)

    def score(self, results: Evaluation) -> float:
        """Return the luma PSNR."""
        return results.network.psnr_luma
