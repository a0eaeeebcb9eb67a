"""Faces to learn from and to be judged by: pairs of a small and a large image, and sets that hold each image once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from util.data.decode import decode_face
from util.data.folder_index import IMAGE_SUFFIXES
from util.data.loader import RECORDS, BatchDataset, Sample, TrainingImages, open_training_images
from util.data.sampler import BatchIndices
from util.errors import DataError
from util.pairs import load_pairs
from util.transform import SIZE, shrink, train_crop

_HELD_OUT, _CHOSEN, _PATCH = 1, 2, 3  # keep the streams of random numbers of one seed apart


def as_face(image: np.ndarray) -> np.ndarray:
    """(S, S, 3) RGB uint8 -> (112, 112, 3), bilinear as the other crops; one of that size stays as it is."""
    return image if image.shape[0] == SIZE else cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class View:
    """How training images are seen, for TrainLoader. `patch`: in low-resolution pixels, or None for whole faces.

    `crop_share` of the samples are cut as recognition cuts its images: what evaluation enlarges looks like these.
    """

    scale: int
    patch: int | None = None
    crop_share: float = 0.0

    def __call__(self, samples: Iterable[Sample], pixels: np.ndarray) -> None:
        """Makes `pixels`, (B, 112, 112, 3) RGB uint8, of as many samples: flipped every other time."""
        for place, (image, rng) in enumerate(samples):
            if rng.random() < self.crop_share:
                pixels[place] = train_crop(image, rng)
            else:
                face = as_face(image)
                pixels[place] = cv2.flip(face, 1) if rng.random() < 0.5 else face


class PairDataset(BatchDataset):
    """Batches of pairs, made in the worker: the small images are what util.transform makes of the large ones."""

    def __getitem__(self, batch: BatchIndices) -> tuple[torch.Tensor, torch.Tensor] | DataError:
        """(B, n, n, 3) and (B, scale * n, scale * n, 3) RGB uint8, or the error."""
        made = super().__getitem__(batch)
        if isinstance(made, DataError):
            return made
        view, high = self._augmentation, made[0].numpy()
        low = shrink(high, SIZE // view.scale)
        if view.patch is not None:
            rng = np.random.default_rng([self._seed, batch.epoch, batch.start, _PATCH])
            low, high = _patches(low, high, view, rng)
        return torch.from_numpy(low), torch.from_numpy(high)


def _patches(low: np.ndarray, high: np.ndarray, view: View, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    corners = rng.integers(0, low.shape[1] - view.patch + 1, size=(len(low), 2))
    return tuple(
        np.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(images, corners * factor, strict=True)])
        for images, factor, size in ((low, 1, view.patch), (high, view.scale, view.patch * view.scale))
    )


class ImageSubset:
    """Some of the images of a set, in its order: those whose class is among `people`."""

    def __init__(self, images: TrainingImages, people: np.ndarray):
        self.root, self.classes = images.root, [images.classes[person] for person in people]
        numbers = np.full(len(images.classes), -1)
        numbers[people] = np.arange(len(people))
        self._indices = np.flatnonzero(numbers[images.labels] >= 0)
        self.labels = numbers[images.labels[self._indices]]
        self._images = images

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> np.ndarray:
        return self._images.image(int(self._indices[index]))

    def encoded(self, index: int) -> bytes:
        return self._images.encoded(int(self._indices[index]))

    def where(self, index: int) -> str:
        return self._images.where(int(self._indices[index]))


def hold_out(images: TrainingImages, share: float, seed: int) -> tuple[ImageSubset, ImageSubset]:
    """The images to train on, and those of a share of the people, one or more, drawn from the seed, to validate on."""
    order = np.random.default_rng([seed, _HELD_OUT]).permutation(len(images.classes))
    count = min(max(1, round(share * len(order))), len(order) - 1)
    return ImageSubset(images, np.sort(order[count:])), ImageSubset(images, np.sort(order[:count]))


def open_faces(path: str | Path) -> tuple[int, Callable[[int], np.ndarray]]:
    """How many images there are, and the function that reads one, (S, S, 3) RGB uint8.

    A folder stands for all image files below it, a folder with a train.rec and a .rec for its records; all else is
    opened as a verification set. Raises DataError where there is nothing to be read.
    """
    path = Path(path)
    if path.suffix == ".rec" or (path / RECORDS).is_file():
        records = open_training_images(path)
        return len(records), records.image
    if not path.is_dir() or (path / "meta" / "storage").is_file():
        pairs = load_pairs(path)
        return 2 * len(pairs), lambda index: pairs.images(index, index + 1)[0]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != ".")
    if not files:
        raise DataError(f"{path}: no image in it ({', '.join(IMAGE_SUFFIXES)}); name another folder with --val_data")

    def read(index: int) -> np.ndarray:
        file = files[index]
        try:
            return decode_face(file.read_bytes(), str(file), "Restore it or remove it.")
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); restore it or remove it") from None

    return len(files), read


def some_faces(total: int, read: Callable[[int], np.ndarray], limit: int, seed: int) -> np.ndarray:
    """(V, 112, 112, 3) RGB uint8: up to `limit` different images, drawn from the seed. Pairs repeat their images."""
    chosen: dict[bytes, np.ndarray] = {}
    for index in np.random.default_rng([seed, _CHOSEN]).permutation(total):
        if len(chosen) == limit:
            break
        face = np.ascontiguousarray(as_face(read(int(index))))
        chosen.setdefault(face.tobytes(), face)
    return np.stack(list(chosen.values()))
