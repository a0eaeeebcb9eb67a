"""Log of a run: progress on the console, and after each epoch Evaluation.txt, metrics.jsonl, TensorBoard and plots."""

import json
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from tqdm import tqdm

from util.checkpoint.run_dir import Run
from util.console import logger
from util.files import atomic_write
from util.plot import roc_figure, save_figure, score_histogram, training_curves
from util.training.report import Results, evaluation_lines, flatten_results

METRIC_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "prec1": "Prec@1 {:.2f}".format,
    "prec5": "Prec@5 {:.2f}".format,
    "l1": "L1 {:.4f}".format,
    "identity": "identity {:.4f}".format,
    "lr": "lr {:.3g}".format,
}


class Progress:
    """The progress of one epoch: a tqdm bar on a terminal, otherwise a line every tenth of the epoch."""

    def __init__(self, title: str, steps: int, batch_size: int, terminal: bool | None = None, start: int = 0):
        """Show `title`, for an epoch of `steps` batches of which `start` are done."""
        self._title = title
        self._steps = steps
        self._batch_size = batch_size
        self._done_before = start
        self._start = time.perf_counter()
        self._tenths = start * 10 // steps
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar = tqdm(total=steps, initial=start, desc=title, unit="batch", dynamic_ncols=True) if terminal else None

    @property
    def report_every(self) -> int:
        """Return the number of steps between reports. A report waits for the GPU, so it must not be too small."""
        return max(1, min(100, self._steps // 10))

    def report(self, done: int, averages: Mapping[str, float]) -> None:
        """Show the averages after `done` steps of the epoch."""
        rate = (done - self._done_before) * self._batch_size / (time.perf_counter() - self._start)
        text = f"{'  '.join(METRIC_FORMATS[name](value) for name, value in averages.items())}  {rate:.0f} images/s"
        tenths = done * 10 // self._steps
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif tenths > self._tenths:
            left = tqdm.format_interval((self._steps - done) * self._batch_size / rate)
            logger.info(f"{self._title}  {done}/{self._steps}  {text}  {left} left")
        self._tenths = tenths

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


class BaseLog(ABC):
    """The files of any run in log/RUN: metrics.jsonl and TensorBoard events.

    `epoch` and `step` are those of the checkpoint that a run resumes from, 0 for a new run. Later lines are removed.
    """

    def __init__(self, run: Run, epoch: int = 0, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _ignore_os_errors
        run.log.mkdir(parents=True, exist_ok=True)
        self._log = run.log
        self._metrics = run.log / "metrics.jsonl"
        _keep_lines(self._metrics, partial(_is_up_to, epoch))
        self._writer = SummaryWriter(str(run.log), purge_step=step + 1 if step else None)

    @abstractmethod
    def epoch(self, epochs: int, record: Mapping[str, Any], results: Any) -> None:
        """Add an epoch: its record to metrics.jsonl, and its results."""

    def _add_record(self, record: Mapping[str, Any]) -> None:
        with self._metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Write an (H, W, 3) RGB uint8 image to TensorBoard and to samples.png."""
        self._writer.add_image(tag, image, step, dataformats="HWC")
        _, png = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        with atomic_write(self._log / "samples.png") as partial:
            partial.write_bytes(png.tobytes())

    def close(self) -> None:
        self._writer.close()


class RunLog(BaseLog):
    """The log of recognition training: also Evaluation.txt in the run's checkpoint folder, and plots in log/RUN."""

    def __init__(self, run: Run, epoch: int = 0, step: int = 0):
        super().__init__(run, epoch, step)
        self._evaluation = run.checkpoints / "Evaluation.txt"
        _keep_lines(self._evaluation, lambda line: _epoch_of_evaluation(line) <= epoch)

    def samples(self, images: torch.Tensor) -> None:
        """Show training images as the network gets them, (B, H, W, 3) RGB uint8. Wrong colors are seen at once."""
        grid = image_grid(images[:32].numpy(), columns=8)
        self._add_image("train/samples", np.pad(grid, ((2, 2), (2, 2), (0, 0))), 0)

    def epoch(self, epochs: int, record: Mapping[str, Any], results: Results) -> None:
        """Add an epoch.

        Args:
            epochs: of the complete run.
            record: epoch, step, loss, prec1, prec5, lr and margin.
            results: {view: {set: result}}.
        """
        step = record["step"]
        lines = [f"Epoch {record['epoch']}/{epochs}, {line}" for line in evaluation_lines(results, " : ")]
        if lines:
            with self._evaluation.open("a") as file:
                file.writelines(f"{line}\n" for line in lines)
            logger.info("\n".join(lines))
        for view, sets in results.items():
            for name, result in sets.items():
                self._writer.add_scalar(f"{view}/{name}", result.accuracy, step)
        for name in ("loss", "prec1", "prec5", "lr", "margin"):
            self._writer.add_scalar(f"train/{name}", record[name], step)
        flat = flatten_results(results)
        self._add_record({**record, "accuracy": {name: result.accuracy for name, result in flat.items()}})

        if flat:
            figure = roc_figure(flat)
            save_figure(figure, self._log / "roc.png")
            self._writer.add_figure("ROC", figure, step)
        for name, result in flat.items():
            self._writer.add_figure(f"distances/{name}", score_histogram(result), step)
        save_figure(training_curves(read_metrics(self._metrics)), self._log / "curves.png")
        self._writer.flush()


def image_grid(images: np.ndarray, columns: int, gap: int = 2, color: int = 0) -> np.ndarray:
    """Arrange (N, H, W, 3) uint8 images in rows of `columns`, with gaps of `gap` pixels between them."""
    number, height, width, channels = images.shape
    columns = min(columns, number)
    rows = -(-number // columns)
    # Each cell is an image with a gap below and to the right of it; the outer gaps are cut off in the end.
    cells = np.full((rows * columns, height + gap, width + gap, channels), color, np.uint8)
    cells[:number, :height, :width] = images
    cells = cells.reshape((rows, columns, height + gap, width + gap, channels)).swapaxes(1, 2)
    return cells.reshape(rows * (height + gap), columns * (width + gap), channels)[:-gap, :-gap]


def _ignore_os_errors(failed: threading.ExceptHookArgs) -> None:
    """Print no traceback for TensorBoard's thread on a full disk: the main thread reports the same error."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _epoch_of_evaluation(line: str) -> int:
    match = re.match(r"Epoch (\d{1,9})/", line)
    return int(match[1]) if match else 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl that training_curves() can draw. Damaged lines are left out."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines():
        record = _record(line)
        if record and isinstance(accuracy := record.get("accuracy"), dict):
            numbers = [record.get("loss"), record.get("prec1"), record.get("lr"), *accuracy.values()]
            if all(isinstance(number, float) for number in numbers):
                records.append(record)
    return records


def _record(line: str) -> dict[str, Any] | None:
    """Return the record of an epoch in a line of metrics.jsonl, None for a line that is cut short or damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(epoch := record.get("epoch"), int) and epoch > 0:
        return record
    return None


def _is_up_to(epoch: int, line: str) -> bool:
    record = _record(line)
    return record is not None and record["epoch"] <= epoch


def _keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Remove the other lines of a file. Bytes that are not UTF-8 stay as they are."""
    if path.is_file():
        lines = [line for line in path.read_text("utf-8", "surrogateescape").splitlines(keepends=True) if keep(line)]
        with atomic_write(path) as partial:
            partial.write_text("".join(lines), "utf-8", "surrogateescape")
