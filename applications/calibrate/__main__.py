"""Measure how alike a network finds different people. Thresholds and false accept rates follow from it.

    python -m applications.calibrate --network Backbone_Best.pth --data data/imgs --out calibration.json
    python -m applications.calibrate --network Backbone_Best.pth --data embeddings.npz --out calibration.json

DATA holds aligned faces, PERSON/IMAGE.jpg or train.rec, of people that the network was not trained with, or it is a
file of applications.embed with such faces. All pairs of images of different people are compared. 3,000 images of as
many people make 4.5 million pairs, which show a false accept rate of 1e-6. applications.export, verify and identify
read the calibration. It is for the network that it was made with alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from util.cli.options import GROUPS, TrainedNetworkSettings, eval_batch_size
from util.cli.parser import PATHS, option, parse
from util.cli.types import EMBEDDING_SUFFIXES, integer, to_file
from util.errors import DataError, run_script
from util.files import require_writable_file

if TYPE_CHECKING:
    import numpy as np

    from util.data.loader import TrainingImages

SHOWN_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True, kw_only=True)
class Flags(TrainedNetworkSettings):
    """The settings of applications.calibrate."""

    data: Path = option(
        PATHS,
        type=to_file,
        metavar="PATH",
        help="aligned faces, a folder for each person, or a .rec file, or a file of embeddings",
        required=True,
    )
    out: Path = option(PATHS, type=to_file, metavar="FILE", help="calibration to write", required=True)
    max_images: int = option(
        "Data", default=20_000, type=integer(2), help="images to compare, chosen evenly; 20,000 make 200 million pairs"
    )
    batch_size: int | None = eval_batch_size()


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.calibrate", arguments, groups=GROUPS, description=__doc__)
    require_writable_file("--out", flags.out)

    # torch takes seconds to import: report mistakes in the command line first.
    import numpy as np

    from util.calibration import calibrate
    from util.data.loader import open_training_images
    from util.device import select_devices
    from util.embedding import embed_images, warn_unless_aligned
    from util.embedding_table import read_table
    from util.files import sha256
    from util.image_tree import printable
    from util.public_networks import open_network
    from util.training.report import format_table

    devices = select_devices(flags.gpu_num)
    file, network = open_network(flags.network, flags.channel_order, flags.input_scale, crop=flags.eval_crop)
    made_with = sha256(file)
    if flags.data.suffix in EMBEDDING_SUFFIXES:
        table = read_table(flags.data)
        if table.metadata.get("sha256") != made_with:
            raise DataError(f"--data={flags.data}: was made with another network. Run applications.embed with {file}.")
        chosen = evenly(len(table.names), flags.max_images)
        embeddings = table.embeddings[chosen]
        places = [table.names[index] for index in chosen]
        _, identities = np.unique([place.partition("/")[0] for place in places], return_inverse=True)
    else:
        images = open_training_images(flags.data)
        warn_unless_aligned(images)
        chosen = evenly(len(images), flags.max_images)
        embedded = embed_images(network, Chosen(images, chosen), devices, flags.batch_size)
        embeddings = embedded.embeddings
        used = chosen[embedded.indices]
        identities = images.labels[used]
        places = [printable(images.where(int(index))) for index in used]
    source = f"{len(places)} images of {len(np.unique(identities))} people in {printable(flags.data.name)}"
    calibration, closest = calibrate(embeddings, identities, source, made_with)
    calibration.write(flags.out)

    print(f"{source}: {calibration.pairs:,} pairs of different people")
    rows = [["FAR", "cosine", "squared distance"]]
    for far in SHOWN_RATES:
        if far >= calibration.lowest_far:
            cosine = calibration.threshold(far)
            rows.append([f"{far:.0e}", f"{cosine:.4f}", f"{2 - 2 * cosine:.4f}"])
    print(format_table(rows))
    first, second = closest
    cosine = float(embeddings[first] @ embeddings[second])
    print(f"most alike (cosine {cosine:.4f}; are they different people?): {places[first]} and {places[second]}")
    print(f"calibration: {flags.out}")


def evenly(count: int, most: int) -> "np.ndarray":
    """Return at most `most` of the positions 0 to count - 1, evenly chosen. Tell the user if some are left out."""
    import numpy as np

    if count > most:
        print(f"{most} of {count} images are compared, chosen evenly (--max_images)")
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


class Chosen:
    """Some images of a training set, as embed_images() needs them."""

    def __init__(self, images: "TrainingImages", chosen: "np.ndarray"):
        self._images = images
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def image(self, index: int) -> "np.ndarray":
        return self._images.image(int(self._chosen[index]))


if __name__ == "__main__":
    run_script(main)
