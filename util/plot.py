"""Figures of a run and of its validation.

matplotlib is imported inside functions, because it loads slowly. pyplot is never imported: a figure here is a plain
object, without a window, a global list of open figures, or changed settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from util.errors import UsageError
from util.files import atomic_write
from util.verification import VerificationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors (2008), which differ under any kind of color vision, without yellow, too pale for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#8C6D46")
DASHES = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
INK, PALE_INK, SPINE, GRID = "#333333", "#777777", "#888888", "#DDDDDD"
LOWEST_FAR = 1e-4
_PAGE_SIZE = (4.4, 3.4)  # inches: 420 pixels, which a telephone shows in readable size

Band = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, lower and upper end


def roc_figure(results: Mapping[str, VerificationResult], bands: Mapping[str, Band] | None = None) -> Figure:
    """Draw ROC curves over a logarithmic false accept rate.

    The legend has accuracy (± standard deviation) and AUC. A curve is a staircase of the largest true accept rate at
    each false accept rate. It begins at 1 / negatives, the smallest rate that its set can show, or at 1e-4. "LFW LR"
    has the color of "LFW", dashed. Later curves are thinner, so that they do not hide earlier curves below them.

    Args:
        results: {name of the curve: result}.
        bands: draw a small figure for a page with a band around each curve, {name: (FAR, lower TAR, upper TAR)}. The
            legend then has names alone, because the page has the numbers.
    """
    from matplotlib.figure import Figure

    if not results:
        raise ValueError("a ROC figure needs one result or more")
    figure = Figure(figsize=_PAGE_SIZE if bands else (8.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    curves = {name: _staircase(result) for name, result in results.items()}
    widths = np.linspace(2.2, 1.3, len(curves))
    for (name, (far, tar)), width, style in zip(curves.items(), widths, _styles(curves), strict=True):
        axes.plot(far, tar, drawstyle="steps-post", linewidth=width, label=name, **style)
        if bands:
            axes.fill_between(*bands[name], step="post", color=style["color"], alpha=0.15, linewidth=0)
    lowest = min(tar[0] for _, tar in curves.values())
    if bands:
        lowest = min(low[0] for _, low, _ in bands.values())
    bottom = max(0.0, np.floor(20 * lowest - 0.5) / 20)  # a multiple of 5 % below all curves
    axes.set(xscale="log", xlabel="False accept rate", ylabel="True accept rate (%)")
    axes.set_xlim(min(far[0] for far, _ in curves.values()), 1)
    axes.set_ylim(bottom, 1 + 0.02 * (1 - bottom))
    axes.yaxis.set_major_formatter(_percent)
    style_axes(axes, grid="both")
    if bands:
        _names_legend(figure, axes)
        return figure
    columns = {
        "accuracy (%)": [f"{100 * r.accuracy:.2f} ± {100 * r.accuracy_std:.2f}" for r in results.values()],
        "AUC": [f"{r.auc:.4f}" for r in results.values()],
    }
    _table_legend(figure, axes, columns)
    return figure


def score_histogram(result: VerificationResult, marks: Mapping[str, float] | None = None) -> Figure:
    """Draw how squared distances of same and different pairs are distributed, and the threshold.

    `marks` are further thresholds, {text at the line: squared distance}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_PAGE_SIZE, layout="constrained")
    axes = figure.add_subplot()
    top = 1.02 * max(float(result.distances.max()), result.threshold)
    bins = np.linspace(0, top, 61) if top > 0 else np.linspace(0, 1, 61)
    for same, label, color in ((True, "same person", COLORS[0]), (False, "different people", COLORS[1])):
        distances = result.distances[result.issame == same]
        axes.hist(
            distances,
            bins.tolist(),
            weights=np.full(len(distances), 1 / len(distances)),
            histtype="stepfilled",
            facecolor=(color, 0.25),
            edgecolor=color,
            label=f"{label} ({len(distances):,} pairs)",
        )
    label = f"threshold {result.threshold:.2f}"
    axes.axvline(result.threshold, color=INK, linewidth=1.2, linestyle=DASHES[1], label=label)
    for text, value in (marks or {}).items():
        axes.axvline(value, color=PALE_INK, linewidth=1, linestyle=DASHES[2])
        data_and_axes = axes.get_xaxis_transform()  # x of the data, y of the axes
        axes.text(value, 1, text, transform=data_and_axes, rotation=90, ha="right", va="top", fontsize=8, color=INK)
    axes.set(xlabel="Squared distance between embeddings", ylabel="Share of pairs (%)", xlim=(0, bins[-1]))
    axes.yaxis.set_major_formatter(_percent)
    style_axes(axes, grid="y")
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, labelcolor=INK, frameon=False)
    return figure


