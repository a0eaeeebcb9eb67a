"""Class centers of a new head that start as mean embeddings."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from model.head import MarginHead
from util.console import logger
from util.data.loader import TrainingImages
from util.errors import DataError
from util.evaluate import embed
from util.transform import EVAL_CROPS

IMAGES_OF_A_CENTER = 10


@torch.no_grad()
def set_centers_to_means(
    head: MarginHead,
    backbone: nn.Module,
    images: TrainingImages,
    *,
    crop: str,
    device: torch.device,
    batch_size: int,
    skip_bad: bool,
) -> None:
    """Set each class center to the direction of the mean embedding of the first images of its class.

    The lengths of the centers stay, because the head's learning rate acts on a direction by its length. A class without
    an image that can be used keeps its random center.

    Args:
        head: holds (C, D) centers, of all classes or of the classes of this rank.
        backbone: in eval mode, on the device.
        images: the training set.
        crop: what the backbone is shown of a face, one of util.face.CROPS.
        device: where the embeddings are computed.
        batch_size: images in a batch.
        skip_bad: whether an image that cannot be used is left out.

    Raises:
        DataError: an image cannot be used, and skip_bad is False.
    """
    logger.info(f"class centers: the mean of up to {IMAGES_OF_A_CENTER} images of each class")
    rows = head.rows
    by_class = np.argsort(images.labels, kind="stable")
    bounds = np.searchsorted(images.labels[by_class], range(rows.start, rows.stop + 1))
    chosen = np.concatenate([by_class[start:stop][:IMAGES_OF_A_CENTER] for start, stop in pairwise(bounds)])
    means = torch.zeros_like(head.weight)
    for start in range(0, len(chosen), batch_size):
        faces: list[Any] = []
        used: list[int] = []
        for index in chosen[start : start + batch_size].tolist():
            try:
                faces.append(EVAL_CROPS[crop](images.image(index)))
            except DataError:
                if not skip_bad:
                    raise
                continue
            used.append(index)
        if used:
            target = torch.from_numpy(images.labels[used] - rows.start).to(device)
            means.index_add_(0, target, embed(backbone, np.stack(faces), device).to(means.dtype))
    found = means.any(dim=1, keepdim=True)
    lengths = head.weight.norm(dim=1, keepdim=True)
    head.weight.copy_(torch.where(found, F.normalize(means) * lengths, head.weight))
    if missing := len(found) - int(found.sum()):
        logger.warning(f"warning: {missing} classes keep random centers: none of their first images can be used")
