"""Faces to measure with: a folder of people that is given, the demo's, or one drawn for the moment."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from applications.demo.data_set import Settings, painters, training_faces, write_folder
from util.data.loader import TrainingImages, open_training_images
from util.device import num_cpus

DEMO = Path("data/demo/imgs")


@contextmanager
def folder_of_people(given: Path | None, quick: bool) -> Iterator[Path]:
    """The given folder (PERSON/IMAGE); or the one of `make demo`; or faces drawn into a folder that goes away again.

    `quick` draws a few faces whatever there is.
    """
    if given is not None:
        yield given
    elif DEMO.is_dir() and not quick:
        yield DEMO
    else:
        with tempfile.TemporaryDirectory() as place:
            faces = training_faces(Settings(seed=1337, people=3 if quick else 40, images=4 if quick else 20, pairs=40))
            with painters(1 if quick else num_cpus()) as paint:
                write_folder(Path(place), faces, iter(paint(faces)))
            yield Path(place)


def some_images(folder: Path, count: int) -> np.ndarray:
    """(count, 112, 112, 3) RGB uint8, the first images of a folder of people, again and again if there are too few."""
    images: TrainingImages = open_training_images(folder)
    few = np.stack([images.image(index) for index in range(min(count, len(images)))])
    return np.resize(few, (count, *few.shape[1:]))
