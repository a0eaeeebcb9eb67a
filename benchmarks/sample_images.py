"""Provide faces for the benchmarks: a given folder, the demo's folder, or faces drawn into a temporary folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from applications.demo.data_set import make_faces
from util.data.loader import open_training_images
from util.device import num_cpus

DEMO = Path("data/demo/imgs")


@contextmanager
def folder_of_people(given: Path | None, quick: bool) -> Iterator[Path]:
    """Yield a folder of PERSON/IMAGE files.

    It is the given folder, else the folder of `make demo`, else a temporary folder of drawn faces. With `quick`, a few
    faces are always drawn.
    """
    if given is not None:
        yield given
    elif DEMO.is_dir() and not quick:
        yield DEMO
    else:
        with tempfile.TemporaryDirectory() as folder:
            if quick:
                make_faces(Path(folder), people=3, images=4)
            else:
                make_faces(Path(folder), people=40, images=20, processes=num_cpus())
            yield Path(folder)


def some_images(folder: Path, count: int) -> np.ndarray:
    """Return the first images of a folder of people, repeated if there are too few: (count, 112, 112, 3) RGB uint8."""
    images = open_training_images(folder)
    few = np.stack([images.image(index) for index in range(min(count, len(images)))])
    return np.resize(few, (count, *few.shape[1:]))
