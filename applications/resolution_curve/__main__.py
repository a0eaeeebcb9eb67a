"""Measure verification accuracy at several resolutions, for one or more networks. From the repository root:

python -m applications.resolution_curve --checkpoints HR=RUN_1 LR=RUN_2 --plot curve.png
python -m applications.resolution_curve --checkpoints RUN --SR_eval --sizes 112 56 28 14 --json curve.json
python -m applications.resolution_curve --checkpoints RUN --val_data qmul=/sets/pairs.txt:/sets/faces --LR_oneside
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.names import SR_SCALES
from util.cli.options import GROUPS, EvaluationSettings, ReportSettings
from util.cli.parser import PATHS, flag, option, parse
from util.cli.types import checkpoint_paths, different_integers, to_checkpoints
from util.errors import DataError, run_script
from util.face import FACE_SIZE
from util.files import check_report_paths

if TYPE_CHECKING:
    from torch import nn

    from applications.resolution_curve.measure import Curve
    from util.verification import VerificationResult


@dataclass(frozen=True, kw_only=True)
class CurveSettings(ReportSettings, EvaluationSettings):
    """The settings of applications/resolution_curve. UsageError where a value breaks its rule."""

    checkpoints: tuple[str, ...] = option(
        PATHS,
        default=(),
        type=to_checkpoints,
        metavar="NAME=PATH ...",
        help="recognition networks to compare: runs (their best or newest epoch) or Backbone files; NAME: legend",
        required=True,
        split_words=True,
    )
    sizes: tuple[int, ...] = option(
        "Resolution",
        default=(112, 56, 28, 21, 16, 14, 8),
        type=different_integers(4, FACE_SIZE, "112 56 28"),
        metavar="N ...",
        help=f"pixels a side that faces are shrunk to; {FACE_SIZE}, the full face, is always included",
    )
    SR_eval: bool = flag("Resolution", help="also enlarge by super resolution, at the scales that have a network")

    @property
    def paths(self) -> dict[str, Path]:
        """Return {name: path} of `checkpoints`."""
        return checkpoint_paths(self.checkpoints)


def main(arguments: list[str]) -> None:
    settings = parse_curve(arguments)

    # These import torch, which takes seconds. Errors on the command line are reported before.
    from applications.resolution_curve.figure import curve_figure
    from applications.resolution_curve.measure import measure
    from model.backbone.fold import fold_batch_norm
    from util.checkpoint.run_dir import find_backbone
    from util.device import prepare_module, resolve_dtype, select_devices
    from util.evaluate import average_accuracy
    from util.pairs import find_pair_sets
    from util.plot import save_figure
    from util.public_networks import read_public_network
    from util.training.report import format_table, sets_to_dict, write_json

    devices = select_devices(settings.gpu_num)
    dtype = resolve_dtype(settings.precision, devices[0])
    files = {label: find_backbone(path, flag="--checkpoints") for label, path in settings.paths.items()}
    networks = find_networks(settings, devices) if settings.SR_eval else {}
    pair_sets, missing = find_pair_sets(settings.data_dir, settings.pair_set_paths)
    if not pair_sets:
        raise DataError(f"{settings.data_dir}: no verification set in it. Put one there, or name sets with --val_data.")
    if missing:
        print(f"not in {settings.data_dir}, so left out: {', '.join(missing)}")

    # Load all backbones before the long work, so that a damaged file is reported first.
    loaded = {
        label: read_public_network(file, settings.channel_order, settings.input_scale, crop=settings.eval_crop)
        for label, file in files.items()
    }
    curves: list[Curve] = []
    for label, network in loaded.items():
        print(f"{label}: {files[label]}: {network.describe()}", flush=True)
        module = prepare_module(fold_batch_norm(network.network), devices, dtype=dtype)
        curves += measure(
            label, module, pair_sets, networks=networks, settings=settings, devices=devices, crop=network.crop
        )

    tables = {
        f"accuracy on {pairs.name} ({len(pairs)} pairs), by pixels a side": accuracy_on(pairs.name)
        for pairs in pair_sets
    }
    if len(pair_sets) > 1:
        tables[f"average accuracy over the {len(pair_sets)} sets"] = average_accuracy
    for title, value in tables.items():
        print(f"\n{title}\n{format_table(curve_table(curves, value))}")
    if settings.json:
        checkpoints = {label: str(file) for label, file in files.items()}
        points = []
        for curve in curves:
            sizes = {str(size): sets_to_dict(sets) for size, sets in curve.results.items()}
            points.append({"checkpoint": curve.label, "enlarged_by": curve.method, "sizes": sizes})
        crops = {label: network.crop for label, network in loaded.items()}
        content = {"checkpoints": checkpoints, "eval_crop": crops, "LR_oneside": settings.LR_oneside, "curves": points}
        write_json(Path(settings.json), content)
        print(f"numbers: {settings.json}")
    if settings.plot:
        save_figure(curve_figure(curves, [pairs.name for pairs in pair_sets]), Path(settings.plot))
        print(f"curve: {settings.plot}")


def parse_curve(argv: list[str]) -> CurveSettings:
    """Return the settings from the arguments. Raise as parse() does."""

    def check(settings: CurveSettings) -> None:
        check_report_paths(settings.json, settings.plot)

    return parse(CurveSettings, "-m applications.resolution_curve", argv, groups=GROUPS, check=check)


def find_networks(settings: CurveSettings, devices: list) -> dict[int, nn.Module]:
    """Load the super resolution network of each size that has one: {input size: network}. DataError if none has."""
    from util.device import prepare_module
    from util.super_resolution import find_super_resolution, load_super_resolution

    found: dict[int, nn.Module] = {}
    missing: DataError | None = None
    for scale in SR_SCALES:
        size = FACE_SIZE // scale
        if size not in settings.sizes:
            continue
        try:
            file = find_super_resolution(settings.sr_path, scale)
        except DataError as error:
            missing = error
            continue
        network = load_super_resolution(file, None)
        if network.scale == scale:  # a file or a single run has one scale and is found for every scale
            found[size] = prepare_module(network.requires_grad_(False), devices)
            print(f"super resolution from {size}x{size}: {file}")
    if not found:
        raise missing or DataError(
            f"--sr_checkpoint_dir={settings.sr_path}: no network for these --sizes. Networks enlarge from 56, 28 or 14."
        )
    bicubic = [str(size) for size in settings.sizes if size not in found and size != FACE_SIZE]
    if bicubic:
        print(f"bicubic only, because there is no network: {', '.join(bicubic)}")
    return found


def accuracy_on(name: str) -> Callable[[dict[str, VerificationResult]], float]:
    return lambda sets: sets[name].accuracy


def curve_table(curves: list[Curve], value: Callable[[dict[str, VerificationResult]], float]) -> list[list[str]]:
    """Return a row for each curve and a column for each size; value() returns a cell from {set: result}."""
    sizes = sorted({size for curve in curves for size in curve.results}, reverse=True)
    rows = [["", *map(str, sizes)]]
    for curve in curves:
        cells = [f"{value(curve.results[size]):.4f}" if size in curve.results else "" for size in sizes]
        rows.append([curve.title, *cells])
    return rows


if __name__ == "__main__":
    run_script(main)
