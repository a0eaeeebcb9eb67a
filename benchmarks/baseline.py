"""The baseline, written without this toolkit: torchvision's folder and transforms, an eager float32 step, plain numpy.

It is meant to be fair: it does no unnecessary work, and it uses the libraries as their manuals show.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler

try:
    from torchvision import transforms
except RuntimeError:  # a CUDA build with a CPU build of torch: its operators are missing, and only need a declaration
    _OPERATORS = torch.library.Library("torchvision", "DEF")  # the declarations live as long as this object
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import transforms
from torchvision.datasets import ImageFolder

from util.face import CROP_FROM, FACE_SIZE

_BICUBIC = transforms.InterpolationMode.BICUBIC
_TO_RANGE = ([0.5] * 3, [0.5] * 3)  # mean and deviation that map [0, 1] to [-1, 1]


def training_loader(root: str, batch_size: int, low_size: int | None, images: int) -> DataLoader:
    """Return a loader of (B, 3, 112, 112) float32 in [-1, 1] and (B,) labels. It works in this process.

    It samples every person of the folder ROOT/PERSON/IMAGE equally often, `images` times in total. With `low_size`,
    half of the images are shrunk to that size and enlarged again, bicubic.
    """
    steps: list[Callable[[Any], Any]] = [
        transforms.Resize([CROP_FROM, CROP_FROM]),
        transforms.RandomCrop([FACE_SIZE, FACE_SIZE]),
        transforms.RandomHorizontalFlip(),
    ]
    if low_size is not None:
        resizes = [transforms.Resize([size, size], _BICUBIC) for size in (low_size, FACE_SIZE)]
        steps.append(transforms.RandomApply(resizes, p=0.5))
    steps += [transforms.ToTensor(), transforms.Normalize(*_TO_RANGE)]
    folder = ImageFolder(root, transforms.Compose(steps))
    weights = 1 / np.bincount(folder.targets)[folder.targets]
    sampler = WeightedRandomSampler(weights.tolist(), images)
    return DataLoader(folder, batch_size, sampler=sampler, drop_last=True)


def evaluation_batch(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Turn (N, 112, 112, 3) RGB uint8 into center crops and mirror images, (N, 3, 112, 112) in [-1, 1] each."""
    crop = transforms.Compose(
        [transforms.Resize([CROP_FROM, CROP_FROM]), transforms.CenterCrop([FACE_SIZE, FACE_SIZE])]
    )
    to_network = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*_TO_RANGE)])
    crops = [crop(Image.fromarray(image)) for image in images]
    mirrored = [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
    return torch.stack([to_network(crop) for crop in crops]), torch.stack([to_network(crop) for crop in mirrored])


class OneHotArcFace(nn.Module):
    """ArcFace over the full matrix of cosines, with a one-hot matrix that selects the targets."""

    def __init__(self, in_features: int, classes: int, s: float = 64.0, m: float = 0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, in_features))
        nn.init.xavier_uniform_(self.weight)
        self.s = s
        self.m = m

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(embeddings), F.normalize(self.weight))
        sine = torch.sqrt((1.0 - cosine.pow(2)).clamp(1e-9, 1))
        shifted = cosine * math.cos(self.m) - sine * math.sin(self.m)
        beyond = cosine - math.sin(math.pi - self.m) * self.m
        shifted = torch.where(cosine > math.cos(math.pi - self.m), shifted, beyond)
        one_hot = torch.zeros_like(cosine)
        one_hot.scatter_(1, labels[:, None], 1)
        return (one_hot * shifted + (1.0 - one_hot) * cosine) * self.s


class BatchFocalLoss(nn.Module):
    """Focal loss of the mean cross entropy of the batch, as in older toolkits."""

    def forward(self, logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
        log_p = F.cross_entropy(logits, labels)
        return (1 - torch.exp(-log_p)) ** gamma * log_p


def train(
    backbone: nn.Module,
    head: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> tuple[float, float]:
    """Train in an eager float32 loop over ((B, 3, 112, 112), (B,)) batches. Return the summed losses and top-5 hits."""
    backbone.train()
    head.train()
    losses = 0.0
    correct = 0.0
    for images, labels in batches:
        images = images.to(device)
        labels = labels.to(device)
        logits = head(backbone(images), labels)
        loss = criterion(logits, labels)
        top = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        losses += loss.item()
        correct += top.sum().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, correct


@torch.no_grad()
def embed(backbone: nn.Module, batch: Tensor) -> Tensor:
    """Return L2-normalized embeddings (N, D) of images (N, 3, 112, 112) plus their mirror images."""
    return F.normalize(backbone(batch) + backbone(torch.flip(batch, [3])))


def verify(embeddings: np.ndarray, issame: np.ndarray, folds: int = 10) -> float:
    """Return the ten-fold accuracy of (2P, D) embeddings. Each fold tries all thresholds on the other folds."""
    distances = np.square(embeddings[0::2] - embeddings[1::2]).sum(1)
    thresholds = np.arange(0, 4, 0.01)
    accuracies = []
    for test in np.array_split(np.arange(len(issame)), folds):
        train = np.setdiff1d(np.arange(len(issame)), test)
        scores = [_accuracy(threshold, distances[train], issame[train])[2] for threshold in thresholds]
        rates = [_accuracy(threshold, distances[test], issame[test]) for threshold in thresholds]
        accuracies.append(rates[int(np.argmax(scores))][2])
    return float(np.mean(accuracies))


def _accuracy(threshold: float, distances: np.ndarray, issame: np.ndarray) -> tuple[float, float, float]:
    """Return the true and false accept rates and the accuracy at one threshold."""
    accepted = distances < threshold
    true_accepts = np.sum(accepted & issame)
    false_accepts = np.sum(accepted & ~issame)
    true_rejects = np.sum(~accepted & ~issame)
    false_rejects = np.sum(~accepted & issame)
    true_rate = true_accepts / max(true_accepts + false_rejects, 1)
    false_rate = false_accepts / max(false_accepts + true_rejects, 1)
    return float(true_rate), float(false_rate), float((true_accepts + true_rejects) / len(distances))
