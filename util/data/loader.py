"""Training data: the kinds of training sets, and a loader whose every sample can be reproduced."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset

from util import transform
from util.data.image_folder import ImageFolder
from util.data.record_dataset import RecordImages
from util.data.sampler import BalancedSampler, BatchIndices, SampleRng
from util.errors import DataError
from util.face import FACE_SIZE

# Searched for in data_dir, in this order: first these folders, then InsightFace's folders that hold images.
TRAIN_FOLDERS = ("imgs_casia", "ms1m_align_112", "imgs_train", "imgs")
INSIGHTFACE_FOLDERS = ("faces_emore", "ms1m-retinaface-t1", "faces_webface_112x112", "glint360k")
RECORDS = "train.rec"

Sample = tuple[np.ndarray, np.random.Generator]  # an image, (S, S, 3) RGB uint8, and the sample's random numbers
ImageBatch = tuple[torch.Tensor, torch.Tensor]  # (B, H, W, 3) RGB uint8 and (B,) int64 labels


class TrainingImages(Protocol):
    """What training needs of a set of images, whatever its format on disk.

    It is pickled into worker processes, so what grows with the set is in numpy arrays.
    """

    root: Path  # the folder or file, for messages
    classes: list[str]
    labels: np.ndarray  # (N,) int64, the position of each image's class in `classes`; every class has an image

    def __len__(self) -> int:
        """Return the number of images N."""
        ...

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (S, S, 3) RGB uint8. Raise DataError if it cannot be used."""
        ...

    def encoded(self, index: int) -> bytes:
        """Return the image file (JPEG, PNG ...) as stored. Raise DataError if it cannot be read."""
        ...

    def where(self, index: int) -> str:
        """Return the place of image `index`, for messages: a path, or a file and the number of a record."""
        ...


def find_train_data(data_dir: str | Path, train_data: str | None) -> Path:
    """Find the training set: a folder of people or a .rec file.

    Args:
        data_dir: the folder that holds data sets.
        train_data: a folder or .rec file under data_dir, or a path. None: the first of TRAIN_FOLDERS that exists, else
            the first of INSIGHTFACE_FOLDERS that holds images, else data_dir itself if it has a train.rec.

    Raises:
        DataError: nothing was found.
    """
    data_dir = Path(data_dir)
    if train_data:
        for path in (data_dir / train_data, Path(train_data)):
            if path.exists():
                return _images_in(path)
        raise DataError(
            f"--train_data={train_data}: no such folder or .rec file, neither under {data_dir} nor as a path. Name "
            f"another."
        )
    for name in TRAIN_FOLDERS:
        if (data_dir / name).is_dir():
            return _images_in(data_dir / name)
    for folder in [*(data_dir / name for name in INSIGHTFACE_FOLDERS), data_dir]:
        if _images_in(folder) != folder:
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

    strong: bool = False
    low_res_sizes: tuple[int, ...] = ()
    low_res_prob: float = 0.5

    def __call__(self, samples: Iterable[Sample], pixels: np.ndarray) -> None:
        """Augment B samples into `pixels`, (B, 112, 112, 3) RGB uint8."""
        augment = transform.train_warp if self.strong else transform.train_crop
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

    The random numbers of a sample come from (seed, epoch, position): any sample of any epoch can be reproduced,
    whatever the number of workers and ranks.
    """

    def __init__(self, images: TrainingImages, augmentation: Augment, seed: int):
        self._images = images
        self._augmentation = augmentation
        self._seed = seed

    def __getitem__(self, batch: BatchIndices) -> ImageBatch | DataError:
        """Make a batch: (B, 112, 112, 3) RGB uint8 and (B,) int64 labels.

        A DataError is returned, not raised: torch would wrap a raised one in a traceback of many lines.
        """
        pixels = np.empty((len(batch.indices), FACE_SIZE, FACE_SIZE, 3), np.uint8)
        try:
            self._augmentation(self._samples(batch), pixels)
        except DataError as error:
            return error
        return torch.from_numpy(pixels), torch.from_numpy(self._images.labels[batch.indices])

    def _samples(self, batch: BatchIndices) -> Iterator[Sample]:
        rng = SampleRng(self._seed, batch.epoch)
        for position, index in enumerate(batch.indices.tolist(), batch.start):
            yield self._images.image(index), rng.for_sample(position)


class TrainLoader:
    """Iterates over the batches of an epoch: `for images, labels in loader.epoch(3)`."""

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
        """
        self._sampler = BalancedSampler(
            images.labels, batch_size=batch_size, seed=seed, steps=steps, rank=rank, world_size=world_size
        )
        self._batches = dataset(images, augmentation, seed)
        self._loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=2 if num_workers else None,
            worker_init_fn=_init_worker,
            # The loader's own seed would be drawn from torch's global generator, whose state a resumed run restores.
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        """Return the number of steps of an epoch, the same on all ranks."""
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[ImageBatch]:
        """Yield (B, 112, 112, 3) RGB uint8 images and (B,) int64 labels. Raise DataError for a broken image."""
        self._sampler.epoch = epoch
        yield from map(_raise_error, self._loader)

    def first_images(self) -> torch.Tensor:
        """Return the images of this rank's first batch of epoch 0, (B, 112, 112, 3) RGB uint8, to look at."""
        self._sampler.epoch = 0
        return _raise_error(self._batches[next(iter(self._sampler))])[0]


def _raise_error(batch: ImageBatch | DataError) -> ImageBatch:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _init_worker(worker: int) -> None:
    """Set up a worker process: one thread each, and an end without noise.

    The workers are the parallelism: threads of OpenCV and BLAS in each would compete for the cores. Only the main
    process handles Ctrl-C. It ends the workers with SIGTERM, and torch reports any exit code but 0 as a crash.
    """
    cv2.setNumThreads(0)
    threadpool_limits(limits=1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    sys.excepthook = _report_except_lost_connections


def _report_except_lost_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report an uncaught error, unless the main process has ended and closed the connection."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)
