"""Training data: the kinds of training sets, and a loader whose every sample can be reproduced."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import RawArray
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from util import transform
from util.data.bad_images import BadImage, BadImages
from util.data.image_folder import ImageFolder
from util.data.record_dataset import RecordImages
from util.data.sampler import BalancedSampler, BatchIndices, SampleRng
from util.data.workers import WatchedLoader, init_worker, worker_context
from util.errors import DataError
from util.face import FACE_SIZE

# Searched for in data_dir, in this order: first these folders, then InsightFace's folders that hold images.
TRAIN_FOLDERS = ("imgs_casia", "ms1m_align_112", "imgs_train", "imgs")
INSIGHTFACE_FOLDERS = ("faces_emore", "ms1m-retinaface-t1", "faces_webface_112x112", "glint360k")
RECORDS = "train.rec"

WORKER_TIMEOUT = 50.0  # seconds, so that a hung worker ends a run within a minute
_MAX_REPLACEMENTS = 8  # images of the identity, and then of the set, that are tried instead of a bad one

Sample = tuple[np.ndarray, np.random.Generator]  # an image, (S, S, 3) RGB uint8, and the sample's random numbers
# (B, H, W, 3) RGB uint8, (B,) int64 labels, and the bad images that other images replace.
Batch = tuple[torch.Tensor, torch.Tensor, list[BadImage]]


class TrainingImages(Protocol):
    """What training needs of a set of images, whatever its format on disk.

    It is pickled into worker processes, so what grows with the set is in numpy arrays.
    """

    root: Path  # the folder or file, for messages
    classes: list[str]
    labels: np.ndarray  # (N,) int64, the position of each image's class in `classes`; every class has an image

    def __len__(self) -> int:
        """Return the number of images N."""

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (S, S, 3) RGB uint8. Raise DataError if it cannot be used."""

    def encoded(self, index: int) -> bytes:
        """Return the image file (JPEG, PNG ...) as stored. Raise DataError if it cannot be read."""

    def where(self, index: int) -> str:
        """Return the place of image `index`, for messages: a path, or a file and the number of a record."""


def find_train_data(data_dir: str | Path, train_data: str | None) -> Path:
    """Find the training set, a folder of people or a .rec file. Raise DataError without one.

    `train_data` is under data_dir, or a path. None: the first of TRAIN_FOLDERS that exists, else the first of
    INSIGHTFACE_FOLDERS that holds images, else data_dir itself if it has a train.rec.
    """
    data_dir = Path(data_dir)
    if train_data:
        for path in (data_dir / train_data, Path(train_data)):
            if path.exists():
                return _images_in(path)
        place = f"neither under {data_dir} nor as a path"
        raise DataError(f"--train_data={train_data}: no such folder or .rec file, {place}. Name another.")
    for name in (*TRAIN_FOLDERS, *INSIGHTFACE_FOLDERS, "."):
        folder = data_dir / name
        if (name in TRAIN_FOLDERS and folder.is_dir()) or _images_in(folder) != folder:
            return _images_in(folder)
    raise DataError(
        f"{data_dir}: no training folder ({', '.join(TRAIN_FOLDERS)}) and no {RECORDS}. Put one there, with one folder "
        f"of aligned faces for each person, or name it with --train_data."
    )


def _images_in(path: Path) -> Path:
    """Return the `imgs` folder in a folder, or its train.rec, or else the folder (or file) itself."""
    if (path / "imgs").is_dir():
        return path / "imgs"
    return path / RECORDS if (path / RECORDS).is_file() else path


def open_training_images(path: str | Path) -> TrainingImages:
    """Open a folder of people or a .rec file, also inside a folder. Raise DataError if that fails."""
    path = _images_in(Path(path))
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix != ".rec":
        raise DataError(f"{path}: no training set. Name a folder of people, or a .rec file.")
    return RecordImages(path)


# Writes B samples, augmented, into (B, 112, 112, 3) RGB uint8 pixels.
Augment = Callable[[Iterable[Sample], np.ndarray], None]


@dataclass(frozen=True)
class Augmentation:
    """Augments training images, and degrades the fraction `low_res_prob` of them to one of `low_res_sizes` pixels."""

    crop: str = "128"  # of util.face.CROPS
    strong: bool = False
    low_res_sizes: tuple[int, ...] = ()
    low_res_prob: float = 0.5

    def __call__(self, samples: Iterable[Sample], pixels: np.ndarray) -> None:
        """Augment B samples into `pixels`, (B, 112, 112, 3) RGB uint8."""
        augment: Callable[..., np.ndarray] = transform.TRAIN_CROPS[self.crop]
        if self.strong:
            augment = partial(transform.train_warp, full=self.crop == "whole")
        sizes = np.full(len(pixels), FACE_SIZE)
        for place, (image, rng) in enumerate(samples):
            pixels[place] = augment(image, rng)
            if self.low_res_sizes and rng.random() < self.low_res_prob:
                # With one size no random number is drawn for it.
                choice = rng.integers(len(self.low_res_sizes)) if len(self.low_res_sizes) > 1 else 0
                sizes[place] = self.low_res_sizes[choice]
        # One call for all images of a size: a call for each image would take three times as long.
        for size in self.low_res_sizes:
            of_size = sizes == size
            if of_size.any():
                pixels[of_size] = transform.degrade(pixels[of_size], size)