def fold_figure(results: Mapping[str, VerificationResult]) -> Figure:
    """Draw the accuracy in each fold."""
    lines = {
        name: (np.arange(1, len(result.fold_accuracies) + 1), result.fold_accuracies)
        for name, result in results.items()
    }
    figure = _line_figure(lines, xlabel="Fold", ylabel="Accuracy (%)", marker="o", markersize=4)
    figure.axes[0].set_xticks(range(1, max(len(folds) for folds, _ in lines.values()) + 1))
    return figure


def reject_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw error rates over the fraction of pairs that is rejected for its quality, {name: (fraction, error rate)}."""
    shown = {name: (rejected[rejected <= 0.5], error[rejected <= 0.5]) for name, (rejected, error) in curves.items()}
    figure = _line_figure(shown, xlabel="Rejected pairs (%)", ylabel="Error among the other pairs (%)")
    (axes,) = figure.axes
    axes.xaxis.set_major_formatter(_percent)
    axes.set_ylim(0)
    return figure


def resolution_figure(curves: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw accuracies over the resolution of the face, {name: {pixels a side: accuracy}}."""
    lines = {name: (np.array([*points]), np.array([*points.values()])) for name, points in curves.items()}
    xlabel = "Resolution of the face (pixels a side)"
    figure = _line_figure(lines, xlabel=xlabel, ylabel="Accuracy (%)", marker="o", markersize=4)
    (axes,) = figure.axes
    sizes = sorted({size for points in curves.values() for size in points})
    axes.set_xscale("log")
    axes.set_xticks(sizes, labels=[str(size) for size in sizes])
    axes.minorticks_off()
    return figure


