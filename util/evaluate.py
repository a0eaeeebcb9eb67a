"""Verification accuracy of a backbone: embeddings of every image of a set, in one or more views, and their numbers."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from util.errors import DataError, UsageError
from util.pairs import PairSet, PairSubset
from util.super_resolution import enlarge
from util.transform import SIZE, degrade, eval_crop, normalize, shrink
from util.verification import VerificationResult, verify

# From evaluation crops to what is seen of them, (n, 112, 112, 3) RGB uint8 both, the latter on the device.
View = Callable[[np.ndarray], torch.Tensor]
LOW_VIEWS = ("LR", "SR")
_READERS = 4  # threads that read for a GPU; the network needs the cores of a CPU itself


def build_views(
    names: Iterable[str],
    scales: Sequence[int],
    networks: Mapping[int, nn.Module] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, View]:
    """What is done to the evaluation crop: nothing ("HR"); down by a scale and up again, bicubic ("LR"), or up by the
    network for that scale ("SR"). With several scales the last two become "LRx2", "SRx2" and so on."""
    views: dict[str, View] = {}
    for name in names:
        if name not in ("HR", *LOW_VIEWS):
            raise UsageError(f"view {name!r}: unknown; known are HR, {', '.join(LOW_VIEWS)}")
        if name == "HR":
            views[name] = hr_view(device)
        for scale in scales if name in LOW_VIEWS else ():
            network = networks[scale] if name == "SR" else None
            views[view_label(name, scale, scales)] = low_res_view(SIZE // scale, device, network)
    return views


def hr_view(device: torch.device | str) -> View:
    """The evaluation crop as it is."""
    return lambda crops: torch.from_numpy(crops).to(device, non_blocking=True)


def low_res_view(size: int, device: torch.device | str, network: nn.Module | None = None) -> View:
    """The crop shrunk to size x size pixels and enlarged again: bicubic, or by a network on the device."""
    if network is None:
        full = hr_view(device)
        return lambda crops: full(degrade(crops, size))
    return lambda crops: enlarge(network, torch.from_numpy(shrink(crops, size)).to(device))


def view_label(name: str, scale: int, scales: Sequence[int]) -> str:
    """The name of the view "LR" or "SR" at one of the scales."""
    return name if len(scales) == 1 else f"{name}x{scale}"


@torch.inference_mode()
def embed(backbone: nn.Module, images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(n, 112, 112, 3) RGB uint8 -> (n, D) on the device: image and mirror image embedded, summed, L2-normalised."""
    return _embed(backbone, hr_view(device)(images))


def _embed(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return F.normalize(sum(map(backbone, with_flip(images))))


def with_flip(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, H, W, 3) uint8 -> what the network gets of the images and of their mirror images, (n, 3, H, W) in [-1, 1].

    They are mirrored as bytes, which takes a tenth of the time that it takes with floats.
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
) -> dict[str, dict[str, VerificationResult]]:
    """Ten-fold verification of every set in every view: {view: {set name: result}}.

    Views are names, of which views_named knows the meaning, or what is wanted itself, under any names.
    `super_resolution` has a network for each scale, on the device, for the view "SR". With `oneside` the first image of
    a pair alone is degraded, and the second stays as in the view "HR", which then has to be there.
    Each image is read and cropped once for all views. The backbone is put into eval mode and back.
    """
    scales = (lr_scale,) if isinstance(lr_scale, int) else tuple(lr_scale)
    chosen = views if isinstance(views, Mapping) else build_views(views, scales, super_resolution, device)
    if first_image_only and "HR" not in chosen:
        raise UsageError("one side in low resolution: the other one is that of the view HR; add it")
    readers = 1 if torch.device(device).type == "cpu" else _READERS
    results: dict[str, dict[str, VerificationResult]] = {view: {} for view in chosen}
    was_training = backbone.training
    backbone.eval()
    try:
        for pairs in pair_sets:
            started = time.perf_counter()
            embeddings = _embed_shared(backbone, pairs, batch_size, chosen, first_image_only, readers)
            rate = 2 * len(pairs) * len(chosen) / (time.perf_counter() - started)
            for view, vectors in embeddings.items():
                results[view][pairs.name] = replace(_verify(pairs, vectors), images_per_second=rate)
    finally:
        backbone.train(was_training)
    return results


