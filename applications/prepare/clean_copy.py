"""Copy a training set without what was found in it."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np

from applications.prepare.clean_list import DUPLICATE, Row, image_name
from util.console import logger
from util.data.image_folder import ImageFolder
from util.data.loader import TrainingImages
from util.data.recordio import write_identities
from util.errors import DataError, RunError
from util.face import FACE_SIZE
from util.files import format_names, path_inside
from util.image_io import declared_size
from util.progress import progress


def copy_without(images: TrainingImages, rows: list[Row], dest: Path, *, source: Path | None) -> None:
    """Copy a training set without the images and people in some findings: completely or not at all.

    Args:
        images: the set.
        rows: the findings.
        dest: the new folder. A .rec file becomes train.rec, train.idx and `property` in it.
        source: the list that the findings are from, for messages.

    Raises:
        DataError: an image or a person of a finding is not in the set, or a record of the set is damaged.
        RunError: the copy cannot be written.
    """
    kept = kept_images(images, rows, source=source)
    people = np.unique(images.labels[kept])
    if len(people) < 2:
        raise DataError(
            f"--copy_to={dest}: only {len(people)} people would be left. Shorten the list, or --remove less."
        )
    partial = dest.with_name(f".{dest.name}.{os.getpid()}.partial")
    try:
        if isinstance(images, ImageFolder):
            copy_folder(images, kept, partial)
        else:
            copy_records(images, kept, partial)
        partial.rename(dest)
    except OSError as error:
        raise RunError(f"--copy_to={dest}: cannot be written ({error.strerror}). Make room, and start again.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info(
        f"{dest}: {len(kept):,} images of {len(people):,} people; left out: {len(images) - len(kept):,} images, and "
        f"{len(images.classes) - len(people):,} people completely"
    )


def kept_images(images: TrainingImages, rows: list[Row], *, source: Path | None) -> np.ndarray:
    """Return the positions of the images that findings leave, (K,) int64. Raise as copy_without() does."""
    labels = {name: label for label, name in enumerate(images.classes)}
    without = {row.person for row in rows if not row.image}
    removed = {row.image for row in rows if row.image and row.kind != DUPLICATE}
    # A copy stays if the image that it is a copy of does not.
    removed |= {
        row.image
        for row in rows
        if row.kind == DUPLICATE and row.other_person not in without and row.other_image not in removed
    }
    found = {name: index for index in range(len(images)) if (name := image_name(images, index)) in removed}
    if unknown := sorted((removed - found.keys()) | (without - labels.keys())):
        names = format_names([name.encode("utf-8", "backslashreplace").decode() for name in unknown], limit=3)
        raise DataError(f"{source or images.root}: not in {images.root}: {names}. Name the set that the list is of.")
    is_kept = np.isin(images.labels, [labels[name] for name in without], invert=True)
    is_kept[list(found.values())] = False
    return np.flatnonzero(is_kept)


def copy_folder(images: ImageFolder, kept: np.ndarray, dest: Path) -> None:
    """Copy images to a new folder of people."""
    for label in sorted(set(images.labels[kept].tolist())):
        path_inside(dest, images.classes[label]).mkdir(parents=True)
    for index in progress(kept.tolist(), "copying", "images"):
        shutil.copyfile(images.path(index), dest / image_name(images, index))


def copy_records(images: TrainingImages, kept: np.ndarray, dest: Path) -> None:
    """Write images to train.rec in a new folder, person by person."""
    order = kept[np.argsort(images.labels[kept], kind="stable")]
    people = itertools.groupby(progress(order.tolist(), "copying", "images"), key=lambda index: images.labels[index])
    width, _ = declared_size(images.encoded(int(order[0]))) or (FACE_SIZE, FACE_SIZE)
    dest.mkdir()
    write_identities(
        dest / "train.rec", ((images.encoded(index) for index in indices) for _, indices in people), size=width
    )
