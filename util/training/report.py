"""Verification results as text and JSON: for train.py, validation.py and applications/resolution_curve."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from util.evaluate import average_accuracy, recovered_fraction, view_label
from util.files import atomic_write
from util.verification import VerificationResult

SetResults = Mapping[str, VerificationResult]  # {set: result}
Results = Mapping[str, SetResults]  # {view: {set: result}}


def flatten_results(results: Results) -> dict[str, VerificationResult]:
    """Return {view: {set: result}} as {"LFW": …, "LFW LR": …}, the names of curves and table rows."""
    flat = {}
    for view, sets in results.items():
        for name, result in sets.items():
            flat[name if view == "HR" else f"{name} {view}"] = result
    return flat


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
    """Return a table with one row for each set and view.

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
    return format_table(rows)


def sr_recovery_table(results: Results, scales: Sequence[int]) -> str:
    """Return a table of the accuracy lost at low resolution, and the fraction of it that super resolution recovers.

    Args:
        results: has the views HR, LR and SR, the last two at each of the scales.
        scales: low resolution is 112 // scale pixels.
    """
    rows = [["set", "scale", "HR", "LR", "SR", "lost", "won back"]]
    for name, high in results["HR"].items():
        for scale in scales:
            low = results[view_label("LR", scale, scales)][name]
            enlarged = results[view_label("SR", scale, scales)][name]
            accuracies = [f"{result.accuracy:.4f}" for result in (high, low, enlarged)]
            fraction = recovered_fraction(high, low, enlarged)
            recovered = "n/a" if fraction is None else f"{fraction:.0%}"
            rows.append([name, f"x{scale}", *accuracies, f"{high.accuracy - low.accuracy:.4f}", recovered])
    return format_table(rows)


def sets_to_dict(sets: SetResults) -> dict[str, Any]:
    """Return the results of one view, and their average accuracy, for JSON."""
    return {"sets": {name: result.to_dict() for name, result in sets.items()}, "average": average_accuracy(sets)}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
