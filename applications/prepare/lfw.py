"""Makes the verification set LFW out of its photographs: aligned, in the order of the 6,000 official pairs.

    python -m applications.prepare.lfw                              # downloads LFW (180 MB) into data/raw/lfw
    python -m applications.prepare.lfw --source /sets/lfw           # takes what is there

DIR, or a folder in it (lfw, lfw-deepfunneled, images, ...), has NAME/NAME_0001.jpg; pairs.txt lies in DIR, beside it,
or anywhere with --pairs. Only the photographs that it names are read. A part of LFW with its own pairs.txt works too:
where ten folds could not be cut from it as it stands, same and different pairs are interleaved.

DATA_DIR/lfw_align_112/ gets lfw/ and lfw_list.npy, which train.py and validation.py find by themselves, beside
lfw_pairs.txt, lfw.json and aligned/, which holds the aligned faces and may be removed. No pair is left out: a face that
is not found is looked for with lower thresholds, and then cut out where LFW's faces are.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from applications.prepare.commands import new_parser, parse
from applications.prepare.download import Remote, fetch, unpack
from util.errors import DataError, UsageError, run_script
from util.files import path_inside

# torch takes seconds to import: what needs it is imported in functions, once the command line is known to be right.
if TYPE_CHECKING:
    from applications.align import Face
    from util.pairs.text_list import Pair

OUT = "lfw_align_112/lfw"
ALIGNED = "lfw_align_112/aligned"
# The original photographs, as scikit-learn fetches them; the university's own server is gone. They are those that
# published models were aligned from; the funneled versions show the same people, turned upright.
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
SIDE = 250  # pixels of LFW's photographs
# The mean landmarks (x, y) of 6,922 deep-funneled photographs, found by MTCNN: where a face is that was not found.
LANDMARKS = ((104.6, 113.0), (146.6, 112.0), (125.8, 137.0), (107.8, 158.8), (145.0, 158.1))


def main(arguments: list[str]) -> None:
    parser = new_parser("lfw", __doc__, force=True, processes=True)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="where sets lie (data)")
    parser.add_argument("--source", type=Path, metavar="DIR", help="LFW as it is there (otherwise it is downloaded)")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="the list of pairs (pairs.txt in or beside DIR)")
    parser.add_argument("--download", type=Path, metavar="DIR", help="where to download to (DATA_DIR/raw/lfw)")
    flags = parse(parser, arguments)
    if flags.source and flags.download:
        raise UsageError("--download: nothing is downloaded with --source; leave one of them out")
    source = flags.source or download(flags.download or flags.data_dir / "raw" / "lfw")
    make(source, flags.pairs or find_list(source), flags.data_dir, flags.processes, flags.force)


def download(folder: Path) -> Path:
    """LFW in `folder`, fetched as far as it is not there already."""
    fetch(PAIRS, folder)
    if not (folder / "lfw").is_dir():
        unpack(fetch(ARCHIVE, folder), "lfw", folder)
    return folder


def make(source: Path, listed: Path, data_dir: Path, processes: int | None, force: bool) -> None:
    """Makes the set, unless it is there, and says what it is."""
    from applications.prepare.align_pairs import align_all, describe
    from applications.prepare.checksum import sha256_of
    from applications.prepare.write_set import is_made, is_reordered, list_file, new_order, write_aligned
    from util.pairs.text_list import find_images, read_pair_list

    pairs = read_pair_list(listed)
    images, out = find_photographs(source, pairs), data_dir / OUT
    made_from = {"program": "lfw", "photographs": str(images.resolve()), "list": sha256_of(listed)}
    if is_made(out, made_from, force):
        return
    order = new_order(listed, np.array([pair.same for pair in pairs]))
    names = [os.path.relpath(file, images) for file in find_images(listed, images, pairs)]
    for name in dict.fromkeys(names):  # aligned faces get the names of their photographs
        path_inside(data_dir / ALIGNED, name, named_in=listed)
    aligned = align_all(
        images, names, data_dir / ALIGNED, cut_out, is_wanted=is_subject, processes=processes, force=force
    )
    rows = [(first, second, pair.same) for first, second, pair in zip(names[::2], names[1::2], pairs, strict=True)]
    write_aligned(out, aligned, rows, order, made_from)
    print(f"{out}: {len(pairs)} pairs of {len(set(names))} photographs in {images}, listed in {list_file(out)}")
    for line in describe(aligned, "cut out where LFW's faces are"):
        print(line)
    if is_reordered(order):
        print("same and different pairs are interleaved: ten folds of the list as it stands would not have both")
    print(f"use it: python validation.py --data_dir {data_dir}")


def find_list(source: Path) -> Path:
    """pairs.txt in the folder or beside it. DataError if it is not there."""
    if not source.is_dir():
        raise DataError(
            f"{source}: no such folder; name the one that has LFW with --source, or leave it out to download"
        )
    for folder in (source, source.parent):
        if (folder / PAIRS.name).is_file():
            return folder / PAIRS.name
    raise DataError(
        f"{source}: no pairs.txt in it or beside it; name the list with --pairs, or download it from {PAIRS.url}"
    )


def find_photographs(source: Path, pairs: Sequence["Pair"]) -> Path:
    """The folder with NAME/NAME_0001.jpg: the source, or one in it. DataError if there is none."""
    people = list(dict.fromkeys(pair.first.split("/")[0] for pair in pairs))
    within = [source / name for name in FOLDERS]
    for folder in [source, *within, *(folder / folder.name for folder in within)]:
        if any((folder / person).is_dir() for person in people):
            return folder
    raise DataError(
        f"{source}: none of the {len(people)} people in the list has a folder in it, nor in {', '.join(FOLDERS)} "
        f"within; name the folder that has NAME/NAME_0001.jpg with --source"
    )


def is_subject(face: "Face") -> bool:
    """Whether a face is that of the person whom the photograph is named after: its box holds the centre.

    So it is in LFW by the way in which it was made; otherwise, only someone in the background was found.
    """
    x1, y1, x2, y2 = face.box
    return x1 <= SIDE / 2 <= x2 and y1 <= SIDE / 2 <= y2


def cut_out(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB uint8 -> (112, 112, 3), what is where LFW's faces are on average."""
    from applications.align import align

    height, width = image.shape[:2]
    return align(image, np.array(LANDMARKS) * [width / SIDE, height / SIDE])


if __name__ == "__main__":
    run_script(main)
