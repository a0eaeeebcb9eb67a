"""Faces for training and validation: pairs of a small and a large image, and sets with each image once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from util.data.decode import decode_face
from util.data.folder_index import IMAGE_SUFFIXES
from util.data.loader import RECORDS, Batch, BatchDataset, Sample, TrainingImages, open_training_images
from util.data.sampler import BatchIndices
from util.errors import DataError
from util.face import FACE_SIZE
from util.files import read_bytes
from util.pairs import load_pairs
from util.transform import shrink, train_crop

_FIX = "Restore it or remove it."
# Keep the random number streams of one seed apart.
_HELD_OUT = 1
_CHOSEN = 2
_PATCH = 3


def as_face(image: np.ndarray) -> np.ndarray:
    """Resize (S, S, 3) RGB uint8 to (112, 112, 3), bilinear like the other crops."""
    if image.shape[0] == FACE_SIZE:
        return image
    return cv2.resize(image, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class PairTransform:
    """The augmentation of training images, for TrainLoader. `patch` is in low-resolution pixels, None for full faces.

    The fraction `crop_share` of the samples is cropped as for recognition, because evaluation enlarges such crops.
    """

    scale: int
    patch: int | None = None
    crop_share: float = 0.0

    def __call__(self, samples: Iterable[Sample], pixels: np.ndarray) -> None:
        """Augment B samples into `pixels`, (B, 112, 112, 3) RGB uint8. Full faces are flipped with probability 0.5."""
        for place, (image, rng) in enumerate(samples):
            if rng.random() < self.crop_share:
                pixels[place] = train_crop(image, rng)
            else:
                face = as_face(image)
                pixels[place] = cv2.flip(face, 1) if rng.random() < 0.5 else face


class PairDataset(BatchDataset):
    """Makes batches of pairs in the worker. util.transform shrinks the large images to the small ones."""

    def __getitem__(self, batch: BatchIndices) -> Batch | DataError:
        """Make a batch: (B, n, n, 3) and (B, scale * n, scale * n, 3) RGB uint8, or the error."""
        made = super().__getitem__(batch)
        if isinstance(made, DataError):
            return made
        transform = self._augmentation
        assert isinstance(transform, PairTransform)
        high = made[0].numpy()
        low = shrink(high, FACE_SIZE // transform.scale)
        if transform.patch is not None:
            rng = np.random.default_rng([self._seed, batch.epoch, batch.start, _PATCH])
            low, high = _cut_patches(low, high, transform, rng)
        return torch.from_numpy(low), torch.from_numpy(high), made[2]


def _cut_patches(
    low: np.ndarray, high: np.ndarray, transform: PairTransform, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the same random square from each small and each large image."""
    size, scale = transform.patch, transform.scale
    corners = rng.integers(0, low.shape[1] - size + 1, size=(len(low), 2))
    low_patches, high_patches = [], []
    for small, large, (y, x) in zip(low, high, corners, strict=True):
        low_patches.append(small[y : y + size, x : x + size])
        high_patches.append(large[scale * y : scale * (y + size), scale * x : scale * (x + size)])
    return np.stack(low_patches), np.stack(high_patches)


class ImageSubset:
    """The images of a set whose class is among `people`, in the order of the set."""

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


def hold_out(images: TrainingImages, fraction: float, seed: int) -> tuple[ImageSubset, ImageSubset]:
    """Split off the images of a random fraction of the identities, at least one: (training, validation)."""
    order = np.random.default_rng([seed, _HELD_OUT]).permutation(len(images.classes))
    count = min(max(1, round(fraction * len(order))), len(order) - 1)
    return ImageSubset(images, np.sort(order[count:])), ImageSubset(images, np.sort(order[:count]))


def open_faces(path: str | Path) -> tuple[int, Callable[[int], np.ndarray]]:
    """Open a set of faces: a folder of images, a .rec file or its folder, or a verification set.

    Returns:
        The number of images, and a function that reads one as (S, S, 3) RGB uint8.

    Raises:
        DataError: there is no image.
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
        raise DataError(f"{path}: no image in it ({', '.join(IMAGE_SUFFIXES)}). Name another folder with --val_data.")

    def read(index: int) -> np.ndarray:
        file = files[index]
        return decode_face(read_bytes(file, _FIX), str(file), _FIX)

    return len(files), read


def some_faces(total: int, read: Callable[[int], np.ndarray], limit: int, seed: int) -> np.ndarray:
    """Read up to `limit` different faces in random order. Pairs repeat images, which count once.

    Args:
        total: the number of images.
        read: reads an image by its number.
        limit: the largest number of faces.
        seed: of the random order.

    Returns:
        (V, 112, 112, 3) RGB uint8.
    """
    chosen: dict[bytes, np.ndarray] = {}
    for index in np.random.default_rng([seed, _CHOSEN]).permutation(total):
        if len(chosen) == limit:
            break
        face = np.ascontiguousarray(as_face(read(int(index))))
        chosen.setdefault(face.tobytes(), face)
    return np.stack(list(chosen.values()))
