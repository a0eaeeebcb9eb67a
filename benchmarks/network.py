"""How fast a backbone is trained and gives embeddings, on the CPU or a GPU, beside an eager float32 loop.

python -m benchmarks.network
python -m benchmarks.network --device cuda
python -m benchmarks.network --device cuda --backbone IR_50 --batch_size 256 --compile --json network.json

A training step is forward, backward and update with ArcFace and focal loss on images that are already decoded, through
util.training.engine; an embedding takes two passes, of an image and its mirror image. Ours computes in --precision, by
default in what train.py takes: bf16 on a GPU that has it, and fp32 elsewhere. On a GPU the rate of a large bf16 matrix
product is measured beside them, and the share of it that training and embedding reach, counted in the multiplications
and additions of the backbone's convolutions and linear layers.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baseline
from benchmarks.timing import Benchmark, Row, TimingFlags, finish, in_turns, rate_row, use_threads
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
from util.training.engine import TrainingStep, train_one_epoch
from util.training.optim import Schedule, build_sgd, parameter_groups
from util.transform import SIZE, normalize

DIMENSIONS, LR, MOMENTUM, DECAY = 512, 0.01, 0.9, 5e-4
MATRIX = 8192  # of the product that says how fast the GPU can be
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
    finish(measure(options), options.json)


def measure(options: Flags) -> Benchmark:
    """Images per second of training and of embedding, with the shares of the GPU's rate where there is a GPU."""
    device = select_devices([] if options.device == "cpu" else [0])[0]
    images = options.batch_size * options.steps
    batches = _batches(options.batch_size, options.steps, options.classes, pinned=device.type == "cuda")
    dtype = resolve_dtype(options.precision, device)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    training = in_turns(
        _train_ours(options, device, dtype, batches), _train_baseline(options, device, batches), options.repeats, wait
    )
    embedding = in_turns(
        _embed_ours(options.backbone, device, dtype, batches),
        _embed_baseline(options.backbone, device, batches),
        options.repeats,
        wait,
    )
    rows = (rate_row("training step", images, training), rate_row("embedding", images, embedding))
    setting = (
        f"{options.backbone} on {options.device}, ours in {str(dtype).removeprefix('torch.')}"
        f"{', compiled for training' if options.compile else ''}; batches of {options.batch_size}, {options.steps} a "
        f"turn, {options.classes} classes, threads: {options.threads}, median of {options.repeats} turns"
    )
    notes = shares(options.backbone, rows, device) if device.type == "cuda" else ()
    return Benchmark(f"network-{options.device}", setting, rows, notes)


def _batches(batch_size: int, steps: int, classes: int, pinned: bool) -> Batches:
    """Random pixels, (B, 112, 112, 3) uint8 and (B,) int64, in the main memory."""
    torch.manual_seed(0)
    batches = [
        (torch.randint(256, (batch_size, SIZE, SIZE, 3), dtype=torch.uint8), torch.randint(classes, (batch_size,)))
        for _ in range(steps)
    ]
    return [(images.pin_memory(), labels.pin_memory()) for images, labels in batches] if pinned else batches


def _train_ours(options: Flags, device: torch.device, dtype: torch.dtype, batches: Batches) -> Callable[[], object]:
    """One call trains on all batches, as train.py does it."""
    backbone = build_backbone(options.backbone, embedding_size=DIMENSIONS)
    runner = prepare_module(backbone, [device], options.compile, dtype)
    head = ArcFace(DIMENSIONS, options.classes).to(device)
    optimizer = build_sgd([backbone, head], LR, MOMENTUM, DECAY, dtype)
    step = TrainingStep(runner, head, FocalLoss(), optimizer, device, scaler=grad_scaler(dtype, device))
    schedule = Schedule(len(batches), LR, 0, (), 0.5, 0)
    return partial(train_one_epoch, step, batches, schedule, 0, lambda done, averages: None)


def _train_baseline(options: Flags, device: torch.device, batches: Batches) -> Callable[[], object]:
    """The same batches, as its loader would give them: floats, in PyTorch's own layout of memory."""
    backbone = build_backbone(options.backbone, embedding_size=DIMENSIONS).to(device)
    head = baseline.OneHotArcFace(DIMENSIONS, options.classes).to(device)
    groups = parameter_groups([backbone, head], DECAY)
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    floats = [(_floats(images), labels) for images, labels in batches]
    return partial(baseline.train, backbone, head, baseline.BatchFocalLoss(), optimizer, floats, device)


def _embed_ours(name: str, device: torch.device, dtype: torch.dtype, batches: Batches) -> Callable[[], object]:
    backbone = prepare_module(fold_batch_norm(build_backbone(name)), [device], dtype=dtype)
    arrays = [images.numpy() for images, _ in batches]
    return lambda: [embed(backbone, images, device) for images in arrays]


def _embed_baseline(name: str, device: torch.device, batches: Batches) -> Callable[[], object]:
    backbone = build_backbone(name).to(device).eval()
    floats = [_floats(images) for images, _ in batches]
    return lambda: [baseline.embed(backbone, images.to(device)) for images in floats]


def _floats(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, pinned where the pixels were."""
    floats = normalize(images).contiguous()
    return floats.pin_memory() if images.is_pinned() else floats


def shares(name: str, rows: tuple[Row, Row], device: torch.device) -> tuple[str, ...]:
    """What part of the rate of a large bf16 matrix product the backbone reaches, of ours and of the baseline."""
    rate = _matrix_rate(device)
    work = _operations(name)
    lines = [f"A bf16 matrix product of {MATRIX}x{MATRIX} runs at {rate / 1e12:.0f} TFLOPS; shares of that rate:"]
    # A backward pass is two products for each one of the forward pass; an embedding is two forward passes.
    for row, passes in zip(rows, (3, 2), strict=True):
        ours, theirs = (speed * work * passes / rate for speed in (row.ours, row.baseline))
        lines.append(f"- {row.name}: ours {ours:.1%}, baseline {theirs:.1%}")
    return tuple(lines)


def _matrix_rate(device: torch.device) -> float:
    """Operations per second, the median of ten, by the GPU's own clock."""
    first, second = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(first)
    seconds = []
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(first, second, out=out)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * MATRIX**3 / statistics.median(seconds[3:])


def _operations(name: str) -> int:
    """Multiplications and additions of one image's forward pass."""
    with torch.device("meta"):
        backbone, image = build_backbone(name).eval(), torch.empty(1, 3, SIZE, SIZE)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(image)
    return counter.get_total_flops()


if __name__ == "__main__":
    run_script(main)
