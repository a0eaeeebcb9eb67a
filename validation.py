"""Evaluate a trained backbone by ten-fold verification accuracy. From the repository root:

python validation.py                                             # the newest run in checkpoints_best/
python validation.py --gpu_num=[0,1] --resume_dir=checkpoints_best/HRTRAIN_2022-07-28-19-15
python validation.py --resume_dir=checkpoints/HRTRAIN_2022-07-28-19-15      # its newest epoch
python validation.py --load_dir=Backbone_7_4200.pth --LR_eval=True --LR_scale=4
python validation.py --load_dir=w600k_r50.onnx                   # a network of InsightFace, AdaFace, MagFace, CVLface
python validation.py --load_dir=ir_se50.pth --channel_order=BGR --eval_crop=whole   # where the file does not tell
python validation.py --val_data cplfw=/sets/cplfw.bin own=/sets/pairs.txt:/sets/faces      # other sets too
python validation.py --json results.json --plot roc.png --report report.html
python validation.py --compare OLD=checkpoints_best/RUN_1 NEW=checkpoints_best/RUN_2 --report report.html
torchrun --nproc_per_node=8 validation.py                        # eight GPUs share the work
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ValidationConfig, parse_validation
from util.cli.types import checkpoint_paths
from util.console import logger
from util.distributed import DistEnv, distributed_session
from util.errors import DataError, run_script
from util.files import check_report_paths

# torch takes seconds to import: functions import it after the command line was read without an error.
if TYPE_CHECKING:
    import torch

    from util.pairs import PairSet
    from util.training.report import Groups
    from util.validation_report import Evaluated
    from util.verification import VerificationResult


def main(arguments: list[str]) -> None:
    config = parse_validation(arguments)
    check_report_paths(config.json, config.plot, config.report)

    from util.checkpoint.run_dir import find_backbone, newest_run

    env = DistEnv.from_environ()
    with distributed_session(config.gpu_num, env) as devices:
        compared = checkpoint_paths(config.compare)
        files = {name: find_backbone(path, flag="--compare") for name, path in compared.items()}
        if not files:
            files[""] = find_backbone(config.resume_dir or newest_run(config.best_checkpoint_dir))
        pair_sets, networks = evaluate_checkpoints(files, config, devices)
        if env.is_main_process:
            report(networks, pair_sets, config)


def evaluate_checkpoints(
    files: Mapping[str, Path], config: ValidationConfig, devices: list[torch.device]
) -> tuple[list[PairSet], dict[str, Evaluated]]:
    """Evaluate Backbone files on the verification sets. Under torchrun, the ranks share the work.

    Args:
        files: {name: Backbone file, or network of another project}. The name is empty if there is one file.
        config: the sets, views and batch size.
        devices: where to run the networks.

    Returns:
        The sets, and {name: network and results}.

    Raises:
        DataError: a file does not hold the backbone that was requested, or there is no verification set.
    """
    from model.backbone.fold import fold_batch_norm
    from util.device import default_eval_batch_size, prepare_module, resolve_dtype
    from util.evaluate import build_views, evaluate
    from util.face import FACE_SIZE
    from util.pairs import USUAL_SETS, VERIFICATION_SETS, find_pair_sets
    from util.public_networks import read_public_network
    from util.super_resolution import load_networks
    from util.validation_report import Evaluated

    # Backbones, all of them before the long work, so that a damaged file is reported first.
    networks = {}
    for name, file in files.items():
        network = read_public_network(file, config.channel_order, config.input_scale, crop=config.eval_crop)
        if config.backbone not in (None, network.name):
            raise DataError(
                f"{file}: holds {network.name}, not --backbone={config.backbone}. Leave --backbone out, or give "
                f"another file."
            )
        logger.info(f"validating {name and name + ': '}{file}: {network.describe()}")
        networks[name] = network
    dtype = resolve_dtype(config.precision, devices[0])

    # Verification sets.
    pair_sets, missing = find_pair_sets(config.data_dir, config.pair_set_paths)
    if not pair_sets:
        places = ", ".join(VERIFICATION_SETS[name][0] for name in USUAL_SETS)
        raise DataError(
            f"{config.data_dir}: no verification set in it ({places}). Put one there, give --data_dir, or give sets "
            f"with --val_data."
        )
    if missing:
        logger.info(f"not in {config.data_dir}, so left out: {', '.join(missing)}")

    # Views.
    for scale in config.LR_scale if len(config.views) > 1 else ():
        logger.info(f"low resolution x{scale}: down to {FACE_SIZE // scale}x{FACE_SIZE // scale} pixels and up again")
    super_resolution = load_networks(config.sr_path, config.sr_scales, devices)
    views = build_views(config.views, config.LR_scale, super_resolution, devices[0])

    evaluated = {}
    for name, network in networks.items():
        results = evaluate(
            prepare_module(fold_batch_norm(network.network), devices, dtype=dtype),
            pair_sets,
            device=devices[0],
            batch_size=config.batch_size or default_eval_batch_size(devices),
            views=views,
            first_image_only=config.LR_oneside,
            crop=network.crop,
        )
        evaluated[name] = Evaluated(file=files[name], network=network, results=results, views=views)
    return pair_sets, evaluated


def report(networks: Mapping[str, Evaluated], pair_sets: Sequence[PairSet], config: ValidationConfig) -> None:
    """Print the tables. Write --json, --plot and --report if given."""
    from util.html_page import write_page
    from util.plot import roc_figure, save_figure
    from util.training.report import (
        compare_networks,
        comparison_rows,
        evaluation_lines,
        find_groups,
        flatten_results,
        format_table,
        group_rows,
        lowest_rates,
        results_table,
        sr_recovery_table,
        threshold_rows,
        write_json,
    )
    from util.validation_report import report_page

    groups = find_groups(pair_sets)
    for name, network in networks.items():
        results = network.results
        if name:
            logger.info(f"\n{name}")
        logger.info("\n".join(evaluation_lines(results, " Acc: ")))
        logger.info(f"\n{format_table(threshold_rows(results))}\n{lowest_rates(results)}")
        if groups:
            logger.info(f"\n{format_table(group_rows(results, groups))}")
        logger.info(f"\n{results_table(results)}")
        if config.SR_eval:
            logger.info(f"\n{sr_recovery_table(results, config.LR_scale)}")
    results_of = {name: network.results for name, network in networks.items()}
    comparisons = compare_networks(results_of)
    if comparisons:
        logger.info(f"\n{format_table(comparison_rows(comparisons))}")
    if config.json:
        contents = {name: to_dict(network, config, groups) for name, network in networks.items()}
        compared = {"networks": contents, "comparisons": [asdict(comparison) for comparison in comparisons]}
        content = compared if comparisons else contents[""]
        write_json(Path(config.json), content)
        logger.info(f"results: {config.json}")
    if config.plot:
        curves: dict[str, VerificationResult] = {}
        for name, results in results_of.items():
            curves |= {f"{name} {row}".strip(): result for row, result in flatten_results(results).items()}
        save_figure(roc_figure(curves), Path(config.plot))
        logger.info(f"ROC curves: {config.plot}")
    if config.report:
        page = report_page(
            networks,
            pair_sets,
            scales=config.LR_scale,
            first_image_only=config.LR_oneside,
            now=datetime.now(),
        )
        write_page(Path(config.report), page)
        logger.info(f"report: {config.report}")


def to_dict(evaluated: Evaluated, config: ValidationConfig, groups: Groups) -> dict[str, Any]:
    """Return what --json holds about a network."""
    from util.training.report import sets_to_dict

    network = evaluated.network
    return {
        "checkpoint": str(evaluated.file),
        "backbone": network.name,
        "family": network.family,
        "channel_order": network.channel_order,
        "input_scale": network.input_scale,
        "eval_crop": network.crop,
        "LR_scale": list(config.LR_scale),
        "LR_oneside": config.LR_oneside,
        "views": {view: sets_to_dict(sets, groups) for view, sets in evaluated.results.items()},
    }


if __name__ == "__main__":
    run_script(main)
