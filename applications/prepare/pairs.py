"""Makes a verification set out of any list of pairs and the images that it names.

    python -m applications.prepare.pairs --list pairs.txt --images faces --out data/own/own
    python -m applications.prepare.pairs --list pairs.txt --images photos --align --out data/own/own

The list has lines like `PATH PATH 1` (same person) or `PATH PATH 0`, or is of LFW's form; see util/pairs/text_list.py. Its
images lie in --images (or beside it): faces of 112x112, or with --align photographs, whose faces are aligned first
(into OUT_aligned/, which may be removed). OUT and OUT_list.npy are the set, OUT_pairs.txt lists its pairs in its order,
and OUT.json says what it was made from. Where they are not so already, pairs are put into an order in which each tenth
has as many same as different ones.

validation.py also reads a list with its aligned faces as it is: --val_data NAME=pairs.txt:faces.
"""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from applications.prepare.commands import new_parser, parse
from util.errors import UsageError, run_script
from util.files import path_inside

SELECT = ("largest", "central", "best")


def main(arguments: list[str]) -> None:
    parser = new_parser("pairs", __doc__, force=True, processes=True)
    parser.add_argument("--list", type=Path, required=True, metavar="FILE", help="the list of pairs")
    parser.add_argument("--images", type=Path, metavar="DIR", help="that its names begin in (the list's own folder)")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the set to be made")
    parser.add_argument("--align", action="store_true", help="the images are photographs: align the faces in them")
    parser.add_argument("--select", choices=SELECT, default="largest", help="of several faces (largest)")
    parser.add_argument("--whole_image", action="store_true", help="where no face is found, take the image, resized")
    flags = parse(parser, arguments)
    if not flags.align and (flags.whole_image or flags.select != "largest"):
        raise UsageError("--select and --whole_image: are for --align; add it, or leave them out")
    images = flags.images or flags.list.parent
    make(flags.list, images, flags.out, flags.align, flags.select, flags.whole_image, flags.processes, flags.force)


def make(
    listed: Path, images: Path, out: Path, align: bool, select: str, whole: bool, processes: int | None, force: bool
) -> None:
    """Makes the set, unless it is there, and says what it is."""
    from applications.prepare.align_pairs import AlignedFaces, align_all, describe, whole_image
    from applications.prepare.checksum import sha256_of
    from applications.prepare.write_set import is_made, is_reordered, list_file, new_order, write_aligned
    from util.pairs.text_list import find_images, read_pair_list

    pairs = read_pair_list(listed)
    made_from = {"program": "pairs", "images": str(images.resolve()), "list": sha256_of(listed)}
    made_from |= {"align": [select, whole]} if align else {}
    if is_made(out, made_from, force):
        return
    order = new_order(listed, np.array([pair.same for pair in pairs]), equal_shares=True)
    names = [os.path.relpath(file, images) for file in find_images(listed, images, pairs)]
    if align:
        root = out.with_name(f"{out.name}_aligned")
        for name in dict.fromkeys(names):  # aligned faces get the names of their photographs
            path_inside(root, name, named_in=listed)
        last = whole_image if whole else None
        aligned = align_all(images, names, root, last, select, processes=processes, force=force)
    else:
        aligned = AlignedFaces(images, {name: name for name in names})
    rows = [(first, second, pair.same) for first, second, pair in zip(names[::2], names[1::2], pairs, strict=True)]
    write_aligned(out, aligned, rows, order, made_from)
    print(f"{out}: {len(pairs)} pairs of {len(set(names))} images in {images}, listed in {list_file(out)}")
    for line in describe(aligned, "taken whole and resized"):
        print(line)
    if is_reordered(order):
        print("same and different pairs are interleaved, so that each tenth has as many of both as any other")
    print(f"use it: python validation.py --val_data {out.name}={out}")


if __name__ == "__main__":
    run_script(main)
