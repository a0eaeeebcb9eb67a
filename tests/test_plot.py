import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from util.errors import UsageError
from util.plot import (
    COLORS,
    fold_figure,
    reject_figure,
    resolution_figure,
    roc_figure,
    save_figure,
    score_histogram,
    training_curves,
)
from util.verification import VerificationResult, verify

RECORDS = [
    {"epoch": 1, "loss": 9.5, "prec1": 1.0, "lr": 0.1, "accuracy": {"LFW": 0.7}},
    {"epoch": 2, "loss": 6.5, "prec1": 11.0, "lr": 0.1, "accuracy": {"LFW": 0.9, "LFW LR": 0.6}},
    {"epoch": 3, "loss": 5.5, "prec1": 21.0, "lr": 0.01, "accuracy": {"LFW": 0.8, "LFW LR": 0.65}},
]


def made_result(pairs: int = 400, noise: float = 1.5, seed: int = 0) -> VerificationResult:
    rng = np.random.default_rng(seed)
    issame = np.arange(pairs) % 2 == 0
    embeddings = rng.standard_normal((2 * pairs, 32))
    embeddings[1::2][issame] = embeddings[0::2][issame] + noise * rng.standard_normal((issame.sum(), 32))
    return verify(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), issame)


def legend_texts(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_roc_figure_has_a_curve_and_a_legend_row_for_each_set(count):
    results = {f"set{index}": made_result(seed=index) for index in range(count)}
    figure = roc_figure(results)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines()] == list(results)
    texts = legend_texts(figure)
    rows = [texts[start :: count + 1] for start in range(count + 1)]
    assert rows[0] == ["", "accuracy (%)", "AUC"]
    for row, (name, result) in zip(rows[1:], results.items(), strict=True):
        accuracy = f"{100 * result.accuracy:.2f} ± {100 * result.accuracy_std:.2f}"
        assert row == [name, accuracy, f"{result.auc:.4f}"]


def test_roc_figure_has_a_color_per_set_and_a_dash_per_view():
    names = ["LFW", "AgeDB", "LFW LR x4", "AgeDB LR x4", "LFW SR x4", "LFWX"]
    figure = roc_figure(dict.fromkeys(names, made_result()))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    colors = [lines[name].get_color() for name in names]
    assert colors == [COLORS[index] for index in (0, 1, 0, 1, 0, 2)]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines.values()}) == len(names)


def test_roc_figure_has_eight_colors_for_eight_sets():
    figure = roc_figure({f"set{index}": made_result() for index in range(8)})
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 8


def test_roc_curve_shows_the_largest_tar_at_each_far():
    result = made_result()
    (line,) = roc_figure({"LFW": result}).axes[0].get_lines()
    far, tar = line.get_data()
    assert line.get_drawstyle() == "steps-post"
    assert far[0] == 1 / result.negatives and far[-1] == 1 and tar[-1] == 1
    assert np.all(np.diff(far) > 0) and np.all(np.diff(tar) >= 0)
    assert tar.tolist() == [result.tar_at_far(rate) for rate in far]


def test_far_axis_is_logarithmic_from_the_smallest_rate():
    few, many = made_result(pairs=40), made_result(pairs=400)
    (axes,) = roc_figure({"few": few, "many": many}).axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == (1 / 200, 1)
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [1 / 20, 1 / 200]


def test_far_axis_goes_no_lower_than_1e_4():
    (axes,) = roc_figure({"LFW": made_result(pairs=30_000)}).axes
    assert axes.get_xlim() == (1e-4, 1)
    (line,) = axes.get_lines()
    assert line.get_ydata()[0] == made_result(pairs=30_000).tar_at_far(1e-4)


@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
def test_tar_axis_holds_all_curves(noise):
    results = {"a": made_result(noise=noise), "b": made_result(noise=1.0)}
    (axes,) = roc_figure(results).axes
    bottom, top = axes.get_ylim()
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    assert 0 <= bottom <= values.min() and values.max() < top < 1.03


def test_tar_axis_is_narrow_for_perfect_sets():
    (axes,) = roc_figure({"LFW": made_result(noise=0.01)}).axes
    assert axes.get_ylim()[0] == pytest.approx(0.95)


def test_figures_refuse_empty_input():
    with pytest.raises(ValueError, match="one result"):
        roc_figure({})
    with pytest.raises(ValueError, match="one epoch"):
        training_curves([])


def test_score_histogram_shows_both_kinds_and_the_threshold():
    result = made_result()
    figure = score_histogram(result)
    (axes,) = figure.axes
    (threshold,) = axes.get_lines()
    assert list(threshold.get_xdata()) == [result.threshold] * 2
    assert legend_texts(figure) == [
        "same person (200 pairs)",
        "different people (200 pairs)",
        f"threshold {result.threshold:.2f}",
    ]
    left, right = axes.get_xlim()
    assert left == 0 and right > result.distances.max()
    for patch, same in zip(axes.patches, (True, False), strict=True):
        corners = patch.get_xy()
        counts, edges = np.histogram(result.distances[result.issame == same], 60, (0, right))
        assert corners[:, 1].max() == pytest.approx(counts.max() / 200)
        assert edges[np.argmax(counts)] == pytest.approx(corners[np.argmax(corners[:, 1]), 0], abs=edges[1] * 1.01)


