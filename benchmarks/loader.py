"""Measure how fast one process makes training batches, compared with torchvision's ImageFolder and PIL transforms.

python -m benchmarks.loader
python -m benchmarks.loader --data data/imgs_casia --images 4000 --json loader.json

Both read the same image files and return batches of random crops with random flips, and sample every person equally
often. The baseline returns floats. Our loader returns uint8, and the conversion to floats is included in its time.
There is one process with one thread and no worker.
"""

from dataclasses import dataclass, replace
from functools import partial

from benchmarks import baseline
from benchmarks.sample_images import ImageFlags
from benchmarks.timing import Benchmark, benchmark_main, rate_row, time_alternately
from util.cli.parser import option
from util.cli.types import integer
from util.data.loader import Augmentation, TrainLoader, open_training_images
from util.errors import run_script
from util.face import FACE_SIZE
from util.transform import normalize

SCALE = 4  # low resolution is 112 // SCALE pixels


@dataclass(frozen=True, kw_only=True)
class Flags(ImageFlags):
    """The settings of this benchmark."""

    images: int = option(default=1024, type=integer(1), help="images per turn")
    batch_size: int = option(default=64, type=integer(1), help="images per batch")


def measure(options: Flags) -> Benchmark:
    """Measure images per second at full resolution, and with half of the samples at low resolution."""
    if options.quick:
        options = replace(options, images=16, batch_size=8)
    batch_size = min(options.batch_size, options.images)
    steps = options.images // batch_size
    rows = []
    with options.folder() as folder:
        for name, size in (("full resolution", None), (f"half of the samples at x{SCALE}", FACE_SIZE // SCALE)):
            augmentation = Augmentation(low_res_sizes=() if size is None else (size,))
            ours = TrainLoader(open_training_images(folder), batch_size, augmentation, steps=steps)
            theirs = baseline.training_loader(str(folder), batch_size, size, options.images)
            times = time_alternately(partial(_read_ours, ours), partial(_read_baseline, theirs), options.repeats)
            rows.append(rate_row(name, steps * batch_size, times))
    setting = f"{options.images} images in batches of {batch_size}, one process, {options.describe()}"
    return Benchmark("loader", setting, tuple(rows))


def _read_ours(loader: TrainLoader) -> None:
    for images, _ in loader.epoch(0):
        normalize(images)


def _read_baseline(loader: baseline.DataLoader) -> None:
    for _ in loader:
        pass


main = benchmark_main("loader", Flags, measure, __doc__)

if __name__ == "__main__":
    run_script(main)
