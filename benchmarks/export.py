"""Measure exported networks on the CPU, compared with torch: ONNX in float32 and in int8, by onnxruntime.

python -m benchmarks.export
python -m benchmarks.export --backbone IR_SE_50 --threads 2

Both get the same batches in float32 and return embeddings, without flip. torch runs the network as validation.py does,
with folded batch norms. The weights are random, which changes no time.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from applications.export.graph import Deployed, write_onnx
from applications.export.quantize import quantize
from benchmarks import timing
from model.backbone import build_backbone
from model.backbone.fold import fold_batch_norm
from model.names import BACKBONE_NAMES
from util.cli.parser import choice
from util.device import prepare_module
from util.errors import run_script
from util.face import FACE_SIZE
from util.onnx_network import OnnxNetwork

BATCHES = (1, 32)
_FACES = 16  # for the ranges of int8: how good they are changes no time


@dataclass(frozen=True, kw_only=True)
class Flags(timing.TimingFlags):
    """The settings of this benchmark."""

    backbone: str = choice(BACKBONE_NAMES, default="MobileFaceNet", help="network to measure")


def measure(options: Flags) -> timing.Benchmark:
    """Measure images per second of ONNX in float32 and int8, each compared with torch."""
    if options.quick:
        options = replace(options, backbone="MobileFaceNet_025")
    torch.manual_seed(0)
    network = build_backbone(options.backbone).eval()
    plain = prepare_module(fold_batch_norm(network), [torch.device("cpu")])
    with tempfile.TemporaryDirectory() as folder:
        floats, int8 = (Path(folder) / name for name in ("floats.onnx", "int8.onnx"))
        write_onnx(Deployed(network, "whole", preprocessing=False, flip=False), {}, floats)
        faces = torch.rand(_FACES, 3, FACE_SIZE, FACE_SIZE) * 2 - 1
        quantize(floats, faces, faces[:2], metadata={}, path=int8)
        programs = {"float32": OnnxNetwork(floats), "int8": OnnxNetwork(int8)}
        sizes = ", ".join(
            f"{name} {path.stat().st_size / 1e6:.1f} MB" for name, path in zip(programs, (floats, int8), strict=True)
        )
    rows = []
    for name, program in programs.items():
        for batch in BATCHES[: 1 if options.quick else None]:
            images = torch.rand(batch, 3, FACE_SIZE, FACE_SIZE) * 2 - 1
            ours, baseline = (partial(_run, module, images) for module in (program, plain))
            times = timing.time_alternately(ours, baseline, options.repeats)
            rows.append(timing.rate_row(f"ONNX in {name}, batches of {batch}", batch, times))
    setting = f"{options.backbone} on the CPU, {options.describe()}"
    return timing.Benchmark("export", setting, tuple(rows), (f"Files: {sizes}.",))


@torch.inference_mode()
def _run(module: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> None:
    module(images.contiguous(memory_format=torch.channels_last) if not isinstance(module, OnnxNetwork) else images)


main = timing.benchmark_main("export", Flags, measure, __doc__)

if __name__ == "__main__":
    run_script(main)
