"""How fast one process makes training batches, beside torchvision's ImageFolder and PIL transforms.

python -m benchmarks.loader
python -m benchmarks.loader --data data/imgs_casia --images 4000 --json loader.json

Both read the same image files and give batches of random crops, flipped at random, every person as often. The
baseline's are floats; ours are uint8, which the device turns into floats, and that work is counted as ours here. One
process with one thread, no worker.
"""

from functools import partial
from pathlib import Path

from benchmarks import baseline
from benchmarks.sample_images import folder_of_people
from benchmarks.timing import Benchmark, at_least_one, finish, in_turns, parse, parser_for, rate_row, use_threads
from util.data.loader import Augmentation, TrainLoader, open_training_images
from util.errors import run_script
from util.transform import SIZE, normalize

SCALE = 4  # of the low resolution


def main(arguments: list[str]) -> None:
    parser = parser_for(__doc__, threads=1, repeats=7)
    parser.add_argument("--data", type=Path, help="a folder of people (data/demo's, or faces drawn for the moment)")
    parser.add_argument("--images", type=int, default=1024, help="of one turn (1024)")
    parser.add_argument("--batch_size", type=int, default=64, help="(64)")
    options = parse(parser, arguments)
    at_least_one(options, "images", "batch_size")
    images, batch_size = (16, 8) if options.quick else (options.images, min(options.batch_size, options.images))
    use_threads(options.threads)
    with folder_of_people(options.data, options.quick) as folder:
        finish(measure(folder, images, batch_size, options.threads, options.repeats), options.json)


def measure(folder: Path, images: int, batch_size: int, threads: int, repeats: int) -> Benchmark:
    """Images per second at full resolution, and with half of the samples at low resolution."""
    rows = []
    for name, size in (("full resolution", None), (f"half of the samples at x{SCALE}", SIZE // SCALE)):
        augmentation = Augmentation(low_res_sizes=() if size is None else (size,))
        ours = TrainLoader(open_training_images(folder), batch_size, augmentation, steps=images // batch_size)
        theirs = baseline.training_loader(str(folder), batch_size, size, images)
        times = in_turns(partial(_read_ours, ours), partial(_read, theirs), repeats)
        rows.append(rate_row(name, len(ours) * batch_size, times))
    setting = f"{images} images in batches of {batch_size}, one process, threads: {threads}, median of {repeats} turns"
    return Benchmark("loader", setting, tuple(rows))


def _read_ours(loader: TrainLoader) -> None:
    for images, _ in loader.epoch(0):
        normalize(images)


def _read(loader: baseline.DataLoader) -> None:
    for _ in loader:
        pass


if __name__ == "__main__":
    run_script(main)
