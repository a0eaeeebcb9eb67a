"""The result of an evaluation as text, JSON and an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from util.analysis import operating_points
from util.identification import SearchResult
from util.pairs import interleaved_order
from util.plot import COLORS, style_axes
from util.training.report import format_far, format_table, threshold_rows
from util.verification import verify_distances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[list[str]]  # of a table, the header first
Picture = tuple[np.ndarray, str]  # (H, W, 3) RGB uint8 and its caption

_POINTS = 200  # of a curve


@dataclass
class Evaluation:
    """The result of an evaluation.

    `facts` are lines about what was evaluated, `tables` {heading: rows}, `figures` the same numbers for JSON, `charts`
    {caption: figure}, and `pictures` {heading: pictures}. `intro` is the first paragraph of the page.
    """

    title: str
    intro: str = ""
    facts: list[str] = field(default_factory=list)
    tables: dict[str, Rows] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, Figure] = field(default_factory=dict)
    pictures: dict[str, list[Picture]] = field(default_factory=dict)

    def add_pairs(self, name: str, scores: np.ndarray, is_same: np.ndarray) -> None:
        """Add the verification (1:1) of pairs: rates and thresholds at each FAR that the pairs reach.

        Args:
            name: of the pairs.
            scores: (P,) cosines.
            is_same: (P,) bool, whether a pair shows one person.

        Raises:
            DataError: there are fewer than two pairs of a kind.
        """
        # The order matters for folds alone, and nothing here depends on them.
        order = interleaved_order(is_same, folds=2)
        result = verify_distances(2 - 2 * scores[order], is_same[order], folds=2)
        same = result.pairs - result.negatives
        counts = f"{same:,} same and {result.negatives:,} different pairs"
        self.facts.append(f"Verification (1:1): {counts}, AUC {result.auc:.5f}, EER {result.eer:.4f}")
        points = operating_points(result)
        self.tables["Verification (1:1)"] = threshold_rows({"HR": {name: result}})
        self.figures["verification"] = {
            "same_pairs": same,
            "different_pairs": result.negatives,
            "auc": result.auc,
            "eer": result.eer,
            "at_far": [asdict(point) | {"cosine": point.cosine} for point in points],
        }
        fars = np.logspace(np.log10(1 / result.negatives), 0, _POINTS)
        tars = np.array([result.tar_at_far(min(far * (1 + 1e-9), 1)) for far in fars.tolist()])
        self.charts["True accept rate over false accept rate"] = rate_figure(
            {name: (fars, tars)}, "False accept rate (FAR)", "True accept rate (%)"
        )

    def add_searches(self, searches: dict[str, SearchResult], ranks: Sequence[int], fpirs: Sequence[float]) -> None:
        """Add the identification (1:N) in one gallery or several, with their mean.

        Args:
            searches: {name of the gallery: its result}. Ranks are pooled over the probes of all galleries, and rates of
                the open set are averaged over the galleries.
            ranks: the positions up to which a probe's person counts as found.
            fpirs: false positive identification rates, left out if the non-mated probes are too few for all galleries.
        """
        rows = [["gallery", "mated probes", *(f"rank-{rank}" for rank in ranks)]]
        open_rows = [["gallery", "non-mated probes", "FPIR", "TPIR", "threshold: cosine", "squared distance"]]
        figures: dict[str, Any] = {}
        curves = {}
        for name, found in searches.items():
            mated, strangers = int(found.is_mated.sum()), int((~found.is_mated).sum())
            rows.append([name, f"{mated:,}", *(f"{found.rank(rank):.4f}" for rank in ranks)])
            figure: dict[str, Any] = {"mated_probes": mated, "non_mated_probes": strangers}
            figure["ranks"] = {str(rank): found.rank(rank) for rank in ranks}
            figure["at_fpir"] = []
            for fpir in fpirs:
                threshold, tpir = found.threshold_at_fpir(fpir), found.tpir_at_fpir(fpir)
                if threshold is None or tpir is None:
                    continue
                distance = 2 - 2 * threshold
                cells = [format_far(fpir), f"{tpir:.4f}", f"{threshold:.4f}", f"{distance:.4f}"]
                open_rows.append([name, f"{strangers:,}", *cells])
                figure["at_fpir"].append(
                    {"fpir": fpir, "tpir": tpir, "cosine": threshold, "squared_distance": distance}
                )
            figures[name] = figure
            if strangers > 1:
                curves[name] = found.tpir_curve()
        if len(searches) > 1:
            self._add_mean(searches, figures, rows, open_rows, ranks=ranks)
        self.tables["Identification (1:N), closed set"] = rows
        if len(open_rows) > 1:
            self.tables["Identification (1:N), open set"] = open_rows
        self.figures["identification"] = figures
        if curves:
            self.charts["True positive identification rate over false positive identification rate"] = rate_figure(
                curves, "False positive identification rate (FPIR)", "True positive identification rate (%)"
            )

    def _add_mean(
        self,
        searches: dict[str, SearchResult],
        figures: dict[str, Any],
        rows: Rows,
        open_rows: Rows,
        *,
        ranks: Sequence[int],
    ) -> None:
        """Add the ranks over the probes of all galleries, and the mean TPIR at each FPIR that all galleries reach."""
        pooled = np.concatenate([found.mate_ranks[found.is_mated] for found in searches.values()])
        mean_ranks = {str(rank): float(np.mean(pooled <= rank)) for rank in ranks}
        rows.append(["mean", f"{len(pooled):,}", *(f"{value:.4f}" for value in mean_ranks.values())])
        points = []
        for reached in zip(*(figure["at_fpir"] for figure in figures.values()), strict=False):
            tpir = float(np.mean([point["tpir"] for point in reached]))
            points.append({"fpir": reached[0]["fpir"], "tpir": tpir})
            open_rows.append(["mean", "", format_far(reached[0]["fpir"]), f"{tpir:.4f}", "", ""])
        figures["mean"] = {"mated_probes": len(pooled), "ranks": mean_ranks, "at_fpir": points}

    def text(self) -> str:
        """Return the facts and tables for the console."""
        tables = [f"{heading}\n{format_table(rows)}" for heading, rows in self.tables.items()]
        return "\n\n".join(["\n".join(self.facts), *tables])

    def page(self) -> str:
        """Return the HTML page."""
        from util.html_page import Section, chart, paragraph, picture, pictures, render_page, table

        sections = [Section("What was evaluated", [*map(paragraph, self.facts)])] if self.facts else []
        sections += [Section(heading, [table(rows[0], rows[1:])]) for heading, rows in self.tables.items()]
        if self.charts:
            sections.append(Section("Curves", [chart(figure, caption) for caption, figure in self.charts.items()]))
        for heading, items in self.pictures.items():
            drawn = pictures([picture(image, caption) for image, caption in items])
            about = "The image, the one that was found, and the own one if it is in the gallery." if items else "None."
            sections.append(Section(heading, [paragraph(about), drawn]))
        return render_page(self.title, sections, intro=self.intro)


def rate_figure(curves: dict[str, tuple[np.ndarray, np.ndarray]], x_label: str, y_label: str) -> Figure:
    """Draw rates over a rate on a logarithmic axis: {name: (x, y)}, fractions in ascending order of x."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for (name, (x, y)), color in zip(curves.items(), COLORS, strict=False):
        axes.plot(x, 100 * y, drawstyle="steps-post", color=color, linewidth=1.8, label=name)
    lowest = min(100 * y.min() for _, y in curves.values())
    bottom = max(0.0, 10 * np.floor(lowest / 10 - 0.2))
    axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
    axes.set_xlim(min(x[0] for x, _ in curves.values()), 1)
    axes.set_ylim(bottom, 100 + 0.02 * (100 - bottom))
    style_axes(axes, grid="both")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure
