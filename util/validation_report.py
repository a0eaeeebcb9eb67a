"""The page that validation.py writes with --report: tables, charts and pictures of one network, or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from markupsafe import Markup

from util.analysis import (
    RESAMPLES,
    error_versus_reject,
    false_accepts,
    false_rejects,
    hardest_right,
    operating_points,
    roc_band,
)
from util.evaluate import View, view_label
from util.face import FACE_SIZE
from util.html_page import Section, chart, paragraph, picture, pictures, render_page, table
from util.pairs import PairSet
from util.plot import fold_figure, reject_figure, resolution_figure, roc_figure, score_histogram
from util.public_networks import PublicNetwork
from util.training.report import (
    Results,
    compare_networks,
    comparison_rows,
    find_groups,
    flatten_results,
    format_far,
    group_rows,
    low_res_rows,
    lowest_rates,
    results_rows,
    row_name,
    threshold_rows,
)
from util.transform import EVAL_CROPS
from util.verification import FOLDS, VerificationResult, cosine

_SHOWN = 10  # pairs of each kind
_REJECTED = (0, 0.05, 0.1, 0.2, 0.3, 0.5)
_ROC_BAND = f"The bands hold 95 % at each false accept rate, by a bootstrap of the pairs ({RESAMPLES:,} resamples)."
_BOOTSTRAP = f"Intervals hold 95 %, by a bootstrap of the pairs ({RESAMPLES:,} resamples)"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A network, the file it was read from, and its results on the sets. `views` show what the network sees."""

    file: Path
    network: PublicNetwork
    results: Results
    views: Mapping[str, View]


@dataclass(frozen=True)
class ShownPairs:
    """A set in a view, as a network is shown it. With `first_image_only` the view HR shows the second image."""

    pairs: PairSet
    view: View
    crop: str
    first_image_only: bool

    def picture(self, number: int, result: VerificationResult) -> Markup:
        """Return both images of pair `number` as one picture, with what users find them by."""
        crops = EVAL_CROPS[self.crop](self.pairs.images(2 * number, 2 * number + 2))
        images = self.view(crops).cpu().numpy()
        if self.first_image_only:
            images[1] = crops[1]
        lines = [f"distance {result.distances[number]:.3f}, cosine {cosine(result.distances[number]):.3f}"]
        lines += [self.pairs.image_name(2 * number), self.pairs.image_name(2 * number + 1)]
        if result.norms is not None:
            lines.append("norms " + ", ".join(f"{norm:.3g}" for norm in result.norms[2 * number : 2 * number + 2]))
        return picture(np.hstack([images[0], images[1]]), "\n".join(lines))

    def pictures(self, numbers: np.ndarray, result: VerificationResult) -> Markup:
        """Return the first pairs of `numbers` as pictures."""
        return pictures([self.picture(int(number), result) for number in numbers[:_SHOWN]])


def report_page(
    networks: Mapping[str, Evaluated],
    pair_sets: Sequence[PairSet],
    *,
    scales: Sequence[int],
    first_image_only: bool,
    now: datetime,
) -> str:
    """Return the HTML of the report on one network, or of the comparison of several networks.

    Args:
        networks: {name: network and results}. The first one is what the others are compared with.
        pair_sets: the verification sets.
        scales: of the views LR and SR; low resolution is 112 // scale pixels.
        first_image_only: the second image of each pair was shown as in the view HR.
        now: the time of the report.
    """
    accuracies = []
    for name, evaluated in networks.items():
        about = f"{evaluated.file}: {evaluated.network.describe()}."
        heading = "Accuracy" if len(networks) == 1 else f"Accuracy of {name}"
        accuracies.append(Section(heading, [paragraph(about), _accuracy_table(evaluated.results)]))
    if len(networks) > 1:
        comparison, *details = _comparison_sections(networks, pair_sets, first_image_only)
        sections = [comparison, *accuracies, *details]
        title = f"Comparison of {', '.join(networks)}"
    else:
        (evaluated,) = networks.values()
        sections = [*accuracies, *_sections(evaluated, pair_sets, scales, first_image_only)]
        title = "Verification report"
    intro = f"Made by validation.py at {now:%Y-%m-%d %H:%M}. docs/evaluation.md explains the numbers."
    return render_page(title, sections, intro=intro)


