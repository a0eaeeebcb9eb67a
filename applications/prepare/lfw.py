"""Make the verification set LFW: aligned photographs in the order of the 6,000 official pairs.

    python -m applications.prepare.lfw                              # downloads LFW (180 MB) into data/raw/lfw
    python -m applications.prepare.lfw --source /sets/lfw           # uses a copy on this machine

DIR, or a folder in it (lfw, lfw-deepfunneled, images, ...), has NAME/NAME_0001.jpg. pairs.txt is in DIR, next to DIR,
or at --pairs. Only the photographs in the list are read. A part of LFW with its own pairs.txt works too: if the list
cannot be divided into ten folds in its order, same and different pairs are interleaved.

DATA_DIR/lfw_align_112/ gets lfw/ and lfw_list.npy, which train.py and validation.py find automatically, lfw_pairs.txt,
lfw.json, and aligned/ with the aligned faces, which may be removed. No pair is left out: if no face is found, the
program searches with lower thresholds, and then crops the region where LFW's faces usually are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from applications.prepare.download import Remote, fetch, unpack
from util.cli.parser import Settings, flag, option, parse, processes
from util.cli.types import to_file
from util.errors import DataError, UsageError, run_script
from util.files import sha256
from util.parallel import resumable

if TYPE_CHECKING:
    import numpy as np

    from applications.align import Face
    from util.pairs.text_list import Pair

OUT = "lfw_align_112/lfw"
ALIGNED = "lfw_align_112/aligned"
# The original photographs, from the mirror that scikit-learn uses: the university's server is gone. Published models
# were evaluated on faces aligned from these photographs. The funneled versions are the same photographs, rotated.
ARCHIVE = Remote(
    "lfw.tgz",
    "https://ndownloader.figshare.com/files/5976018",
    "055f7d9c632d7370e6fb4afc7468d40f970c34a80d4c6f50ffec63f5a8d536c0",
)
PAIRS = Remote(
    "pairs.txt",
    "https://ndownloader.figshare.com/files/5976006",
    "ea42330c62c92989f9d7c03237ed5d591365e89b3e649747777b70e692dc1592",
)
FOLDERS = ("lfw", "lfw-deepfunneled", "lfw_deepfunneled", "lfw-funneled", "lfw_funneled", "images")
SIDE = 250  # pixels of a side of LFW's photographs
# Mean landmarks (x, y) of 6,922 deep-funneled photographs, found by MTCNN: where a face usually is.
LANDMARKS = ((104.6, 113.0), (146.6, 112.0), (125.8, 137.0), (107.8, 158.8), (145.0, 158.1))


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of applications.prepare.lfw."""

    data_dir: Path = option(default=Path("data"), type=to_file, metavar="DIR", help="folder of the sets")
    source: Path | None = option(
        type=to_file, metavar="DIR", help="existing copy of LFW", default_help="it is downloaded"
    )
    pairs: Path | None = option(
        type=to_file, metavar="FILE", help="list of pairs", default_help="pairs.txt in or next to SOURCE"
    )
    download: Path | None = option(
        type=to_file, metavar="DIR", help="folder for the download", default_help="DATA_DIR/raw/lfw"
    )
    force: bool = flag(help="start again, and replace a set that exists")
    processes: int | None = processes()


@resumable
def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.prepare.lfw", arguments, description=__doc__)
    if flags.source and flags.download:
        raise UsageError("--download: nothing is downloaded with --source. Remove one of them.")
    source = flags.source or download(flags.download or flags.data_dir / "raw" / "lfw")
    listed = flags.pairs or find_list(source)

    # These take seconds to import: report mistakes in the command line first.
    from applications.prepare.align_pairs import align_all
    from applications.prepare.write_set import is_made, new_order, read_rows, write_aligned
    from util.pairs.text_list import read_pair_list

    images = find_photographs(source, read_pair_list(listed))
    made_from = {"program": "lfw", "photographs": str(images.resolve()), "list": sha256(listed)}
    if is_made(flags.data_dir / OUT, made_from, flags.force):
        return
    rows = read_rows(listed, images)
    order = new_order(listed, rows)
    names = [name for first, second, _ in rows for name in (first, second)]
    root = flags.data_dir / ALIGNED
    aligned = align_all(
        images,
        names,
        root,
        fallback_crop,
        listed=listed,
        accept_face=is_subject,
        processes=flags.processes,
        force=flags.force,
    )
    aligned.fallback = "the average face region"
    write_aligned(flags.data_dir / OUT, aligned, rows, order=order, made_from=made_from)
    print(f"use it: python validation.py --data_dir {flags.data_dir}")


def download(folder: Path) -> Path:
    """Download the parts of LFW that `folder` does not have yet, and return the folder."""
    fetch(PAIRS, folder)
    if not (folder / "lfw").is_dir():
        unpack(fetch(ARCHIVE, folder), "lfw", folder)
    return folder


def find_list(source: Path) -> Path:
    """Return pairs.txt in the folder or next to it. Raise DataError if it is missing."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder. Name the folder of LFW with --source, or omit it to download LFW.")
    for folder in (source, source.parent):
        if (folder / PAIRS.name).is_file():
            return folder / PAIRS.name
    raise DataError(
        f"{source}: no pairs.txt in it or next to it. Name the list with --pairs, or download it from {PAIRS.url}."
    )


def find_photographs(source: Path, pairs: Sequence["Pair"]) -> Path:
    """Return the folder with NAME/NAME_0001.jpg: the source or one in it. Raise DataError if it is missing."""
    people = list(dict.fromkeys(pair.first.split("/")[0] for pair in pairs))
    inside = [source / name for name in FOLDERS]
    for folder in [source, *inside, *(folder / folder.name for folder in inside)]:
        if any((folder / person).is_dir() for person in people):
            return folder
    raise DataError(
        f"{source}: none of the {len(people)} people in the list has a folder in it, or in its {', '.join(FOLDERS)}. "
        f"Name the folder that has NAME/NAME_0001.jpg with --source."
    )


def is_subject(face: "Face") -> bool:
    """Return whether the box contains the center of the photograph.

    LFW's photographs are centered on the face of the person in their name, so any other face is in the background.
    """
    x1, y1, x2, y2 = face.box
    return x1 <= SIDE / 2 <= x2 and y1 <= SIDE / 2 <= y2


def fallback_crop(image: "np.ndarray") -> "np.ndarray":
    """Crop the region where LFW's faces are on average: (H, W, 3) RGB uint8 -> (112, 112, 3)."""
    import numpy as np

    from applications.align import align

    height, width = image.shape[:2]
    return align(image, np.array(LANDMARKS) * (width / SIDE, height / SIDE))


if __name__ == "__main__":
    run_script(main)
