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
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baseline, timing
from model.backbone import build_backbone
from model.backbone.fold import fold_batch_norm
from model.head import ArcFace
from model.loss import FocalLoss
from model.names import BACKBONE_NAMES
from util.cli.parser import choice, flag, option
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


@dataclass(frozen=True, kw_only=True)
class Flags(timing.TimingFlags):
    """The settings of this benchmark."""

    threads: int = option(default=num_cpus(), **timing.THREADS)
    device: str = choice(("cpu", "cuda"), default="cpu")
    backbone: str = choice(BACKBONE_NAMES, default="IR_SE_50")
    batch_size: int | None = option(
        type=integer(1), help="images per batch", default_help="16 on the CPU, 128 on a GPU"
    )
    classes: int = option(default=1000, type=integer(1), help="classes of the head")
    steps: int | None = option(type=integer(1), help="batches per turn", default_help="1 on the CPU, 20 on a GPU")
    precision: str = choice(PRECISIONS, default="auto", help="number format of our backbone")
    compile: bool = flag(help="train our backbone with torch.compile, as train.py --compile")


def measure(options: Flags) -> timing.Benchmark | None:
    """Measure images per second of training and embedding, and on a GPU the fractions of its rate."""
    is_gpu = options.device == "cuda"
    if is_gpu and not torch.cuda.is_available():
        print("skipped: there is no CUDA device here; run it on a machine with one, or with --device cpu")
        return None
    batch_size = options.batch_size or (128 if is_gpu else 16)
    steps = options.steps or (20 if is_gpu else 1)
    if options.quick:
        options = replace(options, backbone="MobileFaceNet_025", classes=10)
        batch_size, steps = 2, 1
    device = select_devices([0] if is_gpu else [])[0]
    dtype = resolve_dtype(options.precision, device)
    wait = partial(torch.cuda.synchronize, device) if is_gpu else lambda: None

    # Batches in main memory: uint8 pixels for ours, floats in the default memory layout for the baseline.
    torch.manual_seed(0)
    batches = []
    for _ in range(steps):
        images = torch.randint(256, (batch_size, FACE_SIZE, FACE_SIZE, 3), dtype=torch.uint8)
        labels = torch.randint(options.classes, (batch_size,))
        batches.append((images.pin_memory(), labels.pin_memory()) if is_gpu else (images, labels))
    floats = [(normalize(images).contiguous(), labels) for images, labels in batches]
    if is_gpu:
        floats = [(images.pin_memory(), labels) for images, labels in floats]

    # Ours trains as train.py does.
    backbone = build_backbone(options.backbone, embedding_size=DIMENSIONS)
    module = prepare_module(backbone, [device], options.compile, dtype)
    head = ArcFace(DIMENSIONS, options.classes).to(device)
    optimizer = build_sgd([backbone, head], LR, momentum=MOMENTUM, weight_decay=DECAY, dtype=dtype)
    scaler = grad_scaler(dtype, device)
    step = TrainingStep(module, head, FocalLoss(), optimizer=optimizer, device=device, scaler=scaler)
    schedule = Schedule(steps, LR, warmup_epochs=0, stages=(), margin=0.5, margin_warmup_epochs=0)
    train_ours = partial(train_one_epoch, step, batches, schedule, epoch=0, report=lambda done, averages: None)

    plain_backbone = build_backbone(options.backbone, embedding_size=DIMENSIONS).to(device)
    plain_head = baseline.OneHotArcFace(DIMENSIONS, options.classes).to(device)
    sgd = torch.optim.SGD(parameter_groups([plain_backbone, plain_head], DECAY), lr=LR, momentum=MOMENTUM)
    plain = plain_backbone, plain_head, baseline.BatchFocalLoss()
    train_baseline = partial(baseline.train, *plain, optimizer=sgd, batches=floats, device=device)
    training = timing.time_alternately(train_ours, train_baseline, options.repeats, wait=wait)

    folded = prepare_module(fold_batch_norm(build_backbone(options.backbone)), [device], dtype=dtype)
    unfolded = build_backbone(options.backbone).to(device).eval()
    embedding = timing.time_alternately(
        lambda: [embed(folded, images.numpy(), device) for images, _ in batches],
        lambda: [baseline.embed(unfolded, images.to(device)) for images, _ in floats],
        options.repeats,
        wait=wait,
    )
    images_per_turn = batch_size * steps
    rows = (
        timing.rate_row("training step", images_per_turn, training),
        timing.rate_row("embedding", images_per_turn, embedding),
    )
    compiled = ", compiled for training" if options.compile else ""
    setting = (
        f"{options.backbone} on {options.device}, ours in {str(dtype).removeprefix('torch.')}{compiled}; "
        f"batches of {batch_size}, {steps} a turn, {options.classes} classes, {options.describe()}"
    )
    notes = rate_fractions(options.backbone, rows, device) if is_gpu else ()
    return timing.Benchmark(f"network-{options.device}", setting, rows, notes)


def rate_fractions(name: str, rows: tuple[timing.Row, timing.Row], device: torch.device) -> tuple[str, ...]:
    """Return notes with the fraction of the rate of a large bf16 matrix product that ours and the baseline reach."""
    rate = _matrix_rate(device)
    # Count the multiplications and additions of the forward pass of one image.
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_backbone(name).eval()(torch.empty(1, 3, FACE_SIZE, FACE_SIZE))
    work = counter.get_total_flops()
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


main = timing.benchmark_main("network", Flags, measure, __doc__)

if __name__ == "__main__":
    run_script(main)