def _line_figure(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]], *, xlabel: str, ylabel: str, **style: Any
) -> Figure:
    """Draw a small figure for a page with a line for each name, {name: (x, fraction)}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_PAGE_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for (name, (x, y)), own_style in zip(lines.items(), _styles(lines), strict=True):
        axes.plot(x, y, label=name, linewidth=1.6, **own_style, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.yaxis.set_major_formatter(_percent)
    style_axes(axes, grid="y")
    _names_legend(figure, axes)
    return figure


def training_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss, Prec@1 and, if there was a validation set, accuracy over the epochs of a run.

    `records` are the lines of metrics.jsonl: epoch, loss, prec1 (percent), lr, accuracy {set: value in [0, 1]}. Thin
    vertical lines mark where the learning rate fell to half or less from one epoch to the next.
    """
    from matplotlib.figure import Figure

    if not records:
        raise ValueError("training curves need the record of one epoch or more")
    sets = list(dict.fromkeys(name for record in records for name in record["accuracy"]))
    panels = 3 if sets else 2
    figure = Figure(figsize=(3.6 * panels + (1.6 if sets else 0), 3.2), layout="constrained")
    loss, precision, *accuracy = figure.subplots(1, panels)
    epochs = [record["epoch"] for record in records]
    line = {"linewidth": 1.6, "marker": "o" if len(records) <= 30 else "", "markersize": 3.5}
    loss.plot(epochs, [record["loss"] for record in records], color=COLORS[0], **line)
    precision.plot(epochs, [record["prec1"] for record in records], color=COLORS[0], **line)
    for axes in accuracy:
        columns: dict[str, list[str]] = {"last (%)": [], "best (%)": []}
        for name, style in zip(sets, _styles(sets), strict=True):
            evaluated = [record for record in records if name in record["accuracy"]]
            percent = [100 * record["accuracy"][name] for record in evaluated]
            axes.plot([record["epoch"] for record in evaluated], percent, label=name, **style, **line)
            columns["last (%)"].append(f"{percent[-1]:.2f}")
            columns["best (%)"].append(f"{max(percent):.2f}")
        _table_legend(figure, axes, columns)
    titles = ("Training loss", "Training Prec@1 (%)", "Verification accuracy (%)")
    for axes, title in zip((loss, precision, *accuracy), titles, strict=False):
        axes.set_title(title, color=INK, fontsize=10)
        _epoch_axis(axes, records)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format of the path's suffix. Raise UsageError for an unknown suffix."""
    path = Path(path)
    known = figure.canvas.get_supported_filetypes()
    suffix = path.suffix[1:].lower()
    if suffix not in known:
        raise UsageError(f"{path}: a plot cannot be written as {path.suffix or 'a file without a suffix'}. Use .png.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        figure.savefig(partial, format=suffix, dpi=200)


def _staircase(result: VerificationResult) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of a ROC from 1 / negatives or LOWEST_FAR on: FAR, and the largest TAR at each."""
    start = max(1 / result.negatives, LOWEST_FAR)
    far = np.unique(np.concatenate([[start], result.far[result.far > start]]))
    return far, result.tar[np.searchsorted(result.far, far, side="right") - 1]


def _styles(names: Sequence[str] | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Choose a color for each set and a dash for each view: "LFW LR" is a view of "LFW" if both are drawn."""
    colors: dict[str, str] = {}
    views: dict[str, int] = {}
    styles = []
    for name in names:
        base = next((other for other in names if name.startswith(f"{other} ")), name)
        colors.setdefault(base, COLORS[len(colors) % len(COLORS)])
        views[base] = views.get(base, -1) + 1
        styles.append({"color": colors[base], "linestyle": DASHES[views[base] % len(DASHES)]})
    return styles


def _table_legend(figure: Figure, axes: Axes, columns: Mapping[str, Sequence[str]]) -> None:
    """Add a legend next to the axes: a row for each line, and columns of text under their headings.

    A legend fills column by column. The columns of text are entries without a line to show.
    """
    from matplotlib.lines import Line2D

    lines = axes.get_lines()
    blank = Line2D([], [], linestyle="none")
    handles = [blank, *lines] + [blank] * (len(columns) * (len(lines) + 1))
    labels = ["", *(str(line.get_label()) for line in lines)]
    for heading, texts in columns.items():
        labels += [heading, *texts]
    legend = figure.legend(
        handles,
        labels,
        loc="outside right upper",
        ncols=1 + len(columns),
        columnspacing=-0.6,
        fontsize=9,
        labelcolor=INK,
        frameon=False,
    )
    for text in legend.get_texts():
        if text.get_text() in columns:
            text.set_color(PALE_INK)


def _names_legend(figure: Figure, axes: Axes) -> None:
    """Add a legend of names above the axes."""
    lines = axes.get_lines()
    longest = max(len(str(line.get_label())) for line in lines)
    columns = min(len(lines), max(1, 42 // (longest + 8)))
    figure.legend(
        handles=lines,
        loc="outside upper center",
        ncols=columns,
        fontsize=9,
        labelcolor=INK,
        frameon=False,
        handlelength=3,
    )


def _percent(fraction: float, position: float) -> str:
    return f"{100 * fraction:g}"


def style_axes(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Style axes: two spines, pale grid lines behind the data, dark gray text."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SPINE)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=SPINE, labelcolor=INK, labelsize=9)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=INK, fontsize=10)


def _epoch_axis(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("Epoch")
    axes.set_xlim(records[0]["epoch"] - 0.5, records[-1]["epoch"] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    for before, after in pairwise(records):
        if after["lr"] <= before["lr"] / 2:
            axes.axvline(after["epoch"] - 0.5, color="#AAAAAA", linewidth=0.9, linestyle=DASHES[2], zorder=0)
    style_axes(axes, grid="y")
