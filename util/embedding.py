"""Embed many images: a training set, or a list of files."""

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from model.backbone.fold import fold_batch_norm
from util.console import logger
from util.data.decode import MAX_IMAGE_BYTES, decode_face
from util.device import default_eval_batch_size, prepare_module
from util.errors import DataError
from util.evaluate import default_readers, with_flip
from util.face import FACE_SIZE
from util.files import format_names, read_bytes
from util.image_tree import printable
from util.parallel import read_ahead
from util.progress import progress
from util.public_networks import PublicNetwork
from util.transform import EVAL_CROPS

_FIX = "Restore it or remove it."
_SHOWN = 5  # unreadable images that are named on the console


class Images(Protocol):
    """What is needed of images to embed them. Training sets have these methods."""

    def __len__(self) -> int:
        """Return the number of images N."""

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (S, S, 3) RGB uint8. Raise DataError if it cannot be used."""


class ImageFiles:
    """Aligned faces in a list of files."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (S, S, 3) RGB uint8. Raise DataError if the file cannot be used."""
        path = self._paths[index]
        return decode_face(read_bytes(path, _FIX, MAX_IMAGE_BYTES), str(path), _FIX)


@dataclass(frozen=True, eq=False)
class EmbeddedImages:
    """The embeddings of the M images, of N, that can be read.

    `indices` (M,) are their positions among the N images, ascending. `embeddings` (M, D) float32 are L2-normalized.
    `norms` (M,) float32 are the lengths before that, of the mean of the embeddings of image and mirror image.
    `unreadable` is {position: what is wrong} of the other images.
    """

    indices: np.ndarray
    embeddings: np.ndarray
    norms: np.ndarray
    unreadable: dict[int, str]


def warn_unless_aligned(images: Images) -> None:
    """Warn if the first image, as far as it can be read, has not the size of aligned faces."""
    with suppress(DataError):
        height, width = images.image(0).shape[:2]
        if (height, width) != (FACE_SIZE, FACE_SIZE):
            logger.warning(
                f"warning: the first image has {width}x{height} pixels. Images are taken for aligned faces, and are "
                "resized: align photographs first, with applications/align/face_align.py"
            )


def embed_files(
    network: PublicNetwork, paths: Sequence[Path], devices: Sequence[torch.device], batch_size: int | None = None
) -> EmbeddedImages:
    """Embed the aligned faces in files. See embed_images() for the arguments and the result."""
    return embed_images(network, ImageFiles(paths), devices, batch_size)


@torch.inference_mode()
def embed_images(
    network: PublicNetwork,
    images: Images,
    devices: Sequence[torch.device],
    batch_size: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    strict: bool = False,
) -> EmbeddedImages:
    """Embed images and mirror images. Warn about the images that cannot be read, and leave them out.

    Args:
        network: the network with the crop that it is shown.
        images: N aligned faces.
        devices: where to run the network.
        batch_size: images in a batch; None for the default of the devices.
        dtype: what the network computes in.
        strict: raise at the first image that cannot be read, for protocols that need every image.

    Raises:
        DataError: no image can be read, or the embedding of an image is not finite or zero.
    """
    module = prepare_module(fold_batch_norm(network.network), devices, dtype=dtype)
    batch_size = batch_size or default_eval_batch_size(devices)
    crop = EVAL_CROPS[network.crop]
    unreadable: dict[int, str] = {}

    def read(start: int) -> tuple[list[int], list[np.ndarray]]:
        """Return the positions and crops of the images of a batch that can be read."""
        indices, crops = [], []
        for index in range(start, min(start + batch_size, len(images))):
            try:
                crops.append(crop(images.image(index)))
                indices.append(index)
            except DataError as error:
                if strict:
                    raise
                unreadable[index] = str(error)
        return indices, crops

    sums = np.empty((len(images), network.embedding_size), np.float32)
    kept: list[int] = []
    starts = range(0, len(images), batch_size)
    with closing(read_ahead(read, starts, default_readers(devices[0]))) as batches:
        for (indices, crops), _ in zip(batches, progress(starts, "embedding", "batches"), strict=True):
            if indices:
                straight, mirrored = with_flip(torch.from_numpy(np.stack(crops)).to(devices[0]))
                sums[len(kept) : len(kept) + len(indices)] = (module(straight) + module(mirrored)).cpu().numpy()
                kept += indices
    if unreadable:
        unreadable = dict(sorted(unreadable.items()))
        reasons = [printable(reason) for reason in unreadable.values()]
        logger.warning(
            f"warning: {len(unreadable)} of {len(images)} images cannot be used and are left out:\n  "
            + format_names(reasons, _SHOWN, separator="\n  ")
        )
    if not kept:
        raise DataError(f"none of {len(images)} images can be read, first: {next(iter(unreadable.values()), 'none')}")
    embeddings = sums[: len(kept)]
    norms = np.linalg.norm(embeddings, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        raise DataError(
            f"the network's embeddings of {len(bad)} of {len(kept)} images are zero or not finite, beginning with "
            f"image {kept[bad[0]]} (from 0). Check the network's weights and this image."
        )
    embeddings /= norms[:, None]
    return EmbeddedImages(np.array(kept, np.int64), embeddings, norms / 2, unreadable)
