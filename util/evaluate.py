"""Verification accuracy of a backbone: embed every image of the sets, in one or more views, and verify the pairs."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from util.errors import DataError, UsageError
from util.face import FACE_SIZE
from util.pairs import PairSet, PairSubset
from util.parallel import read_ahead
from util.super_resolution import enlarge
from util.transform import EVAL_CROPS, degrade, normalize, shrink
from util.verification import VerificationResult, verify

# Turns evaluation crops, (n, 112, 112, 3) RGB uint8 on the CPU, into what the network is shown, the same on the device.
View = Callable[[np.ndarray], torch.Tensor]
# The embeddings of a set, (2P, D) float32, and their norms before they were normalized, (2P,) float32.
Embeddings = tuple[np.ndarray, np.ndarray]
LOW_RES_VIEWS = ("LR", "SR")


def build_views(
    names: Iterable[str],
    scales: Sequence[int],
    networks: Mapping[int, nn.Module] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, View]:
    """Build the views of these names: {label: view}.

    Args:
        names: "HR" is the evaluation crop itself. "LR" shrinks it by a scale and enlarges it again, bicubic. "SR"
            shrinks it too, and enlarges it with the super resolution network for the scale.
        scales: for "LR" and "SR". With several scales their labels are "LRx2", "SRx2" and so on.
        networks: the network for each scale, on the device, for "SR".
        device: where the views' images go.

    Raises:
        UsageError: a name is unknown.
    """
    networks = networks or {}
    views: dict[str, View] = {}
    for name in names:
        if name == "HR":
            views[name] = hr_view(device)
        elif name in LOW_RES_VIEWS:
            for scale in scales:
                network = networks[scale] if name == "SR" else None
                views[view_label(name, scale, scales)] = low_res_view(FACE_SIZE // scale, device, network)
        else:
            raise UsageError(f"view {name!r}: unknown. Known are HR, {', '.join(LOW_RES_VIEWS)}.")
    return views


def hr_view(device: torch.device | str) -> View:
    """Build the view that shows the evaluation crop itself."""
    return lambda crops: torch.from_numpy(crops).to(device, non_blocking=True)


def low_res_view(size: int, device: torch.device | str, network: nn.Module | None = None) -> View:
    """Build the view of the crop shrunk to size x size and enlarged again: bicubic, or by a network."""
    if network is None:
        return lambda crops: torch.from_numpy(degrade(crops, size)).to(device, non_blocking=True)
    return sr_view(size, device, network)


def sr_view(size: int, device: torch.device | str, network: nn.Module) -> View:
    """Build the view of the crop shrunk to size x size and enlarged by a network on the device."""
    return lambda crops: enlarge(network, torch.from_numpy(shrink(crops, size)).to(device))


def view_label(name: str, scale: int, scales: Sequence[int]) -> str:
    """Return the label of the view "LR" or "SR" at one of the scales."""
    return name if len(scales) == 1 else f"{name}x{scale}"


@torch.inference_mode()
def embed(backbone: nn.Module, images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Embed images and mirror images, sum both, L2-normalize: (n, 112, 112, 3) RGB uint8 -> (n, D)."""
    return _embed(backbone, hr_view(device)(images))[0]


