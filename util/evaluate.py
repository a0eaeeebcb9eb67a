"""Verification accuracy of a backbone: embeddings of every image of a set, in one or more views, and their numbers."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from util.errors import DataError, UsageError
from util.pairs import PairSet
from util.transform import SIZE, degrade, eval_crop, normalise
from util.verification import Verification, verify

View = Callable[[np.ndarray], np.ndarray]


def views_named(names: Iterable[str], lr_scale: int) -> dict[str, View]:
    """What is done to the evaluation crop: nothing ("HR"), or down by lr_scale and up again ("LR")."""
    known: dict[str, View] = {"HR": lambda crops: crops, "LR": lambda crops: degrade(crops, SIZE // lr_scale)}
    names = list(names)
    for name in names:
        if name not in known:
            raise UsageError(f"view {name!r}: unknown; known are {', '.join(known)}")
    return {name: known[name] for name in names}


@torch.inference_mode()
def embed(backbone: nn.Module, images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(n, 112, 112, 3) RGB uint8 -> (n, D) on the device: image and mirror image embedded, summed, L2-normalised."""
    batch = normalise(torch.from_numpy(images).to(device, non_blocking=True))
    return F.normalize(backbone(batch) + backbone(batch.flip(3)))


def evaluate(
    backbone: nn.Module,
    pair_sets: Iterable[PairSet],
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    views: Iterable[str] = ("HR",),
    lr_scale: int = 4,
) -> dict[str, dict[str, Verification]]:
    """Ten-fold verification of every set in every view: {view: {set name: result}}.

    Each image is read and cropped once for all views. The backbone is put into eval mode and back.
    """
    chosen = views_named(views, lr_scale)
    results: dict[str, dict[str, Verification]] = {view: {} for view in chosen}
    was_training = backbone.training
    backbone.eval()
    try:
        for pairs in pair_sets:
            started = time.perf_counter()
            embeddings = _embed_set(backbone, pairs, device, batch_size, chosen)
            rate = 2 * len(pairs) * len(chosen) / (time.perf_counter() - started)
            for view, vectors in embeddings.items():
                results[view][pairs.name] = replace(_verify(pairs, vectors), images_per_second=rate)
    finally:
        backbone.train(was_training)
    return results


def average_accuracy(results: dict[str, Verification]) -> float:
    return sum(result.accuracy for result in results.values()) / len(results)


def _verify(pairs: PairSet, vectors: np.ndarray) -> Verification:
    try:
        return verify(vectors, pairs.issame)
    except DataError as error:
        raise DataError(f"{pairs.name}: {error}") from None


def _embed_set(
    backbone: nn.Module, pairs: PairSet, device: torch.device | str, batch_size: int, views: dict[str, View]
) -> dict[str, np.ndarray]:
    """{view: (2P, D) float32}. The embeddings stay on the device until the last batch."""
    parts: dict[str, list[torch.Tensor]] = {view: [] for view in views}
    for crops in _read_ahead(pairs, batch_size):
        for name, view in views.items():
            parts[name].append(embed(backbone, view(crops), device))
    return {name: torch.cat(vectors).cpu().numpy() for name, vectors in parts.items()}


def _read_ahead(pairs: PairSet, batch_size: int) -> Iterator[np.ndarray]:
    """Evaluation crops batch by batch; a thread reads the next one while the network has this one."""

    def read(start: int) -> np.ndarray:
        return eval_crop(pairs.images(start, min(start + batch_size, total)))

    total = 2 * len(pairs)
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(read, 0)
        for start in range(batch_size, total, batch_size):
            crops, ahead = ahead.result(), reader.submit(read, start)
            yield crops
        yield ahead.result()
