"""What a run of super resolution says after each epoch: a line, metrics.jsonl, sample images, TensorBoard."""

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from applications.super_resolution.quality import Quality
from util.checkpoint.run_dir import Run
from util.training.log import cut_metrics, write_png


class RunLog:
    """The files in log/RUN/. What was logged beyond the epoch and step of a resumed run is cut."""

    def __init__(self, run: Run, epoch: int = 0, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _report_but_full_disks
        run.log.mkdir(parents=True, exist_ok=True)
        self._folder, self._metrics = run.log, run.log / "metrics.jsonl"
        cut_metrics(self._metrics, epoch)
        self._writer = SummaryWriter(str(run.log), purge_step=step + 1 if step else None)

    def epoch(
        self, epochs: int, record: Mapping[str, Any], network: Quality, bicubic: Quality, samples: np.ndarray
    ) -> None:
        """Adds an epoch. `record` has epoch, step, loss, lr ...; `samples` is (H, W, 3) RGB uint8."""
        print(f"Epoch {record['epoch']}/{epochs}, {quality_line(network, bicubic)}", flush=True)
        step = record["step"]
        for name in record.keys() - {"epoch", "step"}:
            self._writer.add_scalar(f"train/{name}", record[name], step)
        for title, quality in (("SR", network), ("bicubic", bicubic)):
            for name, value in quality.as_dict().items():
                self._writer.add_scalar(f"{title}/{name}", value, step)
        with self._metrics.open("a") as file:
            file.write(json.dumps({**record, "SR": network.as_dict(), "bicubic": bicubic.as_dict()}) + "\n")
        grid = torch.from_numpy(np.ascontiguousarray(samples.transpose(2, 0, 1)))
        self._writer.add_image("SR/samples", grid, step)
        write_png(self._folder / "samples.png", grid)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _report_but_full_disks(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its error over to the main one, which says it in a line: it need not say it too."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def quality_line(network: Quality, bicubic: Quality) -> str:
    """The figures of the network, those of bicubic interpolation in brackets, and the gain in luma PSNR."""
    return (
        f"Validation: luma PSNR {network.psnr_luma:.2f} dB (bicubic {bicubic.psnr_luma:.2f}, "
        f"{network.psnr_luma - bicubic.psnr_luma:+.2f}), SSIM {network.ssim_luma:.4f} ({bicubic.ssim_luma:.4f}); "
        f"RGB PSNR {network.psnr_rgb:.2f} dB ({bicubic.psnr_rgb:.2f}), SSIM {network.ssim_rgb:.4f} "
        f"({bicubic.ssim_rgb:.4f})"
    )
