"""Draw accuracy over the resolution of the face, as papers on low resolution do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from applications.resolution_curve.measure import BICUBIC, Curve
from util.face import FACE_SIZE
from util.plot import COLORS, DASHES, INK, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_IN_A_ROW = 2


def curve_figure(curves: Sequence[Curve], sets: Sequence[str]) -> Figure:
    """Return a figure with a panel for each verification set.

    A color stands for a network; lines are solid for bicubic and dashed for super resolution, which begins below the
    full face. The bars are one standard error of a proportion a of P pairs, sqrt(a (1 - a) / P).
    """
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

    columns = min(len(sets), PANELS_IN_A_ROW)
    rows = -(-len(sets) // columns)
    figure = Figure(figsize=(1.2 + 4.6 * columns, 0.7 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    labels = list(dict.fromkeys(curve.label for curve in curves))
    sizes = sorted({size for curve in curves for size in curve.results})
    for name, axes in zip(sets, panels, strict=False):
        for shift, curve in enumerate(curves):
            is_bicubic = curve.method == BICUBIC
            # Super resolution enlarges no full face, and a line to it would pass over sizes without a network.
            results = {size: sets[name] for size, sets in curve.results.items() if is_bicubic or size != FACE_SIZE}
            accuracies = [100 * result.accuracy for result in results.values()]
            errors = [100 * math.sqrt(r.accuracy * (1 - r.accuracy) / r.pairs) for r in results.values()]
            axes.errorbar(
                [size * 1.012**shift for size in results],  # shifted, or bars would hide each other
                accuracies,
                errors,
                label=curve.title,
                color=COLORS[labels.index(curve.label) % len(COLORS)],
                linestyle=DASHES[0] if is_bicubic else DASHES[1],
                marker="o" if is_bicubic else "s",
                markersize=4,
                linewidth=1.6,
                elinewidth=0.9,
                capsize=2,
            )
        axes.set(xscale="log", xlabel="Resolution of the face (pixels a side)", ylabel="Verification accuracy (%)")
        axes.set_xticks(sizes, labels=[str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(name, color=INK, fontsize=10)
        style_axes(axes, grid="y")
    for axes in list(panels):  # unused panels of the last row
        axes.set_visible(False)
    bars = [bar for bar in figure.axes[0].containers if isinstance(bar, ErrorbarContainer)]
    figure.legend(
        [bar.lines[0] for bar in bars],  # without the error bars, which would hide the dashes
        [str(bar.get_label()) for bar in bars],
        loc="outside upper center",
        ncols=min(2, len(bars)),
        handlelength=3,
        fontsize=9,
        labelcolor=INK,
        frameon=False,
    )
    return figure