def _embed(backbone: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalized embeddings (n, D), and the norms (n,) of the means over image and mirror image."""
    straight, mirrored = with_flip(images)
    summed = backbone(straight) + backbone(mirrored)
    return F.normalize(summed), summed.norm(dim=1) / 2


def default_readers(device: torch.device | str) -> int:
    """Return the number of threads that read images ahead. On a CPU the network needs the cores itself."""
    return 1 if torch.device(device).type == "cpu" else 4


def with_flip(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize images and mirror images: (n, H, W, 3) uint8 -> twice (n, 3, H, W) in [-1, 1].

    Bytes are mirrored, which takes a tenth of the time of mirroring floats.
    """
    return normalize(images), normalize(images.flip(2))


def evaluate(
    backbone: nn.Module,
    pair_sets: Iterable[PairSet],
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    views: Iterable[str] | Mapping[str, View] = ("HR",),
    lr_scale: int | Sequence[int] = 4,
    super_resolution: Mapping[int, nn.Module] | None = None,
    first_image_only: bool = False,
    crop: str = "128",
) -> dict[str, dict[str, VerificationResult]]:
    """Verify every set in every view, with ten folds. Each image is read and cropped once for all views.

    Args:
        backbone: the network, on the device. It is put into eval mode and back.
        pair_sets: the verification sets.
        device: where the embeddings are computed.
        batch_size: images in a batch.
        views: names that build_views() knows, or a mapping of your own labels to views.
        lr_scale: scale, or scales, of the views "LR" and "SR".
        super_resolution: the network for each scale, on the device, for the view "SR".
        first_image_only: degrade only the first image of each pair. The second image is shown as in the view "HR",
            which must be among the views.
        crop: what the views show: "128" (resized to 128, the center 112) or "whole".

    Returns:
        {view: {set name: result}}.

    Raises:
        DataError: a set cannot be read, or its embeddings cannot be verified.
        UsageError: a view is unknown, or "HR" is missing with first_image_only.
    """
    if not isinstance(views, Mapping):
        scales = (lr_scale,) if isinstance(lr_scale, int) else tuple(lr_scale)
        views = build_views(views, scales, super_resolution, device)
    if first_image_only and "HR" not in views:
        raise UsageError("one side in low resolution: the other side is shown in the view HR. Add this view.")
    readers = default_readers(device)
    embed_set = partial(
        _embed_set, backbone, views=views, first_image_only=first_image_only, readers=readers, crop=crop
    )
    results: dict[str, dict[str, VerificationResult]] = {view: {} for view in views}
    was_training = backbone.training
    backbone.eval()
    try:
        for pairs in pair_sets:
            start_time = time.perf_counter()
            embeddings = _split_over_ranks(embed_set, pairs, batch_size)
            rate = 2 * len(pairs) * len(views) / (time.perf_counter() - start_time)
            for view, (vectors, norms) in embeddings.items():
                try:
                    result = verify(vectors, pairs.issame)
                except DataError as error:
                    raise DataError(f"{pairs.name}: {error}") from None
                results[view][pairs.name] = replace(result, images_per_second=rate, norms=norms)
    finally:
        backbone.train(was_training)
    return results


def recovered_fraction(
    high_res: VerificationResult, low_res: VerificationResult, enlarged: VerificationResult
) -> float | None:
    """Return the fraction of the accuracy lost at low resolution that super resolution recovers.

    Return None if the loss is below one standard error of the accuracy at low resolution, a proportion of the P pairs:
    the quotient would be noise.
    """
    loss = high_res.accuracy - low_res.accuracy
    if loss <= math.sqrt(low_res.accuracy * (1 - low_res.accuracy) / low_res.pairs):
        return None
    return (enlarged.accuracy - low_res.accuracy) / loss


def average_accuracy(results: Mapping[str, VerificationResult]) -> float:
    """Return the mean accuracy of the sets."""
    return sum(result.accuracy for result in results.values()) / len(results)


def _split_over_ranks(
    embed_set: Callable[[PairSet, int], dict[str, Embeddings]], pairs: PairSet, batch_size: int
) -> dict[str, Embeddings]:
    """Embed a set like _embed_set, with the batches split over the ranks of torch.distributed.

    Every rank gets all embeddings. If batch_size is even, the batches, and with them the embeddings, are the same as in
    a single process.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return embed_set(pairs, batch_size)
    # Each rank takes a contiguous range of the batches, which may be empty.
    batch_pairs = max(1, batch_size // 2)
    num_batches = -(-len(pairs) // batch_pairs)
    rank = dist.get_rank()
    first = min(batch_pairs * (num_batches * rank // world_size), len(pairs))
    last = min(batch_pairs * (num_batches * (rank + 1) // world_size), len(pairs))
    local: dict[str, Embeddings] = {}
    if first < last:
        local = embed_set(PairSubset(pairs, np.arange(first, last)), 2 * batch_pairs)
    gathered: list[dict[str, Embeddings]] = [{}] * world_size
    dist.all_gather_object(gathered, local)
    non_empty = [embeddings for embeddings in gathered if embeddings]
    joined = {}
    for view in non_empty[0]:
        vectors, norms = zip(*(embeddings[view] for embeddings in non_empty), strict=True)
        joined[view] = np.concatenate(vectors), np.concatenate(norms)
    return joined


@torch.inference_mode()
def _embed_set(
    backbone: nn.Module,
    pairs: PairSet,
    batch_size: int,
    *,
    views: Mapping[str, View],
    first_image_only: bool,
    readers: int,
    crop: str,
) -> dict[str, Embeddings]:
    """Embed a set: {view: (embeddings, norms)}. The embeddings stay on the device until the last batch."""
    batches: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {view: [] for view in views}
    done = 0
    for crops in _read_ahead(pairs, batch_size, readers, crop=crop):
        first_of_pairs = crops[done % 2 :: 2]
        done += len(crops)
        for name, view in views.items():
            shown = first_of_pairs if first_image_only and name != "HR" else crops
            if len(shown):
                batches[name].append(_embed(backbone, view(shown)))
    embeddings = {}
    for name, embedded in batches.items():
        vectors, norms = map(torch.cat, zip(*embedded, strict=True))
        embeddings[name] = vectors, norms
    if first_image_only:
        # Interleave the degraded first images with the second images of the view HR: (P, …) twice -> (2P, …).
        for name in embeddings.keys() - {"HR"}:
            vectors, norms = (
                torch.stack([degraded, full[1::2]], dim=1).flatten(0, 1)
                for degraded, full in zip(embeddings[name], embeddings["HR"], strict=True)
            )
            embeddings[name] = vectors, norms
    return {name: (vectors.cpu().numpy(), norms.cpu().numpy()) for name, (vectors, norms) in embeddings.items()}


def _read_ahead(pairs: PairSet, batch_size: int, readers: int, crop: str = "128") -> Iterator[np.ndarray]:
    """Return an iterator over evaluation crops, batch by batch; `readers` threads read the next batches meanwhile."""

    def read(start: int) -> np.ndarray:
        return EVAL_CROPS[crop](pairs.images(start, min(start + batch_size, total)))

    total = 2 * len(pairs)
    return read_ahead(read, range(0, total, batch_size), readers)
