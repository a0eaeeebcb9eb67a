"""Measure the points of a curve: one evaluation of a backbone covers all sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from util.device import default_eval_batch_size
from util.evaluate import evaluate, hr_view, low_res_view
from util.face import FACE_SIZE
from util.pairs import PairSet
from util.verification import VerificationResult

if TYPE_CHECKING:
    from applications.resolution_curve.__main__ import CurveSettings

BICUBIC, SUPER_RESOLUTION = "bicubic", "SR"
FULL = "HR"  # evaluate() keeps this view for the second image if only the first is degraded


@dataclass(frozen=True)
class Curve:
    """The results of one backbone with one way of enlarging: {size: {set name: result}}, the largest size first."""

    label: str
    method: str
    results: dict[int, dict[str, VerificationResult]]

    @property
    def title(self) -> str:
        return f"{self.label}, {self.method}"


def measure(
    label: str,
    backbone: nn.Module,
    pair_sets: Sequence[PairSet],
    networks: Mapping[int, nn.Module],
    settings: CurveSettings,
    devices: Sequence[torch.device],
    crop: str = "128",
) -> list[Curve]:
    """Return the bicubic curve of a backbone, and a super resolution curve if there are networks.

    Args:
        label: name of the backbone in legends.
        backbone: returns (N, D) embeddings.
        pair_sets: the verification sets.
        networks: {input size: super resolution network}.
        settings: sizes, batch size and LR_oneside.
        devices: evaluation runs on the first one; the default batch size depends on all.
        crop: what the backbone is shown of a face, one of util.face.CROPS.

    Returns:
        The curves. The point at 112 pixels, the full image, is evaluated once and belongs to both.
    """
    device = devices[0]
    low = sorted(set(settings.sizes) - {FACE_SIZE}, reverse=True)
    views = {FULL: hr_view(device)}
    views |= {f"{size} {BICUBIC}": low_res_view(size, device) for size in low}
    views |= {f"{size} {SUPER_RESOLUTION}": low_res_view(size, device, network) for size, network in networks.items()}
    batch_size = settings.batch_size or default_eval_batch_size(devices)
    results = evaluate(
        backbone,
        pair_sets,
        device=device,
        batch_size=batch_size,
        views=views,
        first_image_only=settings.LR_oneside,
        crop=crop,
    )
    curves = []
    for method in (BICUBIC, SUPER_RESOLUTION) if networks else (BICUBIC,):
        points = {FACE_SIZE: results[FULL]}
        points |= {size: results[f"{size} {method}"] for size in low if f"{size} {method}" in results}
        curves.append(Curve(label, method, points))
    return curves
