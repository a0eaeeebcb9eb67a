"""Verification accuracy against resolution, for one or several networks. From the repository root:

python -m applications.resolution_curve --checkpoints HR=checkpoints_best/HRTRAIN_… LR=checkpoints_best/LRTRAIN_LRx4_… --plot curve.png
python -m applications.resolution_curve --checkpoints checkpoints_best/HRTRAIN_… --SR_eval --sizes 112 56 28 14 --json curve.json
python -m applications.resolution_curve --checkpoints RUN --val_data qmul=/sets/pairs.txt:/sets/faces --LR_oneside
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from applications.resolution_curve.settings import FACE, CurveSettings, parse_curve
from util.errors import DataError, run_script
from util.files import atomic_write

if TYPE_CHECKING:
    from torch import nn

    from applications.resolution_curve.measure import Curve
    from util.verification import VerificationResult


def main(arguments: list[str]) -> None:
    settings = parse_curve(arguments)

    # torch takes seconds to import, and a mistake in the command line is answered at once.
    from applications.resolution_curve.figure import curve_figure
    from applications.resolution_curve.measure import measure
    from model.backbone.fold import fold_batch_norm
    from util.checkpoint.io import load_backbone
    from util.checkpoint.run_dir import find_backbone
    from util.device import prepare_module, resolve_dtype, select_devices
    from util.evaluate import average_accuracy
    from util.pairs import find_pair_sets
    from util.plot import save_figure
    from util.training.report import format_table

    devices = select_devices(settings.gpu_num)
    dtype = resolve_dtype(settings.precision, devices[0])
    files = {label: find_backbone(path, flag="--checkpoints") for label, path in settings.paths.items()}
    networks = find_networks(settings, devices) if settings.SR_eval else {}
    pair_sets, missing = find_pair_sets(settings.data_dir, settings.named_pair_sets)
    if not pair_sets:
        raise DataError(f"{settings.data_dir}: no verification set in it; put one there, or name sets with --val_data")
    if missing:
        print(f"not in {settings.data_dir}, so left out: {', '.join(missing)}")
    curves: list[Curve] = []
    loaded = {label: load_backbone(file) for label, file in files.items()}  # all, before the work begins
    for (label, file), (name, backbone) in zip(files.items(), loaded.values(), strict=True):
        print(f"{label}: {file} ({name})", flush=True)
        judged = prepare_module(fold_batch_norm(backbone), devices, dtype=dtype)
        curves += measure(label, judged, pair_sets, networks, settings, devices)
    for pairs in pair_sets:
        print(f"\naccuracy on {pairs.name} ({len(pairs)} pairs), by pixels a side")
        print(format_table(table(curves, lambda sets, name=pairs.name: sets[name].accuracy)))
    if len(pair_sets) > 1:
        print(f"\naverage accuracy over the {len(pair_sets)} sets")
        print(format_table(table(curves, average_accuracy)))
    if settings.json:
        write_json(Path(settings.json), curves, {label: str(file) for label, file in files.items()}, settings)
    if settings.plot:
        save_figure(curve_figure(curves, [pairs.name for pairs in pair_sets]), Path(settings.plot))
        print(f"curve: {settings.plot}")


def find_networks(settings: CurveSettings, devices: list) -> dict[int, nn.Module]:
    """{size of what it enlarges: network}, for those of the sizes that there is one for, which is said."""
    from util.device import prepare_module
    from util.super_resolution import find_super_resolution, load_super_resolution

    found: dict[int, nn.Module] = {}
    missing: DataError | None = None
    for scale in (2, 4, 8):
        size = FACE // scale
        if size not in settings.sizes:
            continue
        try:
            file = find_super_resolution(settings.sr_path, scale)
        except DataError as error:
            missing = error
            continue
        network = load_super_resolution(file, None)
        if network.scale == scale:  # a file, or a single run, is for one scale only
            found[size] = prepare_module(network.requires_grad_(False), devices)
            print(f"super resolution from {size}x{size}: {file}")
    if not found:
        raise missing or DataError(
            f"--sr_checkpoint_dir={settings.sr_path}: for none of --sizes; networks enlarge from 56, 28 or 14"
        )
    bicubic = [str(size) for size in settings.sizes if size not in found and size != FACE]
    if bicubic:
        print(f"bicubic alone, for want of a network: {', '.join(bicubic)}")
    return found


def table(curves: list[Curve], value: Callable[[dict[str, VerificationResult]], float]) -> list[list[str]]:
    """A row for each curve, a column for each size; `value` makes a number of the results of all sets."""
    sizes = sorted({size for curve in curves for size in curve.results}, reverse=True)
    rows = [["", *map(str, sizes)]]
    for curve in curves:
        results = [curve.results.get(size) for size in sizes]
        rows.append([curve.title, *("" if sets is None else f"{value(sets):.4f}" for sets in results)])
    return rows


def write_json(file: Path, curves: list[Curve], checkpoints: dict[str, str], settings: CurveSettings) -> None:
    from util.evaluate import average_accuracy

    content = {"checkpoints": checkpoints, "LR_oneside": settings.LR_oneside, "curves": []}
    for curve in curves:
        sizes = {
            str(size): {
                "sets": {name: result.to_dict() for name, result in sets.items()},
                "average": average_accuracy(sets),
            }
            for size, sets in curve.results.items()
        }
        content["curves"].append({"checkpoint": curve.label, "enlarged_by": curve.method, "sizes": sizes})
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
    print(f"numbers: {file}")


if __name__ == "__main__":
    run_script(main)
