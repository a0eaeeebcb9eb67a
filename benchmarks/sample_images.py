"""Provide faces for the benchmarks: a given folder, the demo's folder, or faces drawn into a temporary folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from applications.demo.data_set import make_faces
from benchmarks.timing import REPEATS, TimingFlags
from util.cli.parser import option
from util.cli.types import to_file
from util.data.loader import open_training_images
from util.device import num_cpus

DEMO = Path("data/demo/imgs")


@dataclass(frozen=True, kw_only=True)
class ImageFlags(TimingFlags):
    """The flags of the benchmarks that read images."""

    repeats: int = option(default=7, **REPEATS)
    data: Path | None = option(
        type=to_file, metavar="DIR", help="one folder per identity", default_help="data/demo, or faces drawn now"
    )

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield --data, else the folder of `make demo`, else drawn faces; with --quick, always a few drawn faces."""
        if self.data is not None:
            yield self.data
        elif DEMO.is_dir() and not self.quick:
            yield DEMO
        else:
            people, images, processes = (3, 4, 1) if self.quick else (40, 20, num_cpus())
            with tempfile.TemporaryDirectory() as folder:
                make_faces(Path(folder), people=people, images=images, processes=processes)
                yield Path(folder)

    def first_images(self, count: int) -> np.ndarray:
        """Return the first images, repeated if there are too few: (count, 112, 112, 3) RGB uint8."""
        with self.folder() as folder:
            images = open_training_images(folder)
            few = np.stack([images.image(index) for index in range(min(count, len(images)))])
        return np.resize(few, (count, *few.shape[1:]))
