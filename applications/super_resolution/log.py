"""Log of super-resolution training: a console line, metrics.jsonl, sample images and TensorBoard."""

from collections.abc import Mapping
from typing import Any

from applications.super_resolution.quality import Evaluation, Quality
from util.console import logger
from util.training.log import BaseLog


class SuperResolutionLog(BaseLog):
    """The files of a run in log/RUN."""

    def epoch(self, epochs: int, record: Mapping[str, Any], results: Evaluation) -> None:
        """Add an epoch.

        Args:
            epochs: of the complete run.
            record: epoch, step, loss, l1, lr and, with the identity term, identity.
            results: the evaluation after the epoch.
        """
        logger.info(f"Epoch {record['epoch']}/{epochs}, {quality_line(results.network, results.bicubic)}")
        gain = results.network.psnr_luma - results.bicubic.psnr_luma
        if record["epoch"] == epochs and gain < 0:
            logger.info(
                f"warning: after the last epoch the network is {-gain:.2f} dB worse than bicubic interpolation. "
                f"Train longer before you use it with --SR_eval."
            )
        step = record["step"]
        for name in record.keys() - {"epoch", "step"}:
            self._writer.add_scalar(f"train/{name}", record[name], step)
        qualities = {"SR": results.network.as_dict(), "bicubic": results.bicubic.as_dict()}
        for title, quality in qualities.items():
            for name, value in quality.items():
                self._writer.add_scalar(f"{title}/{name}", value, step)
        self._add_record({**record, **qualities})
        self._add_image("SR/samples", results.samples, step)
        self._writer.flush()


def quality_line(network: Quality, bicubic: Quality) -> str:
    """Return PSNR and SSIM of the network, with bicubic interpolation in brackets, and the gain in luma PSNR."""
    gain = network.psnr_luma - bicubic.psnr_luma
    return (
        f"Validation: luma PSNR {network.psnr_luma:.2f} dB (bicubic {bicubic.psnr_luma:.2f}, {gain:+.2f}), "
        f"SSIM {network.ssim_luma:.4f} ({bicubic.ssim_luma:.4f}); RGB PSNR {network.psnr_rgb:.2f} dB "
        f"({bicubic.psnr_rgb:.2f}), SSIM {network.ssim_rgb:.4f} ({bicubic.ssim_rgb:.4f})"
    )