class BatchDataset(Dataset):
    """Makes complete batches in the worker, so that one uint8 array passes between processes.

    The random numbers of a sample, also for replacing a bad image, come from (seed, epoch, position): any sample of any
    epoch can be reproduced, whatever the number of workers and ranks.
    """

    def __init__(self, images: TrainingImages, augmentation: Augment, seed: int, num_workers: int = 0):
        self._images = images
        self._augmentation = augmentation
        self._seed = seed
        # The image that each worker reads now, -1 for none, in memory that the main process sees.
        self.reading = RawArray("q", [-1] * max(1, num_workers))

    def __getitem__(self, batch: BatchIndices) -> Batch | DataError:
        """Make a batch: (B, 112, 112, 3) RGB uint8, (B,) int64 labels, and the bad images that were replaced.

        A DataError is returned, not raised: torch would wrap a raised one in a traceback of many lines.
        """
        pixels = np.empty((len(batch.indices), FACE_SIZE, FACE_SIZE, 3), np.uint8)
        used = batch.indices.copy()
        bad: list[BadImage] = []
        try:
            self._augmentation(self._samples(batch, used, bad), pixels)
        except DataError as error:
            return error
        return torch.from_numpy(pixels), torch.from_numpy(self._images.labels[used]), bad

    def _samples(self, batch: BatchIndices, used: np.ndarray, bad: list[BadImage]) -> Iterator[Sample]:
        """Yield the samples of a batch. Write the index of an image that replaces a bad one into `used`."""
        worker = get_worker_info()
        slot = worker.id if worker else 0
        rng = SampleRng(self._seed, batch.epoch)
        for place, drawn in enumerate(batch.indices.tolist()):
            for index in self._candidates(drawn, rng, batch.start + place):
                self.reading[slot] = index
                try:
                    image = self._images.image(index)
                    break
                except DataError as error:
                    bad.append(BadImage(self._images.where(index), str(error)))
            else:
                raise DataError(bad[-1].reason)
            used[place] = index
            yield image, rng.for_sample(batch.start + place)
        self.reading[slot] = -1

    def _candidates(self, index: int, rng: SampleRng, position: int) -> Iterator[int]:
        """Yield the image of a sample, and if it is bad, random images of its identity, and then of all."""
        yield index
        labels = self._images.labels
        generator = rng.for_sample(position)
        same = np.flatnonzero(labels == labels[index])
        yield from generator.permutation(same[same != index])[:_MAX_REPLACEMENTS].tolist()
        yield from generator.integers(len(labels), size=_MAX_REPLACEMENTS).tolist()


class TrainLoader:
    """Iterates over the batches of an epoch: `for images, labels in loader.epoch(3)`.

    Other images replace those that cannot be used, and `loader.bad` counts them: see BadImages.
    """

    def __init__(
        self,
        images: TrainingImages,
        batch_size: int,
        augmentation: Augment,
        seed: int = 1337,
        num_workers: int = 0,
        pin_memory: bool = False,
        steps: int | None = None,
        dataset: type[BatchDataset] = BatchDataset,
        rank: int = 0,
        world_size: int = 1,
        max_bad: float = 0.0,
        worker_timeout: float = WORKER_TIMEOUT,
    ):
        """Set up the loader.

        Args:
            images: the training set.
            batch_size: images in a batch of this process; a step has `world_size` of these batches.
            augmentation: what makes the pixels of a batch.
            seed: seed of the order and of every sample.
            num_workers: processes that prepare batches; 0 for none.
            pin_memory: whether batches are put into page-locked memory, for copies to a GPU.
            steps: steps in an epoch; None for as many as the images fill.
            dataset: the class that makes the batches.
            rank: number of this process, from 0 to world_size - 1.
            world_size: number of processes that train together.
            max_bad: fraction of the images that may be bad; 0 makes the first bad image an error.
            worker_timeout: seconds without a new image after which the workers count as hung.
        """
        self.bad = BadImages(images.root, max_bad)
        self._sampler = BalancedSampler(
            images.labels, batch_size=batch_size, seed=seed, steps=steps, rank=rank, world_size=world_size
        )
        self._batches = dataset(images, augmentation, seed, num_workers)
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=2 if num_workers else None,
            worker_init_fn=init_worker,
            multiprocessing_context=worker_context() if num_workers else None,
            # The loader's own seed would be drawn from torch's global generator, whose state a resumed run restores.
            generator=torch.Generator().manual_seed(seed),
        )
        self._made: Iterable = loader
        if num_workers:
            self._made = WatchedLoader(loader, self._batches.reading, images.where, timeout=worker_timeout)

    def __len__(self) -> int:
        """Return the number of steps of an epoch, the same on all ranks."""
        return len(self._sampler)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (B, 112, 112, 3) RGB uint8 images and (B,) int64 labels of each step from `start_step` on.

        Images of the steps before are not read.

        Raises:
            DataError: an image is bad and max_bad is 0, or all images that could replace it are bad too.
            RunError: a worker died, or the workers hang.
        """
        self._sampler.epoch = epoch
        self._sampler.start_step = start_step
        self.bad.discard_ahead()
        for images, labels, bad in map(_raise_error, self._made):
            if bad and self.bad.max_bad == 0:
                raise DataError(bad[0].reason)
            self.bad.add(len(labels), bad)
            yield images, labels

    def first_images(self) -> torch.Tensor:
        """Return the images of this rank's first batch of epoch 0, (B, 112, 112, 3) RGB uint8, to look at."""
        self._sampler.epoch = 0
        self._sampler.start_step = 0
        return _raise_error(self._batches[next(iter(self._sampler))])[0]

    def close(self) -> None:
        """End the workers, and kill those that do not end within seconds. The loader cannot be used after this."""
        if isinstance(self._made, WatchedLoader):
            self._made.close()


def _raise_error(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        raise batch
    return batch
