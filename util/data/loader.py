"""Training data: sets of images, and a loader whose every sample can be made again."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
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
from util.data.sampler import BalancedSampler, Batch, SampleRng
from util.errors import DataError

# Looked for in data_dir, in this order: first these folders, then, where they hold images, InsightFace's.
TRAIN_FOLDERS = ("imgs_casia", "ms1m_align_112", "imgs_train", "imgs")
INSIGHTFACE_FOLDERS = ("faces_emore", "ms1m-retinaface-t1", "faces_webface_112x112", "glint360k")
RECORDS = "train.rec"

Sample = tuple[np.ndarray, np.random.Generator]  # an image, (S, S, 3) RGB uint8, and the random numbers of its place


class TrainingImages(Protocol):
    """What training needs of a set of images, whatever its format on the disk.

    It is pickled into worker processes, so what grows with the set lies in numpy arrays.
    """

    root: Path  # the folder or file, for messages
    classes: list[str]
    labels: np.ndarray  # (N,) int64, the position of each image's class in `classes`; every class has an image

    def __len__(self) -> int:
        """The number of images N."""
        ...

    def image(self, index: int) -> np.ndarray:
        """Image `index` as (S, S, 3) RGB uint8. DataError names an image that cannot be used."""
        ...

    def encoded(self, index: int) -> bytes:
        """The image file itself (JPEG, PNG ...), as it is stored. DataError names one that cannot be read."""
        ...

    def where(self, index: int) -> str:
        """Where image `index` lies, for messages: a path, or a file and the number of a record."""
        ...


def find_train_data(data_dir: str | Path, train_data: str | None) -> Path:
    """What to train on, a folder or a .rec file: `train_data`, under data_dir or a path, or what data_dir has.

    That is the first of TRAIN_FOLDERS that there is, else the first of INSIGHTFACE_FOLDERS that holds images, else
    data_dir itself if it has a train.rec. Of a folder, what _images_in() says is taken. Raises DataError if there is
    none.
    """
    data_dir = Path(data_dir)
    if train_data:
        for path in (data_dir / train_data, Path(train_data)):
            if path.exists():
                return _images_in(path)
        raise DataError(
            f"--train_data={train_data}: no such folder or .rec file, neither under {data_dir} nor as a path"
        )
    for name in TRAIN_FOLDERS:
        if (data_dir / name).is_dir():
            return _images_in(data_dir / name)
    for folder in [*(data_dir / name for name in INSIGHTFACE_FOLDERS), data_dir]:
        if _images_in(folder) != folder:
            return _images_in(folder)
    raise DataError(
        f"{data_dir}: no training folder ({', '.join(TRAIN_FOLDERS)}) and no {RECORDS}; put one there, one folder of "
        f"aligned faces a person, or name it with --train_data"
    )


def _images_in(path: Path) -> Path:
    """The `imgs` folder in a folder, or its train.rec, or else the folder (or file) itself."""
    if (path / "imgs").is_dir():
        return path / "imgs"
    return path / RECORDS if (path / RECORDS).is_file() else path


def open_training_images(path: str | Path) -> TrainingImages:
    """Opens a folder of people, or a .rec file, or a folder that holds one. Raises DataError if it cannot be used."""
    path = _images_in(Path(path))
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix != ".rec":
        raise DataError(f"{path}: no training set; name a folder of people, or a .rec file")
    return RecordImages(path)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image. A share `lr_prob` of the samples is degraded, each to one of `lr_sizes`."""

    strong: bool = False
    lr_sizes: tuple[int, ...] = ()
    lr_prob: float = 0.5

    def __call__(self, samples: Iterable[Sample], pixels: np.ndarray) -> None:
        """Makes `pixels`, (B, 112, 112, 3) RGB uint8, of as many samples; those that are degraded alike, together."""
        change = transform.train_warp if self.strong else transform.train_crop
        sizes = np.full(len(pixels), transform.SIZE)
        for place, (image, rng) in enumerate(samples):
            pixels[place] = change(image, rng)
            if self.lr_sizes and rng.random() < self.lr_prob:
                sizes[place] = self.lr_sizes[rng.integers(len(self.lr_sizes)) if len(self.lr_sizes) > 1 else 0]
        for size in self.lr_sizes:
            alike = sizes == size
            if alike.any():  # a call for each image would take three times as long
                pixels[alike] = transform.degrade(pixels[alike], size)


class BatchDataset(Dataset):
    """Makes whole batches in the worker, so that one uint8 array and not many small ones passes between processes.

    The random numbers of a sample come from (seed, epoch, position): any sample of any epoch can be made again,
    whatever the number of workers and ranks.
    """

    def __init__(self, images: TrainingImages, augmentation: Augmentation, seed: int):
        self._images, self._augmentation, self._seed = images, augmentation, seed

    def __getitem__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | DataError:
        """(B, 112, 112, 3) RGB uint8 and (B,) int64; or the error, which would lose its one line on the way up."""
        pixels = np.empty((len(batch.indices), transform.SIZE, transform.SIZE, 3), np.uint8)
        draws = SampleRng(self._seed, batch.epoch)
        try:
            samples = ((self._images.image(i), draws.at(batch.start + k)) for k, i in enumerate(batch.indices.tolist()))
            self._augmentation(samples, pixels)
        except DataError as error:
            return error
        return torch.from_numpy(pixels), torch.from_numpy(self._images.labels[batch.indices])


class TrainLoader:
    """Iterates over the batches of an epoch: `for images, labels in loader.epoch(3)`.

    `dataset` makes them, a BatchDataset or what is derived from it; `steps`: how many there are, see BalancedSampler.
    Of `world_size` processes that train together, the one of number `rank` gets its share of each step, `batch_size` images.
    """

    def __init__(
        self,
        images: TrainingImages,
        batch_size: int,
        augmentation: Augmentation,
        seed: int = 1337,
        num_workers: int = 0,
        pin_memory: bool = False,
        steps: int | None = None,
        dataset: type[BatchDataset] = BatchDataset,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._sampler = BalancedSampler(images.labels, batch_size, seed, steps, rank, world_size)
        self._batches = dataset(images, augmentation, seed)
        self._loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=2 if num_workers else None,
            worker_init_fn=_start_worker,
            # The loader's own seed would be drawn from torch's global generator, whose state a resumed run restores.
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        """The number of steps of an epoch, the same on all ranks."""
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of (B, 112, 112, 3) RGB uint8 images and (B,) int64 labels. Raises DataError for a broken image."""
        self._sampler.epoch = epoch
        yield from map(_unless_error, self._loader)

    def first_images(self) -> torch.Tensor:
        """The images of this rank's first batch of all, (B, 112, 112, 3) RGB uint8: something to look at."""
        self._sampler.epoch = 0
        return _unless_error(self._batches[next(iter(self._sampler))])[0]


def _unless_error(batch: tuple[torch.Tensor, torch.Tensor] | DataError) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _start_worker(worker: int) -> None:
    """Workers are the parallelism: threads of OpenCV and BLAS in each would only fight over the cores.

    Ctrl-C is the main process's business. SIGTERM is how it ends them, and torch takes any other exit code than 0 for
    a crash, which it reports on the console.
    """
    cv2.setNumThreads(0)
    threadpool_limits(limits=1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    sys.excepthook = _report_but_lost_connections


def _report_but_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A thread of the worker hands over the batches, and is cut off when the main process ends: that is no news."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)
