"""Evaluate a trained backbone by ten-fold verification accuracy. From the repository root:

python validation.py                                             # the newest run in checkpoints_best/
python validation.py --gpu_num=[0,1] --resume_dir=checkpoints_best/HRTRAIN_2022-07-28-19-15
python validation.py --resume_dir=checkpoints/HRTRAIN_2022-07-28-19-15      # its newest epoch
python validation.py --load_dir=Backbone_7_4200.pth --LR_eval=True --LR_scale=4
python validation.py --load_dir=w600k_r50.onnx                   # a network of InsightFace, AdaFace, MagFace, CVLface
python validation.py --load_dir=ir_se50.pth --channel_order=BGR --eval_crop=whole   # where the file does not tell
python validation.py --val_data cplfw=/sets/cplfw.bin own=/sets/pairs.txt:/sets/faces      # other sets too
python validation.py --json results.json --plot roc.png
torchrun --nproc_per_node=8 validation.py                        # eight GPUs share the work
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from config import ValidationConfig, parse_validation
from util.console import logger
from util.distributed import DistEnv, distributed_session
from util.errors import DataError, run_script
from util.files import check_report_paths

# torch takes seconds to import: functions import it after the command line was read without an error.
if TYPE_CHECKING:
    import torch

    from util.public_networks import PublicNetwork
    from util.training.report import Results


def main(arguments: list[str]) -> None:
    config = parse_validation(arguments)
    check_report_paths(config.json, config.plot)

    from util.checkpoint.run_dir import find_backbone, newest_run

    env = DistEnv.from_environ()
    with distributed_session(config.gpu_num, env) as devices:
        file = find_backbone(config.resume_dir or newest_run(config.best_checkpoint_dir))
        network, results = evaluate_checkpoint(file, config, devices)
        if env.is_main_process:
            report(results, file, network, config)


def evaluate_checkpoint(
    file: Path, config: ValidationConfig, devices: list[torch.device]
) -> tuple[PublicNetwork, Results]:
    """Evaluate a Backbone file on the verification sets. Under torchrun, the ranks share the work.

    Args:
        file: a Backbone file, or a network of another project.
        config: the sets, views and batch size.
        devices: where to run the network.

    Returns:
        The network and {view: {set: result}}.

    Raises:
        DataError: the file does not hold the backbone that was requested, or there is no verification set.
    """
    from model.backbone.fold import fold_batch_norm
    from util.device import default_eval_batch_size, prepare_module, resolve_dtype
    from util.evaluate import evaluate
    from util.face import FACE_SIZE
    from util.pairs import VERIFICATION_SETS, find_pair_sets
    from util.public_networks import read_public_network
    from util.super_resolution import load_networks

    # Backbone.
    network = read_public_network(file, config.channel_order, config.input_scale, crop=config.eval_crop)
    if config.backbone not in (None, network.name):
        raise DataError(
            f"{file}: holds {network.name}, not --backbone={config.backbone}. Leave --backbone out, or give another "
            f"file."
        )
    dtype = resolve_dtype(config.precision, devices[0])
    logger.info(f"validating {file}: {network.describe()}")

    # Verification sets.
    pair_sets, missing = find_pair_sets(config.data_dir, config.pair_set_paths)
    if not pair_sets:
        places = ", ".join(places[0] for places in VERIFICATION_SETS.values())
        raise DataError(
            f"{config.data_dir}: no verification set in it ({places}). Put one there, give --data_dir, or give sets "
            f"with --val_data."
        )
    if missing:
        logger.info(f"not in {config.data_dir}, so left out: {', '.join(missing)}")

    # Views.
    for scale in config.LR_scale if len(config.views) > 1 else ():
        logger.info(f"low resolution x{scale}: down to {FACE_SIZE // scale}x{FACE_SIZE // scale} pixels and up again")
    results = evaluate(
        prepare_module(fold_batch_norm(network.network), devices, dtype=dtype),
        pair_sets,
        device=devices[0],
        batch_size=config.batch_size or default_eval_batch_size(devices),
        views=config.views,
        lr_scale=config.LR_scale,
        super_resolution=load_networks(config.sr_path, config.sr_scales, devices),
        first_image_only=config.LR_oneside,
        crop=network.crop,
    )
    return network, results


def report(results: Results, file: Path, network: PublicNetwork, config: ValidationConfig) -> None:
    """Print the result tables. Write --json and --plot if given."""
    from util.plot import roc_figure, save_figure
    from util.training.report import (
        evaluation_lines,
        flatten_results,
        results_table,
        sets_to_dict,
        sr_recovery_table,
        write_json,
    )

    logger.info("\n".join(evaluation_lines(results, " Acc: ")))
    logger.info(f"\n{results_table(results)}")
    if config.SR_eval:
        logger.info(f"\n{sr_recovery_table(results, config.LR_scale)}")
    if config.json:
        content = {
            "checkpoint": str(file),
            "backbone": network.name,
            "family": network.family,
            "channel_order": network.channel_order,
            "input_scale": network.input_scale,
            "eval_crop": network.crop,
            "LR_scale": list(config.LR_scale),
            "LR_oneside": config.LR_oneside,
            "views": {view: sets_to_dict(sets) for view, sets in results.items()},
        }
        write_json(Path(config.json), content)
        logger.info(f"results: {config.json}")
    if config.plot:
        save_figure(roc_figure(flatten_results(results)), Path(config.plot))
        logger.info(f"ROC curves: {config.plot}")


if __name__ == "__main__":
    run_script(main)
