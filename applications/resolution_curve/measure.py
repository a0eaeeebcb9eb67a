"""The numbers of the curve: one evaluation of a network gives all of its sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from applications.resolution_curve.settings import CurveSettings
from util.device import default_eval_batch_size
from util.evaluate import evaluate, hr_view, low_res_view
from util.pairs import PairSet
from util.transform import SIZE
from util.verification import VerificationResult

BICUBIC, SUPER_RESOLUTION = "bicubic", "SR"
FULL = "HR"  # evaluate()'s name of the view that the other side keeps when one side is degraded


@dataclass(frozen=True)
class Curve:
    """One network, with one way of enlarging: `results` is {size: {set name: result}}, the largest size first."""

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
) -> list[Curve]:
    """The bicubic curve of a backbone, and, if there are networks ({size of what it enlarges: network}), theirs.

    112 pixels are the image as it is: a point of both curves, and evaluated once.
    """
    device = devices[0]
    low = sorted(set(settings.sizes) - {SIZE}, reverse=True)
    views = {FULL: hr_view(device)}
    views |= {f"{size} {BICUBIC}": low_res_view(size, device) for size in low}
    views |= {f"{size} {SUPER_RESOLUTION}": low_res_view(size, device, network) for size, network in networks.items()}
    batch_size = settings.batch_size or default_eval_batch_size(devices)
    results = evaluate(backbone, pair_sets, device, batch_size, views, first_image_only=settings.LR_oneside)
    curves = []
    for method in (BICUBIC, SUPER_RESOLUTION) if networks else (BICUBIC,):
        points = {SIZE: results[FULL]}
        points |= {size: results[f"{size} {method}"] for size in low if f"{size} {method}" in results}
        curves.append(Curve(label, method, points))
    return curves
