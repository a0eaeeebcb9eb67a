"""Judges a trained backbone by ten-fold verification accuracy. From the repository root:

python validation.py                                             # the newest run in checkpoints_best/
python validation.py --gpu_num=[0,1] --resume_dir=checkpoints_best/HRTRAIN_2022-07-28-19-15
python validation.py --resume_dir=checkpoints/HRTRAIN_2022-07-28-19-15      # its newest epoch
python validation.py --load_dir=Backbone_7_4200.pth --LR_eval=True --LR_scale=4
python validation.py --val_data cplfw=/sets/cplfw.bin own=/sets/pairs.txt:/sets/faces      # other sets too
python validation.py --json results.json --plot roc.png
torchrun --nproc_per_node=8 validation.py                        # eight GPUs share the work
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import ValidationConfig, parse_validation
from util.distributed import DistEnv, distributed_session, run_rank_script
from util.errors import DataError
from util.files import atomic_write, check_report_paths

# torch takes seconds to import: what needs it is imported in functions, once the command line is known to be right.
if TYPE_CHECKING:
    import torch

    from util.pairs import PairSet
    from util.verification import VerificationResult

Results = Mapping[str, Mapping[str, "VerificationResult"]]  # {view: {set: result}}


def main(arguments: list[str]) -> None:
    config = parse_validation(arguments)
    check_report_paths(config.json, config.plot)

    from util.checkpoint.run_dir import find_backbone, newest_run

    env = DistEnv.from_environ()
    with distributed_session(config.gpu_num, env) as devices:
        file = find_backbone(config.resume_dir or newest_run(config.best_checkpoint_dir))
        name, results = judge(file, config, devices)
        if env.is_main_process:
            report(results, file, name, config)


def judge(file: Path, config: ValidationConfig, devices: list[torch.device]) -> tuple[str, Results]:
    """The name of the network in a Backbone file, and what it is worth; processes of torchrun share the work."""
    from model.backbone.fold import fold_batch_norm
    from util.checkpoint.io import load_backbone
    from util.device import default_eval_batch_size, prepare_module, resolve_dtype
    from util.evaluate import evaluate
    from util.super_resolution import load_networks
    from util.transform import SIZE

    name, backbone = load_backbone(file)
    if config.backbone not in (None, name):
        raise DataError(
            f"{file}: holds {name}, not --backbone={config.backbone}; leave --backbone out, or name another file"
        )
    dtype = resolve_dtype(config.precision, devices[0])
    print(f"validating {file} ({name})")
    pair_sets = open_pair_sets(config)
    for scale in config.LR_scale if len(config.views) > 1 else ():
        print(f"low resolution x{scale}: down to {SIZE // scale}x{SIZE // scale} pixels and up again")
    results = evaluate(
        prepare_module(fold_batch_norm(backbone), devices, dtype=dtype),
        pair_sets,
        devices[0],
        config.batch_size or default_eval_batch_size(devices),
        config.views,
        config.LR_scale,
        load_networks(config.sr_path, config.sr_scales, devices),
        config.LR_oneside,
    )
    return name, results


def report(results: Results, file: Path, name: str, config: ValidationConfig) -> None:
    """Prints the tables, and writes what is to be written."""
    from util.plot import roc_figure, save_figure
    from util.training.log import evaluation_lines, flatten_results

    print("\n".join(evaluation_lines(results, " Acc: ")))
    print(f"\n{table(results)}")
    if config.SR_eval:
        print(f"\n{recovery_table(results, config.LR_scale)}")
    if config.json:
        write_json(Path(config.json), results, file, name, config)
    if config.plot:
        save_figure(roc_figure(flatten_results(results)), Path(config.plot))
        print(f"ROC curves: {config.plot}")


def open_pair_sets(config: ValidationConfig) -> list[PairSet]:
    """The verification sets of data_dir and of --val_data. DataError if there are none."""
    from util.pairs import VERIFICATION_SETS, find_pair_sets

    pair_sets, missing = find_pair_sets(config.data_dir, config.named_pair_sets)
    if not pair_sets:
        places = ", ".join(places[0] for places in VERIFICATION_SETS.values())
        raise DataError(
            f"{config.data_dir}: no verification set in it ({places}); put one there, give --data_dir, or name sets "
            f"with --val_data"
        )
    if missing:
        print(f"not in {config.data_dir}, so left out: {', '.join(missing)}")
    return pair_sets


def table(results: Results) -> str:
    """One row a set and view. TAR@FAR=1e-2 is added where a set has too few pairs for 1e-3 to mean much."""
    from util.training.log import flatten_results, format_table

    rows = flatten_results(results)
    fars = ["1e-3", "1e-2"] if any(result.negatives < 1000 for result in rows.values()) else ["1e-3"]
    rates = [f"TAR@FAR={far}" for far in fars]
    lines = [["set", "accuracy", "threshold", "AUC", "EER", *rates, "pairs", "images/s"]]
    for name, result in rows.items():
        lines.append(
            [
                name,
                f"{result.accuracy:.4f} +- {result.accuracy_std:.4f}",
                f"{result.threshold:.3f}",
                f"{result.auc:.4f}",
                f"{result.eer:.4f}",
                *(f"{result.tar_at_far(float(far)):.4f}" for far in fars),
                str(result.pairs),
                f"{result.images_per_second:.0f}",
            ]
        )
    return format_table(lines)


def recovery_table(results: Results, scales: Sequence[int]) -> str:
    """One row a set and scale: what low resolution costs, and the share of it that super resolution wins back."""
    from util.evaluate import recovered_fraction, view_label
    from util.training.log import format_table

    lines = [["set", "scale", "HR", "LR", "SR", "lost", "won back"]]
    for name, high in results["HR"].items():
        for scale in scales:
            low, enlarged = (results[view_label(view, scale, scales)][name] for view in ("LR", "SR"))
            share = recovered_fraction(high, low, enlarged)
            accuracies = [f"{result.accuracy:.4f}" for result in (high, low, enlarged)]
            lost = f"{high.accuracy - low.accuracy:.4f}"
            lines.append([name, f"x{scale}", *accuracies, lost, "n/a" if share is None else f"{share:.0%}"])
    return format_table(lines)


def write_json(file: Path, results: Results, checkpoint: Path, backbone: str, config: ValidationConfig) -> None:
    from util.evaluate import average_accuracy
    from util.training.log import result_to_dict

    content: dict[str, Any] = {"checkpoint": str(checkpoint), "backbone": backbone}
    content |= {"LR_scale": list(config.LR_scale), "LR_oneside": config.LR_oneside}
    content["views"] = {
        view: {
            "sets": {name: result_to_dict(result) for name, result in sets.items()},
            "average": average_accuracy(sets),
        }
        for view, sets in results.items()
    }
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
    print(f"results: {file}")


if __name__ == "__main__":
    run_rank_script(main)