def recovered_fraction(high: VerificationResult, low: VerificationResult, enlarged: VerificationResult) -> float | None:
    """The share of the accuracy lost at low resolution that super resolution wins back.

    None where that loss is below one standard error of the accuracy at low resolution, a proportion of the P pairs:
    a quotient of noise says nothing.
    """
    loss = high.accuracy - low.accuracy
    if loss <= math.sqrt(low.accuracy * (1 - low.accuracy) / low.pairs):
        return None
    return (enlarged.accuracy - low.accuracy) / loss


def average_accuracy(results: dict[str, VerificationResult]) -> float:
    return sum(result.accuracy for result in results.values()) / len(results)


def _verify(pairs: PairSet, vectors: np.ndarray) -> VerificationResult:
    try:
        return verify(vectors, pairs.issame)
    except DataError as error:
        raise DataError(f"{pairs.name}: {error}") from None


def _embed_shared(
    backbone: nn.Module,
    pairs: PairSet,
    batch_size: int,
    views: Mapping[str, View],
    first_image_only: bool,
    readers: int,
) -> dict[str, np.ndarray]:
    """As _embed_set. Processes of torch.distributed embed a contiguous share of the batches each, and all get all.

    The batches are those of a single process, if batch_size is even: so are the embeddings, then.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return _embed_set(backbone, pairs, batch_size, views, first_image_only, readers)
    size = max(1, batch_size // 2)  # pairs in a batch
    batches = -(-len(pairs) // size)
    bounds = [min(size * (batches * rank // ranks), len(pairs)) for rank in range(ranks + 1)]
    first, last = bounds[dist.get_rank() :][:2]
    share = PairSubset(pairs, np.arange(first, last))
    own = _embed_set(backbone, share, 2 * size, views, first_image_only, readers) if first < last else {}
    shares: list[dict[str, np.ndarray]] = [{}] * ranks
    dist.all_gather_object(shares, own)
    return {view: np.concatenate([share[view] for share in shares if share]) for view in views}


@torch.inference_mode()
def _embed_set(
    backbone: nn.Module,
    pairs: PairSet,
    batch_size: int,
    views: Mapping[str, View],
    first_image_only: bool,
    readers: int,
) -> dict[str, np.ndarray]:
    """{view: (2P, D) float32}. The embeddings stay on the device until the last batch."""
    parts: dict[str, list[torch.Tensor]] = {view: [] for view in views}
    done = 0
    for crops in _read_ahead(pairs, batch_size, readers):
        firsts = crops[done % 2 :: 2]  # of their pairs
        done += len(crops)
        for name, view in views.items():
            seen = firsts if first_image_only and name != "HR" else crops
            if len(seen):
                parts[name].append(_embed(backbone, view(seen)))
    vectors = {name: torch.cat(batches) for name, batches in parts.items()}
    if first_image_only:
        for name in vectors.keys() - {"HR"}:
            vectors[name] = torch.stack([vectors[name], vectors["HR"][1::2]], dim=1).flatten(0, 1)
    return {name: values.cpu().numpy() for name, values in vectors.items()}


def _read_ahead(pairs: PairSet, batch_size: int, readers: int) -> Iterator[np.ndarray]:
    """Evaluation crops batch by batch; so many threads read the next ones while the network has this one."""

    def read(start: int) -> np.ndarray:
        return eval_crop(pairs.images(start, min(start + batch_size, total)))

    total = 2 * len(pairs)
    ahead: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(readers) as pool:
        for start in range(0, total, batch_size):
            ahead.append(pool.submit(read, start))
            if len(ahead) > readers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
