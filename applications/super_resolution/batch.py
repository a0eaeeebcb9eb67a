"""A whole tree of images, enlarged: what is there already is left alone, and what cannot be read stops nothing."""

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

from applications.align.batch import outputs, printable, walk, write_image
from applications.super_resolution.faces import as_face
from util.errors import RunError
from util.files import path_inside
from util.image_io import NotAnImage, UnreadableImage, read_photo
from util.super_resolution import enlarge
from util.transform import SIZE, shrink

_FILES_AT_ONCE = 256
_LARGEST = 512 * 512  # pixels of an image that is still enlarged: of a photograph, memory could run out


@dataclass(frozen=True)
class Enlarger:
    """A network, and how its images are made ready. With `degrade` they are faces, and shrunk beforehand.

    A batch has the pixels of `batch_size` faces of 112x112: more of smaller images.
    """

    network: nn.Module  # on the device, in eval mode
    scale: int
    device: torch.device
    batch_size: int
    degrade: bool = False

    def read(self, path: Path) -> np.ndarray | str | None:
        """The image to enlarge, (h, w, 3) RGB uint8; why there is none, in words; or None for what is not an image."""
        try:
            image = read_photo(path)
        except NotAnImage:
            return None
        except UnreadableImage as error:
            return str(error)
        height, width = image.shape[:2]
        if self.degrade:
            if height != width:
                return f"{width}x{height} is not square, as the faces are that --degrade shrinks; align them first"
            return shrink(as_face(image), SIZE // self.scale)
        if height * width > _LARGEST:
            return f"{width}x{height} are too many pixels to enlarge, {_LARGEST} at most; cut or shrink it"
        return image

    def __call__(self, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Images of one shape, each (scale * h, scale * w, 3) RGB uint8."""
        height, width = images[0].shape[:2]
        step = max(1, self.batch_size * SIZE * SIZE // (height * width))
        for start in range(0, len(images), step):
            batch = torch.from_numpy(np.stack(images[start : start + step])).to(self.device)
            try:
                yield from enlarge(self.network, batch).cpu().numpy()
            except torch.OutOfMemoryError as error:
                raise RunError(f"{str(error).split('. ')[0]}; lower --batch_size") from None


def enlarge_tree(source: Path, out: Path, enlarger: Enlarger, suffix: str) -> dict[str, int]:
    """Enlarges what OUT lacks, and counts the images: enlarged, there already, left out. Those are named on stderr."""
    found = _jobs(source, out, suffix)
    counts = {"enlarged": 0, "there already": 0, "left out": 0}
    with ThreadPoolExecutor() as pool, tqdm(unit="file", desc="enlarged", disable=None) as bar:
        while files := list(islice(found, _FILES_AT_ONCE)):
            lacking = [job for job in files if not job[1].is_file()]
            counts["there already"] += len(files) - len(lacking)
            waiting: dict[tuple[int, ...], list[tuple[Path, np.ndarray]]] = defaultdict(list)
            images = pool.map(enlarger.read, (path for path, _ in lacking))
            for (path, target), image in zip(lacking, images, strict=True):
                if isinstance(image, str):
                    counts["left out"] += 1
                    bar.write(f"{printable(str(path))}: {image}", file=sys.stderr)
                elif image is not None:
                    waiting[image.shape].append((target, image))
            for group in waiting.values():
                counts["enlarged"] += _write(out, group, enlarger)
            bar.update(len(files))
    return counts


def _jobs(source: Path, out: Path, suffix: str) -> Iterator[tuple[Path, Path]]:
    """Each file below the source, and where its enlarged image goes."""
    for folder, names in walk(source, out):
        for name, output in zip(names, outputs(names), strict=True):
            yield source / folder / name, out / folder / f"{output}.{suffix}"


def _write(out: Path, group: list[tuple[Path, np.ndarray]], enlarger: Enlarger) -> int:
    """Enlarges images of one shape and writes each to its target."""
    targets, images = zip(*group, strict=True)
    for target, large in zip(targets, enlarger(images), strict=True):
        try:
            write_image(path_inside(out, target.relative_to(out)), large)
        except OSError as error:
            raise RunError(
                f"{printable(str(target))}: cannot be written ({error.strerror}); run the same command again to go on"
            ) from None
    return len(group)
