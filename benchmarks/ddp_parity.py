"""Compares the losses of one process with those of two that share each batch, over a few steps from the same start.

python -m benchmarks.ddp_parity --data data/imgs --processes 2 --batch 16 --steps 20

All see the same pixels in the same step. With batch norm frozen the losses differ by rounding alone. Else each process
normalises its own part of the batch, as GPUs do under DataParallel. One process that works through the batch in as many
parts does the same, and beside one that does not, runs from several seeds show what is noise.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from model.backbone import build_backbone
from model.head import PartialFC, build_head, shard_range
from model.loss import build_loss
from model.names import BACKBONE_NAMES
from util.cli.parser import Settings, choice, flag, option, parse
from util.cli.types import integer, number, to_path
from util.data.loader import Augmentation, TrainLoader, open_training_images
from util.device import prepare_module, wrap_ddp
from util.errors import UsageError, run_script
from util.training.engine import TrainingStep
from util.training.optim import build_sgd


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of this benchmark."""

    data: str = option(type=to_path, metavar="PATH", help="one folder per identity, or a train.rec", required=True)
    processes: int = option(default=2, type=integer(2), metavar="N", help="processes of torchrun")
    batch: int = option(default=16, type=integer(1), metavar="N", help="images per batch, over all processes")
    steps: int = option(default=20, type=integer(2), metavar="N", help="training steps")
    seeds: int = option(default=3, type=integer(2), metavar="N", help="seeds, with batch norm trained")
    double: bool = flag(help="compute in float64, which shows what is rounding")
    lr: float = option(default=0.001, type=number("a number", lambda value: True), metavar="X", help="learning rate")
    backbone: str = choice(BACKBONE_NAMES, default="MobileFaceNet_025")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.ddp_parity", arguments, description=__doc__)
    if options.batch % options.processes:
        raise UsageError(f"--batch={options.batch}: does not divide by --processes={options.processes}")
    open_training_images(options.data)
    print_both("batch norm frozen", losses(1, True, options), losses(options.processes, True, options))
    parted = losses(1, False, options, parts=options.processes)
    print_both("batch norm trained, in parts", parted, losses(options.processes, False, options))
    compare_trained(options)


def print_both(title: str, one: torch.Tensor, several: torch.Tensor) -> None:
    """Prints the losses of one process and of several, step by step, where they differ by rounding alone."""
    print(f"{title}: largest relative difference {((several - one).abs() / one.abs()).max():.1e}")
    for step in range(0, len(one), max(1, len(one) // 5)):
        print(f"  step {step + 1:3}  1 process {one[step]:.6f}  several {several[step]:.6f}")


def compare_trained(options: Flags) -> None:
    """Prints the mean loss of the second half of the steps for each seed, and what is noise between seeds."""
    print("batch norm trained: mean loss of the second half of the steps")
    half = options.steps // 2
    rows = []
    for seed in range(options.seeds):
        one, several = (losses(ranks, False, options, seed)[half:].mean() for ranks in (1, options.processes))
        print(f"  seed {seed}  1 process {one:.4f}  {options.processes} processes {several:.4f}")
        rows.append(torch.stack([one, several, several - one]))
    (one, several, change), (of_one, of_several, of_change) = torch.stack(rows).mean(0), torch.stack(rows).std(0)
    print(f"  mean +- deviation of a seed: {one:.4f} +- {of_one:.4f}, {several:.4f} +- {of_several:.4f}")
    print(f"  difference of the same seed: {change:+.4f} +- {of_change / options.seeds**0.5:.4f} (standard error)")


def losses(ranks: int, frozen: bool, options: Flags, seed: int = 0, parts: int = 1) -> torch.Tensor:
    """(steps,) the loss of each step, of all samples; each process works through its share in so many parts."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_train, (ranks, frozen, options, seed, parts, folder), nprocs=ranks)
        return torch.load(Path(folder) / "losses.pt", weights_only=True)


def _train(rank: int, ranks: int, frozen: bool, options: Flags, seed: int, parts: int, folder: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    images = open_training_images(options.data)
    device, classes, loss = torch.device("cpu"), len(images.classes), build_loss("focal")
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64 if options.double else torch.float32)
    backbone = build_backbone(options.backbone)
    head = build_head("ArcFace", 512, classes, s=32.0, rows=shard_range(classes, rank, ranks))
    optimizer = build_sgd([backbone, head], options.lr, momentum=0.9, weight_decay=5e-4)
    for layer in backbone.modules():
        if frozen and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    if options.double:
        backbone.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    runner = prepare_module(backbone, [device])
    runner = wrap_ddp(runner, device) if ranks > 1 else runner
    loss_fn = PartialFC(head, loss) if ranks > 1 else None
    step = TrainingStep(runner, head, loss, optimizer, device, parts, loss_fn=loss_fn)
    each = options.batch // ranks
    loader = TrainLoader(images, each, Augmentation(), seed=seed, steps=options.steps, rank=rank, world_size=ranks)
    found = torch.tensor([step(*batch)[0].item() for batch in loader.epoch(0)])
    if rank == 0:
        torch.save(found, Path(folder) / "losses.pt")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
