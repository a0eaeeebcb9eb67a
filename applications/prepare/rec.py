"""Unpack a training set in RecordIO (train.rec, train.idx) into folders of images.

    python -m applications.prepare.rec faces_emore/train.rec --out data/ms1m_align_112

OUT/imgs/CLASS/NUMBER.jpg has the unchanged bytes of the image in record NUMBER; CLASS is the number of the identity. An
interrupted run continues if it is started again. Use this for programs that read folders, or to look at the images:
train.py reads train.rec itself, and one large file is faster to read than millions of small files.
"""

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from util.cli.parser import Settings, option, parse, processes
from util.cli.types import to_file
from util.errors import DataError, RunError, UsageError, run_script
from util.files import Provenance, format_names, path_inside, require_writable_dir, sha256
from util.parallel import parallel_map, resumable, working_on

if TYPE_CHECKING:
    import numpy as np

    from util.data.record_dataset import RecordImages

MARKER = "rec.json"  # in OUT: the record file whose images are there
# The first bytes of the image formats that train.py reads.
_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n": ".png", b"BM": ".bmp", b"RIFF": ".webp"}


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of applications.prepare.rec."""

    file: Path = option(
        type=to_file, metavar="FILE.rec", help="records, or the folder with train.rec", required=True, positional=True
    )
    out: Path = option(type=to_file, metavar="DIR", help="folder for imgs/CLASS/NUMBER.jpg", required=True)
    processes: int | None = processes()


@resumable
def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.prepare.rec", arguments, description=__doc__)

    from util.data.loader import open_training_images
    from util.data.record_dataset import RecordImages
    from util.device import num_cpus

    images = open_training_images(flags.file)
    if not isinstance(images, RecordImages):
        raise DataError(f"{flags.file}: already a folder of images. Name a .rec file.")
    check_destination(images, flags.out)
    folder = path_inside(flags.out, "imgs")
    unpack(images, folder, num_cpus() if flags.processes is None else flags.processes)
    print(f"{folder}: {len(images)} images of {len(images.classes)} people, all that {images.root} has")
    print(f"use it: python train.py --train_data {flags.out}")


def check_destination(images: "RecordImages", out: Path) -> None:
    """Write the marker of the record file into `out`. Raise UsageError if `out` has images of another file."""
    require_writable_dir("--out", out)
    marker = path_inside(out, MARKER)
    if not marker.exists() and (out / "imgs").exists():
        raise UsageError(f"--out {out}: already has a folder imgs, which is not changed. Name another folder.")
    made_from = {"index": sha256(images.root.with_suffix(".idx")), "size": images.root.stat().st_size}
    Provenance(marker, made_from).check_or_write(f"--out {out}", "Name another folder for the images of another file.")


class Work(NamedTuple):
    """Data that all processes share. The images of class c are order[starts[c] : starts[c + 1]]."""

    images: "RecordImages"
    order: "np.ndarray"
    starts: "np.ndarray"
    folder: Path
    digits: int  # of the numbers in file names


def unpack(images: "RecordImages", folder: Path, processes: int) -> None:
    """Write the folder of each class that is missing or incomplete.

    Raises DataError if records cannot be read, after all others are written, and RunError if files have disappeared.
    """
    # Sort the images by class. The images of a class then are one slice of `order`.
    order = images.labels.argsort(kind="stable")
    starts = images.labels[order].searchsorted(range(len(images.classes) + 1))
    digits = max(8, len(str(images.record(len(images) - 1))))
    folder.mkdir(exist_ok=True)
    broken: list[str] = []
    work = Work(images, order, starts, folder=folder, digits=digits)
    with (
        tqdm(total=len(images), desc=f"unpacking {images.root.name}", unit="image", unit_scale=True) as bar,
        parallel_map(write_class, work, range(len(images.classes)), processes) as results,
    ):
        for label, messages in enumerate(results):
            broken += messages
            bar.update(int(starts[label + 1] - starts[label]))
    if broken:
        raise DataError(
            f"{len(broken)} of {len(images)} images could not be unpacked, all others are in {folder}: "
            f"{format_names(broken, limit=3, separator=' | ')}"
        )
    check_count(images, folder)


def write_class(work: Work, label: int) -> list[str]:
    """Write the images of a class under a temporary folder name, and then rename it. Return errors of broken images."""
    indices = work.order[work.starts[label] : work.starts[label + 1]].tolist()
    folder = path_inside(work.folder, work.images.classes[label], list_file=work.images.root)
    if folder.is_dir() and len(os.listdir(folder)) == len(indices):
        return []
    partial = work.folder / f".{folder.name}.partial"
    broken = []
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for index in indices:
            working_on(work.images.where(index))
            try:
                content = work.images.encoded(index)
                suffix = next((suffix for start, suffix in _SUFFIXES.items() if content.startswith(start)), None)
                if suffix is None:
                    raise DataError(f"{work.images.where(index)}: not a JPEG, PNG, BMP or WebP. Make the set again.")
                (partial / f"{work.images.record(index):0{work.digits}d}{suffix}").write_bytes(content)
            except DataError as error:
                broken.append(str(error))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}). Run the same command again to continue."
        ) from None
    return broken


def check_count(images: "RecordImages", folder: Path) -> None:
    """Raise RunError if the number of files in a folder differs from the number of images of its class."""
    counts = Counter(images.labels.tolist())
    for label, name in enumerate(images.classes):
        found = len(os.listdir(folder / name))
        if found != counts[label]:
            raise RunError(
                f"{folder / name}: {found} images, but the index has {counts[label]}. Run the same command again."
            )


if __name__ == "__main__":
    run_script(main)