def test_score_histogram_marks_further_thresholds():
    (axes,) = score_histogram(made_result(), {"FAR 1e-1": 1.25, "FAR 1e-2": 1.0}).axes
    assert [list(line.get_xdata()) for line in axes.get_lines()[1:]] == [[1.25, 1.25], [1.0, 1.0]]
    assert [(text.get_text(), text.get_position()[0]) for text in axes.texts] == [("FAR 1e-1", 1.25), ("FAR 1e-2", 1.0)]


def test_page_figures_draw_what_they_are_given():
    results = {"LFW": made_result(), "LFW LR": made_result(noise=2.0)}
    folds = fold_figure(results).axes[0]
    for line, result in zip(folds.get_lines(), results.values(), strict=True):
        assert np.array_equal(line.get_xydata(), np.column_stack([np.arange(1, 11), result.fold_accuracies]))
    rejected = np.arange(10) / 10
    (line,) = reject_figure({"LFW": (rejected, 0.1 - rejected / 10)}).axes[0].get_lines()
    assert np.array_equal(line.get_xdata(), rejected[:6]) and line.get_ydata()[5] == 0.1 - 0.05
    (axes,) = resolution_figure({"LFW": {112: 0.9, 28: 0.8}, "LFW SR": {112: 0.9, 28: 0.85}}).axes
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [
        [[112, 0.9], [28, 0.8]],
        [[112, 0.9], [28, 0.85]],
    ]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["28", "112"]


def test_roc_figure_draws_the_bands_of_a_page():
    result = made_result()
    far = np.array([0.01, 0.1, 1])
    figure = roc_figure({"LFW": result}, {"LFW": (far, np.array([0.2, 0.5, 1]), np.array([0.6, 0.9, 1]))})
    (axes,) = figure.axes
    corners = axes.collections[0].get_paths()[0].vertices
    assert {0.2, 0.5, 0.6, 0.9, 1.0} <= set(corners[:, 1].tolist())
    assert axes.get_ylim()[0] <= 0.2 and legend_texts(figure) == ["LFW"]


def test_score_histogram_draws_equal_embeddings():
    issame = np.arange(20) % 2 == 0
    (axes,) = score_histogram(verify(np.ones((40, 1)), issame)).axes
    assert [patch.get_xy()[:, 1].max() for patch in axes.patches] == [pytest.approx(1)] * 2


def test_training_curves_show_loss_precision_and_accuracy():
    figure = training_curves(RECORDS)
    loss, precision, accuracy = figure.axes
    assert loss.get_title() == "Training loss"
    assert np.array_equal(loss.get_lines()[0].get_xydata(), [[1, 9.5], [2, 6.5], [3, 5.5]])
    assert np.array_equal(precision.get_lines()[0].get_xydata(), [[1, 1], [2, 11], [3, 21]])
    curves = {line.get_label(): line.get_xydata() for line in accuracy.get_lines()}
    np.testing.assert_allclose(curves["LFW"], [[1, 70], [2, 90], [3, 80]])
    np.testing.assert_allclose(curves["LFW LR"], [[2, 60], [3, 65]])  # a set that was added later
    assert legend_texts(figure) == ["", "LFW", "LFW LR", "last (%)", "80.00", "65.00", "best (%)", "90.00", "65.00"]


def test_training_curves_mark_falls_of_the_learning_rate():
    for axes in training_curves(RECORDS).axes:
        (mark,) = [line for line in axes.get_lines() if line.get_label().startswith("_child") and is_vertical(line)]
        assert list(mark.get_xdata()) == [2.5, 2.5]


def is_vertical(line) -> bool:
    return len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]


def test_epoch_ticks_are_integers_even_for_one_epoch():
    for records in (RECORDS[:1], RECORDS):
        figure = training_curves(records)
        figure.draw_without_rendering()
        for axes in figure.axes:
            left, right = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
            assert ticks == [record["epoch"] for record in records]


def test_training_curves_without_sets_have_no_accuracy_panel():
    figure = training_curves([{**record, "accuracy": {}} for record in RECORDS])
    assert [axes.get_title() for axes in figure.axes] == ["Training loss", "Training Prec@1 (%)"]
    assert not figure.legends


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b.PDF", b"%PDF"), ("c.svg", b"<?xml")])
def test_save_figure_writes_the_format_of_the_suffix(tmp_path, name, start):
    path = tmp_path / "new" / "folder" / name
    save_figure(training_curves(RECORDS), path)
    assert path.read_bytes().startswith(start)
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_save_figure_leaves_the_earlier_file_after_an_error(tmp_path, monkeypatch):
    path = tmp_path / "roc.png"
    path.write_bytes(b"earlier")

    def fail_midway(target, **options):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    figure = training_curves(RECORDS)
    monkeypatch.setattr(figure, "savefig", fail_midway)
    with pytest.raises(OSError, match="No space"):
        save_figure(figure, path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["roc.docx", "roc"])
def test_save_figure_refuses_an_unknown_suffix(tmp_path, name):
    with pytest.raises(UsageError, match=rf"{name}: .*Use \.png"):
        save_figure(training_curves(RECORDS), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_legend_is_next_to_the_axes_and_inside_the_picture():
    figure = roc_figure({f"CFP_FP LR x{index}": made_result(seed=index) for index in range(8)})
    figure.draw_without_rendering()
    box, inside = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert box.x0 > inside.x1 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_plot_imports_matplotlib_late_and_never_pyplot():
    program = """
import io, sys
import util.plot
assert "matplotlib" not in sys.modules
record = {"epoch": 1, "loss": 1.0, "prec1": 1.0, "lr": 0.1, "accuracy": {"LFW": 0.7}}
util.plot.training_curves([record]).savefig(io.BytesIO())
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert ended.returncode == 0
