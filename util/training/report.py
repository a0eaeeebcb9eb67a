"""Verification results as text and JSON: for train.py, validation.py and applications/resolution_curve."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from util.analysis import Comparison, accuracy_gap, compare, evaluate_groups, operating_points
from util.evaluate import average_accuracy, recovered_fraction, view_label
from util.files import atomic_write
from util.pairs import PairSet
from util.verification import VerificationResult, cosine

SetResults = Mapping[str, VerificationResult]  # {set: result}
Results = Mapping[str, SetResults]  # {view: {set: result}}
Groups = Mapping[str, np.ndarray]  # {set: group of each pair (P,)}


def flatten_results(results: Results) -> dict[str, VerificationResult]:
    """Return {view: {set: result}} as {"LFW": …, "LFW LR": …}, the names of curves and table rows."""
    return {row_name(name, view): result for view, sets in results.items() for name, result in sets.items()}


def row_name(name: str, view: str) -> str:
    """Return what a set in a view is called in tables and legends."""
    return name if view == "HR" else f"{name} {view}"


def evaluation_lines(results: Results, separator: str) -> list[str]:
    """Return a line for each view, `Evaluation: LFW : 0.9912, …, Avg : 0.95`, in the older toolkit's format.

    The separator is ` : ` in Evaluation.txt and ` Acc: ` on the console of validation.py.
    """
    lines = []
    for view, sets in results.items():
        accuracies = {name: result.accuracy for name, result in sets.items()} | {"Avg": average_accuracy(sets)}
        text = ", ".join(f"{name}{separator}{value:.4f}" for name, value in accuracies.items())
        lines.append(f"Evaluation: {text}" if view == "HR" else f"Evaluation {view}: {text}")
    return lines


def format_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as text, each column as wide as its widest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    return "\n".join(lines)


def results_table(results: Results) -> str:
    """Return the table of results_rows() as text."""
    return format_table(results_rows(results))


def results_rows(results: Results) -> list[list[str]]:
    """Return a heading, and a row of cells for each set and view.

    TAR@FAR=1e-2 is added if a set has too few negative pairs for 1e-3 to mean much.
    """
    flat = flatten_results(results)
    fars = ["1e-3", "1e-2"] if any(result.negatives < 1000 for result in flat.values()) else ["1e-3"]
    rates = [f"TAR@FAR={far}" for far in fars]
    rows = [["set", "accuracy", "threshold", "AUC", "EER", *rates, "pairs", "images/s"]]
    for name, result in flat.items():
        rows.append(
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
    return rows


def threshold_rows(results: Results) -> list[list[str]]:
    """Return a heading, and a row of cells for each set, view and false accept rate that the pairs reach."""
    interval = "95 % interval"
    rows = [["FAR", "set", "threshold", interval, "cosine", interval, "TAR", interval]]
    for name, result in flatten_results(results).items():
        for point in operating_points(result):
            cells = [format_far(point.far), name]
            for value, ends in (
                (point.threshold, point.threshold_interval),
                (point.cosine, point.cosine_interval),
                (point.tar, point.tar_interval),
            ):
                cells += [f"{value:.4f}", format_interval(ends)]
            rows.append(cells)
    return rows


def lowest_rates(results: Results) -> str:
    """Return which false accept rates the pairs cannot show."""
    rates = {name: result.negatives for sets in results.values() for name, result in sets.items()}
    limits = ", ".join(f"1/{negatives} ({name})" for name, negatives in rates.items())
    return f"False accept rates below one of the pairs of different people are not shown: {limits}"


def group_rows(results: Results, groups: Groups) -> list[list[str]]:
    """Return a heading, and a row of cells for each group of each set and view, and for the gap between groups."""
    rows = [["group", "set", "pairs", "accuracy", "95 % interval", "FAR", "FRR", "own threshold"]]
    for view, sets in results.items():
        for name in filter(groups.__contains__, sets):
            found = evaluate_groups(sets[name], groups[name])
            title = row_name(name, view)
            for group in found:
                accuracy = [f"{group.accuracy:.4f}", format_interval(group.interval)]
                rates = [
                    "n/a" if rate is None else f"{rate:.4f}" for rate in (group.far, group.frr, group.own_accuracy)
                ]
                rows.append([group.name, title, str(group.pairs), *accuracy, *rates])
            rows.append(["gap", title, "", f"{accuracy_gap(found):.4f}", "", "", "", ""])
    return rows


@dataclass(frozen=True)
class NetworkComparison:
    """The comparison of a network with the baseline, on a set in a view."""

    set: str
    view: str
    baseline: str
    network: str
    baseline_accuracy: float
    accuracy: float
    comparison: Comparison


def compare_networks(networks: Mapping[str, Results]) -> list[NetworkComparison]:
    """Compare each network, {name: results}, with the first one, on each set and view."""
    (baseline, expected), *others = networks.items()
    found = []
    for view, sets in expected.items():
        for name, first in sets.items():
            for network, results in others:
                second = results[view][name]
                found.append(
                    NetworkComparison(
                        set=name,
                        view=view,
                        baseline=baseline,
                        network=network,
                        baseline_accuracy=first.accuracy,
                        accuracy=second.accuracy,
                        comparison=compare(first, second),
                    )
                )
    return found


def comparison_rows(comparisons: Iterable[NetworkComparison]) -> list[list[str]]:
    """Return a heading, and a row of cells for each comparison."""
    rows = [["network", "accuracy", "baseline", "accuracy", "set", "difference", "95 % interval", "only right", "p"]]
    for each in comparisons:
        found = each.comparison
        rows.append(
            [
                each.network,
                f"{each.accuracy:.4f}",
                each.baseline,
                f"{each.baseline_accuracy:.4f}",
                row_name(each.set, each.view),
                f"{found.difference:+z.4f}",
                format_interval(found.interval, "+z.4f"),
                f"{found.only_second} : {found.only_first}",
                f"{found.p_value:.3g}",
            ]
        )
    return rows


def sr_recovery_table(results: Results, scales: Sequence[int]) -> str:
    """Return the table of low_res_rows() as text."""
    return format_table(low_res_rows(results, scales))


def low_res_rows(results: Results, scales: Sequence[int]) -> list[list[str]]:
    """Return rows of the accuracy lost at low resolution, and the fraction of it that super resolution recovers.

    Args:
        results: has the views HR and LR, and SR if wanted, the last two at each of the scales.
        scales: low resolution is 112 // scale pixels.
    """
    with_sr = view_label("SR", scales[0], scales) in results
    rows = [["set", "scale", "HR", "LR", *(["SR", "lost", "won back"] if with_sr else ["lost"])]]
    for name, high in results["HR"].items():
        for scale in scales:
            low = results[view_label("LR", scale, scales)][name]
            row = [name, f"x{scale}", f"{high.accuracy:.4f}", f"{low.accuracy:.4f}"]
            lost = f"{high.accuracy - low.accuracy:.4f}"
            if with_sr:
                enlarged = results[view_label("SR", scale, scales)][name]
                fraction = recovered_fraction(high, low, enlarged)
                row += [f"{enlarged.accuracy:.4f}", lost, "n/a" if fraction is None else f"{fraction:.0%}"]
            else:
                row.append(lost)
            rows.append(row)
    return rows


def format_far(far: float) -> str:
    """Return a false accept rate as 1e-3."""
    return f"{far:.0e}".replace("e-0", "e-")


def format_interval(ends: tuple[float, float], spec: str = ".4f") -> str:
    """Return an interval as `0.1 to 0.2`."""
    return f"{ends[0]:{spec}} to {ends[1]:{spec}}"


def sets_to_dict(sets: SetResults, groups: Groups | None = None) -> dict[str, Any]:
    """Return the results of one view, and their average accuracy, for JSON. `groups` come from find_groups()."""
    content = {}
    for name, result in sets.items():
        points = {
            format_far(point.far): {
                "threshold": point.threshold,
                "threshold_interval": point.threshold_interval,
                "cosine": point.cosine,
                "cosine_interval": point.cosine_interval,
                "tar": point.tar,
                "tar_interval": point.tar_interval,
            }
            for point in operating_points(result)
        }
        content[name] = result.to_dict() | {"cosine": cosine(result.threshold), "thresholds_at_far": points}
        if groups and name in groups:
            found = evaluate_groups(result, groups[name])
            content[name]["groups"] = {group.name: asdict(group) for group in found}
            content[name]["accuracy_gap"] = accuracy_gap(found)
    return {"sets": content, "average": average_accuracy(sets)}


def find_groups(pair_sets: Iterable[PairSet]) -> Groups:
    """Return {set: group of each pair} of the sets that know groups of people."""
    return {pairs.name: pairs.groups for pairs in pair_sets if pairs.groups is not None}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
