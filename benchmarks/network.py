"""Measure training and embedding with a backbone on the CPU or a GPU, compared with an eager float32 loop.

python -m benchmarks.network
python -m benchmarks.network --device cuda
python -m benchmarks.network --device cuda --backbone IR_50 --batch_size 256 --compile --json network.json

A training step is forward, backward and update with ArcFace and focal loss on decoded images in util.training.engine.
An embedding takes two passes: an image and its mirror image. Our code computes in --precision, by default the same as
train.py: bf16 on a GPU that has it, and fp32 elsewhere. On a GPU, the rate of a large bf16 matrix product is measured
too. The notes tell the fraction of this rate that training and embedding reach, counting the multiplications and
additions of the convolutions and linear layers of the backbone.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baseline
from benchmarks.timing import Benchmark, Row, TimingFlags, rate_row, report, time_alternately, use_threads
from model.backbone import build_backbone
from model.backbone.fold import fold_batch_norm
from model.head import ArcFace
from model.loss import FocalLoss
from model.names import BACKBONE_NAMES
from util.cli.parser import choice, flag, option, parse
from util.cli.types import PRECISIONS, integer
from util.device import grad_scaler, num_cpus, prepare_module, resolve_dtype, select_devices
from util.errors import run_script
from util.evaluate import embed
from util.face import FACE_SIZE
from util.training.engine import TrainingStep, train_one_epoch
from util.training.optim import Schedule, build_sgd, parameter_groups
from util.transform import normalize

DIMENSIONS = 512
LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
MATRIX = 8192  # rows and columns of the matrix product that measures the rate of the GPU
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Flags(TimingFlags):
    """The settings of this benchmark."""

    threads: int = option(
        default=num_cpus(), type=integer(1, num_cpus()), metavar="N", help="threads of each operation"
    )
    device: str = choice(("cpu", "cuda"), default="cpu")
    backbone: str = choice(BACKBONE_NAMES, default="IR_SE_50")
    batch_size: int | None = option(
        type=integer(1), metavar="N", help="images per batch", default_help="16 on the CPU, 128 on a GPU"
    )
    classes: int = option(default=1000, type=integer(1), metavar="N", help="classes of the head")
    steps: int | None = option(
        type=integer(1), metavar="N", help="batches per turn", default_help="1 on the CPU, 20 on a GPU"
    )
    precision: str = choice(PRECISIONS, default="auto", help="number format of our backbone")
    compile: bool = flag(help="train our backbone with torch.compile, as train.py --compile")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.network", arguments, description=__doc__, check=TimingFlags.check)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device here; run it on a machine with one, or with --device cpu")
        return
    if options.quick:
        options = replace(options, backbone="MobileFaceNet_025", batch_size=2, steps=1, classes=10)
    elif options.device == "cpu":
        options = replace(options, batch_size=options.batch_size or 16, steps=options.steps or 1)
    else:
        options = replace(options, batch_size=options.batch_size or 128, steps=options.steps or 20)
    use_threads(options.threads)
    report(measure(options), options.json)


def measure(options: Flags) -> Benchmark:
    """Measure images per second of training and embedding, and on a GPU the fractions of its rate."""
    device = select_devices([] if options.device == "cpu" else [0])[0]
    images = options.batch_size * options.steps
    batches = _batches(options.batch_size, options.steps, options.classes, pinned=device.type == "cuda")
    dtype = resolve_dtype(options.precision, device)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    train_ours = _train_ours(options, device, dtype, batches)
    train_baseline = _train_baseline(options, device, batches)
    training = time_alternately(train_ours, train_baseline, options.repeats, wait=wait)
    embed_ours = _embed_ours(options.backbone, device, dtype, batches)
    embed_baseline = _embed_baseline(options.backbone, device, batches)
    embedding = time_alternately(embed_ours, embed_baseline, options.repeats, wait=wait)
    rows = (rate_row("training step", images, training), rate_row("embedding", images, embedding))
    compiled = ", compiled for training" if options.compile else ""
    setting = (
        f"{options.backbone} on {options.device}, ours in {str(dtype).removeprefix('torch.')}{compiled}; "
        f"batches of {options.batch_size}, {options.steps} a turn, {options.classes} classes, "
        f"threads: {options.threads}, median of {options.repeats} turns"
    )
    notes = rate_fractions(options.backbone, rows, device) if device.type == "cuda" else ()
    return Benchmark(f"network-{options.device}", setting, rows, notes)


def _batches(batch_size: int, steps: int, classes: int, pinned: bool) -> Batches:
    """Return batches of random pixels, (B, 112, 112, 3) uint8, and labels, (B,) int64, in main memory."""
    torch.manual_seed(0)
    batches = []
    for _ in range(steps):
        images = torch.randint(256, (batch_size, FACE_SIZE, FACE_SIZE, 3), dtype=torch.uint8)
        labels = torch.randint(classes, (batch_size,))
        batches.append((images.pin_memory(), labels.pin_memory()) if pinned else (images, labels))
    return batches


def _train_ours(options: Flags, device: torch.device, dtype: torch.dtype, batches: Batches) -> Callable[[], object]:
    """Return a function that trains on all batches as train.py does."""
    backbone = build_backbone(options.backbone, embedding_size=DIMENSIONS)
    module = prepare_module(backbone, [device], options.compile, dtype)
    head = ArcFace(DIMENSIONS, options.classes).to(device)
    optimizer = build_sgd([backbone, head], LR, momentum=MOMENTUM, weight_decay=DECAY, dtype=dtype)
    scaler = grad_scaler(dtype, device)
    step = TrainingStep(module, head, FocalLoss(), optimizer=optimizer, device=device, scaler=scaler)
    schedule = Schedule(len(batches), LR, warmup_epochs=0, stages=(), margin=0.5, margin_warmup_epochs=0)
    return lambda: train_one_epoch(step, batches, schedule, epoch=0, report=lambda done, averages: None)


def _train_baseline(options: Flags, device: torch.device, batches: Batches) -> Callable[[], object]:
    """Return a function that trains on the same batches as floats in the default memory layout, like its loader."""
    backbone = build_backbone(options.backbone, embedding_size=DIMENSIONS).to(device)
    head = baseline.OneHotArcFace(DIMENSIONS, options.classes).to(device)
    groups = parameter_groups([backbone, head], DECAY)
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    floats = [(_floats(images), labels) for images, labels in batches]
    criterion = baseline.BatchFocalLoss()
    return lambda: baseline.train(backbone, head, criterion, optimizer=optimizer, batches=floats, device=device)


def _embed_ours(name: str, device: torch.device, dtype: torch.dtype, batches: Batches) -> Callable[[], object]:
    backbone = prepare_module(fold_batch_norm(build_backbone(name)), [device], dtype=dtype)
    arrays = [images.numpy() for images, _ in batches]
    return lambda: [embed(backbone, images, device) for images in arrays]


def _embed_baseline(name: str, device: torch.device, batches: Batches) -> Callable[[], object]:
    backbone = build_backbone(name).to(device).eval()
    floats = [_floats(images) for images, _ in batches]
    return lambda: [baseline.embed(backbone, images.to(device)) for images in floats]


def _floats(images: torch.Tensor) -> torch.Tensor:
    """Turn (B, H, W, 3) uint8 into (B, 3, H, W) float32, pinned if the pixels are."""
    floats = normalize(images).contiguous()
    return floats.pin_memory() if images.is_pinned() else floats


def rate_fractions(name: str, rows: tuple[Row, Row], device: torch.device) -> tuple[str, ...]:
    """Return notes with the fraction of the rate of a large bf16 matrix product that ours and the baseline reach."""
    rate = _matrix_rate(device)
    work = _operations(name)
    lines = [f"A bf16 matrix product of {MATRIX}x{MATRIX} runs at {rate / 1e12:.0f} TFLOPS; fractions of this rate:"]
    # A backward pass has two products for each product of the forward pass; an embedding is two forward passes.
    for row, passes in zip(rows, (3, 2), strict=True):
        ours, theirs = (speed * work * passes / rate for speed in (row.ours, row.baseline))
        lines.append(f"- {row.name}: ours {ours:.1%}, baseline {theirs:.1%}")
    return tuple(lines)


def _matrix_rate(device: torch.device) -> float:
    """Return the operations per second of a matrix product, as the median of ten, measured with events of the GPU."""
    first = torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    second = torch.randn_like(first)
    out = torch.empty_like(first)
    seconds = []
    for _ in range(13):  # three to warm up
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.mm(first, second, out=out)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * MATRIX**3 / statistics.median(seconds[3:])


def _operations(name: str) -> int:
    """Count the multiplications and additions of the forward pass of one image."""
    with torch.device("meta"):
        backbone = build_backbone(name).eval()
        image = torch.empty(1, 3, FACE_SIZE, FACE_SIZE)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(image)
    return counter.get_total_flops()


if __name__ == "__main__":
    run_script(main)
