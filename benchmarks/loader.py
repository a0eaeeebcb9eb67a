"""Measure how fast one process makes training batches, compared with torchvision's ImageFolder and PIL transforms.

python -m benchmarks.loader
python -m benchmarks.loader --data data/imgs_casia --images 4000 --json loader.json

Both read the same image files and return batches of random crops with random flips, and sample every person equally
often. The baseline returns floats. Our loader returns uint8, and the conversion to floats is included in its time.
There is one process with one thread and no worker.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import baseline
from benchmarks.sample_images import folder_of_people
from benchmarks.timing import Benchmark, TimingFlags, rate_row, report, time_alternately, use_threads
from util.cli.parser import option, parse
from util.cli.types import integer, to_file
from util.data.loader import Augmentation, TrainLoader, open_training_images
from util.errors import run_script
from util.face import FACE_SIZE
from util.transform import normalize

SCALE = 4  # low resolution is 112 // SCALE pixels


@dataclass(frozen=True, kw_only=True)
class Flags(TimingFlags):
    """The settings of this benchmark."""

    repeats: int = option(default=7, type=integer(1), metavar="N", help="measured turns, after one of warming up")
    data: Path | None = option(
        type=to_file,
        metavar="DIR",
        help="images, one folder per identity",
        default_help="data/demo, or faces drawn now",
    )
    images: int = option(default=1024, type=integer(1), metavar="N", help="images per turn")
    batch_size: int = option(default=64, type=integer(1), metavar="N", help="images per batch")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.loader", arguments, description=__doc__, check=TimingFlags.check)
    images, batch_size = (16, 8) if options.quick else (options.images, min(options.batch_size, options.images))
    use_threads(options.threads)
    with folder_of_people(options.data, options.quick) as folder:
        benchmark = measure(folder, images, batch_size, threads=options.threads, repeats=options.repeats)
    report(benchmark, options.json)


def measure(folder: Path, images: int, batch_size: int, threads: int, repeats: int) -> Benchmark:
    """Measure images per second at full resolution, and with half of the samples at low resolution."""
    rows = []
    for name, size in (("full resolution", None), (f"half of the samples at x{SCALE}", FACE_SIZE // SCALE)):
        augmentation = Augmentation(low_res_sizes=() if size is None else (size,))
        ours = TrainLoader(open_training_images(folder), batch_size, augmentation, steps=images // batch_size)
        theirs = baseline.training_loader(str(folder), batch_size, size, images)
        times = time_alternately(partial(_read_ours, ours), partial(_read_baseline, theirs), repeats)
        rows.append(rate_row(name, len(ours) * batch_size, times))
    setting = f"{images} images in batches of {batch_size}, one process, threads: {threads}, median of {repeats} turns"
    return Benchmark("loader", setting, tuple(rows))


def _read_ours(loader: TrainLoader) -> None:
    for images, _ in loader.epoch(0):
        normalize(images)


def _read_baseline(loader: baseline.DataLoader) -> None:
    for _ in loader:
        pass


if __name__ == "__main__":
    run_script(main)
