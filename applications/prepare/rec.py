"""Unpacks a training set in RecordIO (train.rec, train.idx) into folders of images.

    python -m applications.prepare.rec faces_emore/train.rec --out data/ms1m_align_112

OUT/imgs/CLASS/NUMBER.jpg holds the image of record NUMBER, byte for byte as it lies in the file; CLASS is the number of
its person. A run that was stopped goes on where it was. This is for programs that read folders, or to look at the
images: train.py reads train.rec itself, and one large file is read faster than millions of small ones.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.cli.parser import Settings, option, parse, processes
from util.cli.types import to_file
from util.errors import DataError, RunError, UsageError, run_script
from util.files import atomic_write, path_inside, require_writable_dir, sha256

if TYPE_CHECKING:
    from util.data.record_dataset import RecordImages

MARKER = "rec.json"  # in OUT: what is unpacked there
_NAMED = 3
# How files of the formats that can be trained on begin.
_KINDS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n": ".png", b"BM": ".bmp", b"RIFF": ".webp"}


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of applications.prepare.rec."""

    file: Path = option(
        type=to_file, metavar="FILE.rec", help="records, or the folder with train.rec", required=True, positional=True
    )
    out: Path = option(type=to_file, metavar="DIR", help="folder for imgs/CLASS/NUMBER.jpg", required=True)
    processes: int | None = processes()


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.prepare.rec", arguments, description=__doc__)

    from util.data.loader import open_training_images
    from util.data.record_dataset import RecordImages
    from util.device import num_cpus

    images = open_training_images(flags.file)
    if not isinstance(images, RecordImages):
        raise DataError(f"{flags.file}: a folder of images already; name a .rec file")
    begin(images, flags.out)
    unpack(images, flags.out / "imgs", num_cpus() if flags.processes is None else flags.processes)
    print(
        f"{flags.out / 'imgs'}: {len(images)} images of {len(images.classes)} people, as many as the index of "
        f"{images.root} says"
    )
    print(f"use it: python train.py --train_data {flags.out}")


def begin(images: "RecordImages", out: Path) -> None:
    """Notes in `out` what goes into it. UsageError if something else is there."""
    require_writable_dir("--out", out)
    marker, content = (
        out / MARKER,
        {"index": sha256(images.root.with_suffix(".idx")), "size": images.root.stat().st_size},
    )
    if marker.exists() and marker.read_text() != json.dumps(content):
        raise UsageError(f"--out {out}: has images of another file, or of another state of it; name another folder")
    if not marker.exists() and (out / "imgs").exists():
        raise UsageError(f"--out {out}: has a folder imgs already, which is not touched; name another folder")
    with atomic_write(marker) as partial:
        partial.write_text(json.dumps(content))


class Work(NamedTuple):
    """What the processes share. The images of class c are order[starts[c] : starts[c + 1]]."""

    images: "RecordImages"
    order: np.ndarray
    starts: np.ndarray
    folder: Path
    digits: int


def unpack(images: "RecordImages", folder: Path, processes: int) -> None:
    """Writes the folder of each class that is not there. DataError, at the end, for records that cannot be read."""
    from util.parallel import parallel_map

    order = np.argsort(images.labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(images.labels, minlength=len(images.classes)))])
    digits = max(8, len(str(images.record(len(images) - 1))))
    folder.mkdir(exist_ok=True)
    broken: list[str] = []
    with tqdm(total=len(images), desc=f"unpacking {images.root.name}", unit="image", unit_scale=True) as bar:
        work = Work(images, order, starts, folder, digits)
        for label, messages in enumerate(parallel_map(write_class, work, range(len(images.classes)), processes)):
            broken += messages
            bar.update(int(starts[label + 1] - starts[label]))
    if broken:
        raise DataError(
            f"{len(broken)} of {len(images)} images could not be unpacked, all others lie in {folder}: "
            f"{' | '.join(broken[:_NAMED])}{' and so on' if len(broken) > _NAMED else ''}"
        )
    check_count(images, folder)


def write_class(work: Work, label: int) -> list[str]:
    """Writes the images of a class into a folder that gets its name when it is whole; messages about broken ones."""
    mine = work.order[work.starts[label] : work.starts[label + 1]].tolist()
    folder = path_inside(work.folder, work.images.classes[label], named_in=work.images.root)
    if folder.is_dir() and len(os.listdir(folder)) == len(mine):
        return []
    partial = work.folder / f".{folder.name}.partial"
    broken = []
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for index in mine:
            try:
                content = work.images.encoded(index)
                name = f"{work.images.record(index):0{work.digits}d}{suffix(content, work.images.where(index))}"
                (partial / name).write_bytes(content)
            except DataError as error:
                broken.append(str(error))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); run the same command again to go on") from None
    return broken


def suffix(content: bytes, where: str) -> str:
    """The suffix that belongs to an image file's content. DataError names `where` it comes from if it is none."""
    for start, kind in _KINDS.items():
        if content.startswith(start):
            return kind
    raise DataError(f"{where}: not a JPEG, PNG, BMP or WebP; make the set anew")


def check_count(images: "RecordImages", folder: Path) -> None:
    """Counts what lies in the folders. RunError where it is not what the index says."""
    for name, expected in zip(images.classes, np.bincount(images.labels).tolist(), strict=True):
        found = len(os.listdir(folder / name))
        if found != expected:
            raise RunError(
                f"{folder / name}: {found} images, and the index says {expected}; run the same command again"
            )


if __name__ == "__main__":
    run_script(main)
