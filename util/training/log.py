"""What a run says: on the console while it trains, and in its files after each epoch."""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import cv2
import torch
from tqdm import tqdm

from util.checkpoint.run_dir import Run
from util.evaluate import average_accuracy
from util.files import atomic_write
from util.plot import roc_figure, save_figure, score_histogram, training_curves
from util.verification import VerificationResult

_FORMS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "prec1": "Prec@1 {:.2f}".format,
    "prec5": "Prec@5 {:.2f}".format,
    "l1": "L1 {:.4f}".format,
    "identity": "identity {:.4f}".format,
    "lr": "lr {:.3g}".format,
}


class Progress:
    """The progress of one epoch: a tqdm bar on a terminal, elsewhere a plain line every tenth of the epoch."""

    def __init__(self, title: str, steps: int, batch_size: int, terminal: bool | None = None):
        self._title, self._steps, self._batch_size = title, steps, batch_size
        self._started = time.perf_counter()
        self._tenths = 0
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar = tqdm(total=steps, desc=title, unit="batch", dynamic_ncols=True) if terminal else None

    @property
    def report_every(self) -> int:
        """Steps between reports: often enough to look alive, seldom enough not to hold up a GPU."""
        return max(1, min(100, self._steps // 10))

    def report(self, done: int, averages: Mapping[str, float]) -> None:
        """Shows the averages after `done` steps of the epoch."""
        rate = done * self._batch_size / (time.perf_counter() - self._started)
        text = f"{'  '.join(_FORMS[name](value) for name, value in averages.items())}  {rate:.0f} images/s"
        tenths = done * 10 // self._steps
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif tenths > self._tenths:
            left = tqdm.format_interval((self._steps - done) * self._batch_size / rate)
            print(f"{self._title}  {done}/{self._steps}  {text}  {left} left", flush=True)
        self._tenths = tenths

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


class RunLog:
    """A run's Evaluation.txt (in its checkpoint folder), and metrics.jsonl, TensorBoard events and plots (in log/).

    `step` is that of the checkpoint a run is resumed from, `epoch` its epoch, both 0 for a new run: what was logged
    beyond is cut.
    """

    def __init__(self, run: Run, epoch: int = 0, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        run.log.mkdir(parents=True, exist_ok=True)
        self._log, self._evaluation = run.log, run.checkpoints / "Evaluation.txt"
        self._metrics = run.log / "metrics.jsonl"
        _keep_lines(self._evaluation, lambda line: _epoch_of_evaluation(line) <= epoch)
        cut_metrics(self._metrics, epoch)
        self._writer = SummaryWriter(str(run.log), purge_step=step + 1 if step else None)

    def samples(self, images: torch.Tensor) -> None:
        """Shows training images as the network gets them, (B, H, W, 3) RGB uint8: wrong colours are seen at once."""
        from util.torchvision_import import make_grid

        grid = make_grid(images[:32].permute(0, 3, 1, 2), nrow=8)  # (3, H, W)
        self._writer.add_image("train/samples", grid, 0)
        write_png(self._log / "samples.png", grid)

    def epoch(
        self, epochs: int, record: Mapping[str, Any], results: Mapping[str, Mapping[str, VerificationResult]]
    ) -> None:
        """Adds an epoch. `record` has epoch, step, loss, prec1, prec5, lr …; `results` is {view: {set: result}}."""
        step = record["step"]
        lines = [f"Epoch {record['epoch']}/{epochs}, {line}\n" for line in evaluation_lines(results, " : ")]
        if lines:
            with self._evaluation.open("a") as file:
                file.writelines(lines)
            print("".join(lines), end="", flush=True)
        for view, sets in results.items():
            for name, result in sets.items():
                self._writer.add_scalar(f"{view}/{name}", result.accuracy, step)
        for name in ("loss", "prec1", "prec5", "lr", "margin"):
            self._writer.add_scalar(f"train/{name}", record[name], step)
        accuracies = {name: result.accuracy for name, result in flatten_results(results).items()}
        with self._metrics.open("a") as file:
            file.write(json.dumps({**record, "accuracy": accuracies}) + "\n")
        self._plot(results, step)
        self._writer.flush()

    def _plot(self, results: Mapping[str, Mapping[str, VerificationResult]], step: int) -> None:
        named = flatten_results(results)
        if named:
            figure = roc_figure(named)
            save_figure(figure, self._log / "roc.png")
            self._writer.add_figure("ROC", figure, step)
        for name, result in named.items():
            self._writer.add_figure(f"distances/{name}", score_histogram(result), step)
        records = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        save_figure(training_curves(records), self._log / "curves.png")

    def close(self) -> None:
        self._writer.close()


def flatten_results(results: Mapping[str, Mapping[str, VerificationResult]]) -> dict[str, VerificationResult]:
    """{view: {set: result}} -> {"LFW": …, "LFW LR": …}: the names of curves and table rows."""
    return {
        name if view == "HR" else f"{name} {view}": result
        for view, sets in results.items()
        for name, result in sets.items()
    }


def evaluation_lines(results: Mapping[str, Mapping[str, VerificationResult]], separator: str) -> list[str]:
    """A line a view, `Evaluation: LFW : 0.9912, …, Avg : 0.95`: the older toolkit's form.

    The separator is ` : ` in Evaluation.txt and ` Acc: ` on validation.py's console.
    """
    lines = []
    for view, sets in results.items():
        accuracies = {name: result.accuracy for name, result in sets.items()} | {"Avg": average_accuracy(sets)}
        text = ", ".join(f"{name}{separator}{value:.4f}" for name, value in accuracies.items())
        lines.append(f"Evaluation: {text}" if view == "HR" else f"Evaluation {view}: {text}")
    return lines


def write_png(path: Path, image: torch.Tensor) -> None:
    """Writes (3, H, W) RGB uint8, whole or not at all."""
    _, png = cv2.imencode(".png", cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR))
    with atomic_write(path) as partial:
        partial.write_bytes(png.tobytes())


def cut_metrics(path: Path, epoch: int) -> None:
    """Cuts the lines of a metrics.jsonl, if there is one, that come after the epoch."""
    _keep_lines(path, lambda line: _epoch_of_record(line) <= epoch)


def _epoch_of_evaluation(line: str) -> int:
    match = re.match(r"Epoch (\d+)/", line)
    return int(match[1]) if match else 0


def _epoch_of_record(line: str) -> float:
    """Of a line of metrics.jsonl; later than any for one that a kill cut short."""
    try:
        return json.loads(line)["epoch"]
    except ValueError:
        return math.inf


def _keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    if path.is_file():
        lines = [line for line in path.read_text().splitlines(keepends=True) if keep(line)]
        with atomic_write(path) as partial:
            partial.write_text("".join(lines))


def format_table(lines: list[list[str]]) -> str:
    """Rows of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def result_to_dict(result: VerificationResult) -> dict[str, Any]:
    """The numbers of a result that JSON can hold and that people quote."""
    return {
        "accuracy": result.accuracy,
        "accuracy_std": result.accuracy_std,
        "fold_accuracies": result.fold_accuracies.tolist(),
        "threshold": result.threshold,
        "auc": result.auc,
        "eer": result.eer,
        "tar_at_far": {"1e-3": result.tar_at_far(1e-3), "1e-2": result.tar_at_far(1e-2)},
        "pairs": result.pairs,
        "images_per_second": result.images_per_second,
    }