def _accuracy_table(results: Results) -> Markup:
    """Return the table of results, with the cosine next to the threshold."""
    header, *rows = results_rows(results)
    place = header.index("threshold") + 1
    for row, result in zip(rows, flatten_results(results).values(), strict=True):
        row.insert(place, f"{cosine(result.threshold):.3f}")
        row[1] = row[1].replace("+-", "±")
    return table([*header[:place], "cosine", *header[place:]], rows)


def _sections(
    evaluated: Evaluated, pair_sets: Sequence[PairSet], scales: Sequence[int], first_image_only: bool
) -> list[Section]:
    """Return the sections on one network, after its accuracy."""
    results = evaluated.results
    views = {view: flatten_results({view: sets}) for view, sets in results.items()}  # one chart would be crowded
    sections = [
        Section("ROC", [*(_roc(view, name) for name, view in views.items()), paragraph(_ROC_BAND)]),
        Section("Thresholds for a false accept rate", _threshold_parts(results)),
        Section("Distances", [_histogram(name, result) for name, result in flatten_results(results).items()]),
        Section("Accuracy per fold", _fold_parts(views)),
        Section("Quality", _quality_parts(views)),
    ]
    if len(results) > 1:
        sections.append(Section("Low resolution", _low_res_parts(results, scales)))
    groups = find_groups(pair_sets)
    if groups:
        header, *rows = group_rows(results, groups)
        about = (
            "Accuracy with its Wilson interval, false accept rate (FAR) and false reject rate (FRR) at the thresholds "
            "of the complete set. Own threshold: the accuracy of the protocol on the pairs of the group alone. The gap "
            "is the difference between the highest and the lowest accuracy."
        )
        sections.append(Section("Groups", [paragraph(about), table(header, rows)]))
    for pairs in pair_sets:
        for view, sets in results.items():
            shown = ShownPairs(pairs, evaluated.views[view], evaluated.network.crop, first_image_only and view != "HR")
            sections.append(Section(f"Pairs of {row_name(pairs.name, view)}", _pair_parts(shown, sets[pairs.name])))
    return sections


def _roc(results: Mapping[str, VerificationResult], caption: str) -> Markup:
    return chart(roc_figure(results, {name: roc_band(result) for name, result in results.items()}), caption)


def _histogram(name: str, result: VerificationResult) -> Markup:
    marks = {f"FAR {format_far(point.far)}": point.threshold for point in operating_points(result)}
    return chart(score_histogram(result, marks), name)


def _threshold_parts(results: Results) -> list[Markup]:
    header, *rows = threshold_rows(results)
    about = (
        "A pair is accepted if its squared distance is below the threshold, which means that its cosine is above "
        f"1 - threshold / 2. {_BOOTSTRAP}; the interval of a true accept rate (TAR) is at least Wilson's. "
        f"{lowest_rates(results)}."
    )
    return [paragraph(about), table(header, rows)]


def _fold_parts(views: Mapping[str, Mapping[str, VerificationResult]]) -> list[Markup]:
    charts = [chart(fold_figure(results), view) for view, results in views.items()]
    rows = [
        [name, *(f"{accuracy:.4f}" for accuracy in result.fold_accuracies)]
        for results in views.values()
        for name, result in results.items()
    ]
    return [*charts, table(["set", *map(str, range(1, FOLDS + 1))], rows)]


def _quality_parts(views: Mapping[str, Mapping[str, VerificationResult]]) -> list[Markup]:
    about = (
        "The norm of an embedding before it is normalized is small where the network sees little of a face. The "
        "quality of a pair is the smaller of its two norms. If the error falls while the pairs of the lowest quality "
        "are rejected, the norm can tell which images to refuse. The decisions are the same as for the accuracy."
    )
    charts, rows = [], []
    for view, results in views.items():
        curves = {name: error_versus_reject(result) for name, result in results.items()}
        charts.append(chart(reject_figure(curves), view))
        for name, (_, error) in curves.items():
            rows.append([name, *(f"{error[int(fraction * len(error))]:.4f}" for fraction in _REJECTED)])
    header = ["error after rejecting", *(f"{fraction:.0%}" for fraction in _REJECTED)]
    return [paragraph(about), *charts, table(header, rows)]


