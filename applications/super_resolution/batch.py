"""Enlarge a tree of images. Existing outputs are kept, and unreadable images do not stop the run."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from applications.super_resolution.faces import as_face
from util.errors import RunError
from util.face import FACE_SIZE
from util.files import path_inside
from util.image_io import NotAnImage, UnreadableImage, read_photo, write_image
from util.image_tree import printable, unique_output_names, walk
from util.super_resolution import enlarge
from util.transform import shrink

_FILES_AT_ONCE = 256
_MAX_PIXELS = 512 * 512  # of an image to enlarge: a photograph could need more memory than there is


@dataclass(frozen=True)
class Enlarger:
    """A network and the preparation of its images. With `degrade` the images are faces, which are shrunk first.

    A batch has the pixels of `batch_size` faces of 112x112, so it holds more of smaller images.
    """

    network: nn.Module  # on the device, in eval mode
    scale: int
    device: torch.device
    batch_size: int
    degrade: bool = False

    def read(self, path: Path) -> np.ndarray | str | None:
        """Return the image to enlarge, (h, w, 3) RGB uint8, or why it is left out, or None for other files."""
        try:
            image = read_photo(path)
        except NotAnImage:
            return None
        except UnreadableImage as error:
            return str(error)
        height, width = image.shape[:2]
        if self.degrade:
            if height != width:
                return f"{width}x{height} is not square, and --degrade shrinks square faces; align them first"
            return shrink(as_face(image), FACE_SIZE // self.scale)
        if height * width > _MAX_PIXELS:
            return f"{width}x{height} are too many pixels to enlarge, {_MAX_PIXELS} at most; cut or shrink it"
        return image

    def __call__(self, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the enlarged images, (scale * h, scale * w, 3) RGB uint8 each. All `images` must have one shape."""
        height, width = images[0].shape[:2]
        step = max(1, self.batch_size * FACE_SIZE * FACE_SIZE // (height * width))
        for start in range(0, len(images), step):
            batch = torch.from_numpy(np.stack(images[start : start + step])).to(self.device)
            try:
                yield from enlarge(self.network, batch).cpu().numpy()
            except torch.OutOfMemoryError as error:
                raise RunError(f"{str(error).split('. ')[0]}; lower --batch_size") from None


def enlarge_tree(source: Path, out: Path, enlarger: Enlarger, suffix: str) -> dict[str, int]:
    """Enlarge the images of `source` that are missing in `out`.

    Args:
        source: a folder of images.
        out: gets the enlarged images in the same folders.
        enlarger: reads and enlarges the images.
        suffix: "png" or "jpg".

    Returns:
        The number of images that were "enlarged", "there already" and "left out". The last ones are listed on stderr.

    Raises:
        RunError: an image cannot be written, or the device has too little memory.
    """
    jobs = _jobs(source, out, suffix)
    counts = {"enlarged": 0, "there already": 0, "left out": 0}
    with ThreadPoolExecutor() as pool, tqdm(unit="file", desc="enlarged", disable=None) as bar:
        while files := list(islice(jobs, _FILES_AT_ONCE)):
            missing = [(path, target) for path, target in files if not target.is_file()]
            counts["there already"] += len(files) - len(missing)
            by_shape: dict[tuple[int, ...], list[tuple[Path, np.ndarray]]] = defaultdict(list)
            images = pool.map(enlarger.read, (path for path, _ in missing))
            for (path, target), image in zip(missing, images, strict=True):
                if isinstance(image, str):
                    counts["left out"] += 1
                    bar.write(f"{printable(path)}: {image}", file=sys.stderr)
                elif image is not None:
                    by_shape[image.shape].append((target, image))
            for group in by_shape.values():
                _enlarge_group(out, group, enlarger)
                counts["enlarged"] += len(group)
            bar.update(len(files))
    return counts


def _jobs(source: Path, out: Path, suffix: str) -> Iterator[tuple[Path, Path]]:
    """Yield each file below `source`, and the file for its enlarged image."""
    for folder, names in walk(source, out):
        for name, output in zip(names, unique_output_names(names), strict=True):
            yield source / folder / name, out / folder / f"{output}.{suffix}"


def _enlarge_group(out: Path, group: list[tuple[Path, np.ndarray]], enlarger: Enlarger) -> None:
    """Enlarge images of one shape and write each to its target."""
    targets, images = zip(*group, strict=True)
    for target, large in zip(targets, enlarger(images), strict=True):
        try:
            write_image(path_inside(out, target.relative_to(out)), large)
        except OSError as error:
            raise RunError(
                f"{printable(target)}: cannot be written ({error.strerror}). Run the same command again to continue."
            ) from None
