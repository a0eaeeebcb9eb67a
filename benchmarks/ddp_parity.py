"""Compare the losses of one process with the losses of DDP over a few steps from the same start.

python -m benchmarks.ddp_parity --data data/imgs --processes 2 --batch 16 --steps 20

Every step sees the same pixels. With frozen batch norm, the losses differ by rounding only. With trained batch norm,
each process normalizes its own part of the batch, as GPUs do under DataParallel. One process that accumulates as many
micro-batches does the same. It is also compared with one process that does not, for several seeds: their differences
show what is noise.
"""

import gc
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
    processes: int = option(default=2, type=integer(2), help="processes that split each batch")
    batch: int = option(default=16, type=integer(1), help="images per batch, over all processes")
    steps: int = option(default=20, type=integer(2), help="training steps")
    seeds: int = option(default=3, type=integer(2), help="seeds, with batch norm trained")
    double: bool = flag(help="compute in float64, which shows what is rounding")
    lr: float = option(default=0.001, type=number("a number", lambda value: True), help="learning rate")
    backbone: str = choice(BACKBONE_NAMES, default="MobileFaceNet_025")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.ddp_parity", arguments, description=__doc__)
    if options.batch % options.processes:
        raise UsageError(f"--batch={options.batch}: does not divide by --processes={options.processes}")
    open_training_images(options.data)
    print_losses("batch norm frozen", losses(1, True, options), losses(options.processes, True, options))
    accumulated = losses(1, False, options, accumulate=options.processes)
    print_losses("batch norm trained, micro-batches", accumulated, losses(options.processes, False, options))

    print("batch norm trained: mean loss of the second half of the steps")
    half = options.steps // 2
    rows = []
    for seed in range(options.seeds):
        single = losses(1, False, options, seed)[half:].mean()
        ddp = losses(options.processes, False, options, seed)[half:].mean()
        print(f"  seed {seed}  1 process {single:.4f}  {options.processes} processes {ddp:.4f}")
        rows.append(torch.stack([single, ddp, ddp - single]))
    single, ddp, change = torch.stack(rows).mean(0)
    single_std, ddp_std, change_std = torch.stack(rows).std(0)
    print(f"  mean +- deviation of a seed: {single:.4f} +- {single_std:.4f}, {ddp:.4f} +- {ddp_std:.4f}")
    print(f"  difference of the same seed: {change:+.4f} +- {change_std / options.seeds**0.5:.4f} (standard error)")


def print_losses(title: str, single: torch.Tensor, ddp: torch.Tensor) -> None:
    """Print the losses of one process and of DDP, which differ by rounding only."""
    print(f"{title}: largest relative difference {((ddp - single).abs() / single.abs()).max():.1e}")
    for step in range(0, len(single), max(1, len(single) // 5)):
        print(f"  step {step + 1:3}  1 process {single[step]:.6f}  DDP {ddp[step]:.6f}")


def losses(world_size: int, frozen: bool, options: Flags, seed: int = 0, accumulate: int = 1) -> torch.Tensor:
    """Train from the same start and return the mean loss of all samples in each step, (steps,).

    With `frozen`, batch norm uses its running statistics. `accumulate` is the number of micro-batches of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, frozen, options, seed, accumulate, folder)
        mp.start_processes(_train, arguments, nprocs=world_size, start_method="forkserver")
        return torch.load(Path(folder) / "losses.pt", weights_only=True)


def _train(rank: int, world_size: int, frozen: bool, options: Flags, seed: int, accumulate: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    images = open_training_images(options.data)
    classes = len(images.classes)
    device = torch.device("cpu")
    loss = build_loss("focal")
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64 if options.double else torch.float32)
    backbone = build_backbone(options.backbone)
    head = build_head("ArcFace", 512, classes, s=32.0, rows=shard_range(classes, rank, world_size))
    optimizer = build_sgd([backbone, head], options.lr, momentum=0.9, weight_decay=5e-4)
    for layer in backbone.modules():
        if frozen and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    if options.double:
        backbone.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    module = prepare_module(backbone, [device])
    loss_fn = None
    if world_size > 1:
        module = wrap_ddp(module, device)
        loss_fn = PartialFC(head, loss)
    step = TrainingStep(module, head, loss, optimizer=optimizer, device=device, accumulate=accumulate, loss_fn=loss_fn)
    batch_size = options.batch // world_size
    loader = TrainLoader(
        images, batch_size, Augmentation(), seed=seed, steps=options.steps, rank=rank, world_size=world_size
    )
    found = torch.tensor([step(*batch)[0][0].item() for batch in loader.epoch(0)])
    if rank == 0:
        torch.save(found, Path(folder) / "losses.pt")
    if world_size > 1:
        # DDP would end the last reference to the group while it holds the lock that gloo's threads wait for.
        del module, step, loss_fn
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