def _low_res_parts(results: Results, scales: Sequence[int]) -> list[Markup]:
    header, *rows = low_res_rows(results, scales)
    curves: dict[str, dict[int, float]] = {}
    for name, high in results["HR"].items():
        for view in ("LR", "SR"):
            if view_label(view, scales[0], scales) in results:
                sizes = {FACE_SIZE // scale: results[view_label(view, scale, scales)][name] for scale in sorted(scales)}
                curves[name if view == "LR" else f"{name} SR"] = {
                    size: result.accuracy for size, result in ({FACE_SIZE: high} | sizes).items()
                }
    about = "LR: reduced to 112 / scale pixels and enlarged by bicubic interpolation."
    if len(header) > 5:
        about += " SR: enlarged by super resolution. Won back: the fraction of the lost accuracy that SR recovers."
    return [paragraph(about), table(header, rows), chart(resolution_figure(curves))]


def _pair_parts(shown: ShownPairs, result: VerificationResult) -> list[Markup]:
    """Return pictures of the pairs that went wrong, and of those that nearly did."""
    accepts, rejects = false_accepts(result), false_rejects(result)
    kinds = (
        (f"False accepts: {len(accepts)} of {result.negatives} pairs of different people, the closest first.", accepts),
        (
            f"False rejects: {len(rejects)} of {result.pairs - result.negatives} pairs of one person, the most distant "
            "first.",
            rejects,
        ),
        ("The hardest right decisions, the closest to the threshold first.", hardest_right(result)),
    )
    parts = [paragraph(f"The threshold is {result.threshold:.3f}, cosine {cosine(result.threshold):.3f}.")]
    for about, numbers in kinds:
        parts += [paragraph(about), shown.pictures(numbers, result)]
    return parts


def _comparison_sections(
    networks: Mapping[str, Evaluated], pair_sets: Sequence[PairSet], first_image_only: bool
) -> list[Section]:
    """Return the sections that compare networks with the first one."""
    results = {name: evaluated.results for name, evaluated in networks.items()}
    header, *rows = comparison_rows(compare_networks(results))
    about = (
        "Difference: the accuracy of the network minus the accuracy of the baseline, each at its own thresholds, with "
        f"a paired bootstrap interval ({RESAMPLES:,} resamples of the pairs). Only right: pairs that the network "
        "alone, and the baseline alone, decides right. p: McNemar's exact test of these two numbers. A small p means "
        "that the difference is hardly chance; it is not corrected for the number of rows."
    )
    sections = [Section("Comparison", [paragraph(about), table(header, rows)])]
    flat = {name: flatten_results(found) for name, found in results.items()}
    baseline, *others = networks
    rocs = []
    for name in flat[baseline]:
        curves = {network: found[name] for network, found in flat.items()}
        rocs.append(_roc(curves, name))
    sections.append(Section("ROC", [*rocs, paragraph(_ROC_BAND)]))
    for name in networks:
        sections.append(Section(f"Thresholds of {name}", _threshold_parts(results[name])))
    first = networks[baseline]
    for pairs in pair_sets:
        for view, sets in first.results.items():
            shown = ShownPairs(pairs, first.views[view], first.network.crop, first_image_only and view != "HR")
            ours = sets[pairs.name]
            parts = []
            for other in others:
                theirs = results[other][view][pairs.name]
                for right, wrong, numbers in (
                    (baseline, other, np.flatnonzero(ours.correct & ~theirs.correct)),
                    (other, baseline, np.flatnonzero(theirs.correct & ~ours.correct)),
                ):
                    text = f"{right} is right and {wrong} is wrong: {len(numbers)} pairs. Distances of {baseline}."
                    parts += [paragraph(text), shown.pictures(numbers, ours)]
            sections.append(Section(f"Pairs of {row_name(pairs.name, view)}", parts))
    return sections
