"""Make a verification set from a list of pairs and its images.

    python -m applications.prepare.pairs --list pairs.txt --images faces --out data/own/own
    python -m applications.prepare.pairs --list pairs.txt --images photos --align --out data/own/own

The list has lines `PATH PATH 1` (same person) or `PATH PATH 0`, or LFW's format; see util/pairs/text_list.py. Its
images are in --images, or next to the list. They are faces of 112x112, or photographs if --align is given: their faces
are aligned into OUT_aligned/, which may be removed afterwards. The set is OUT and OUT_list.npy. OUT_pairs.txt lists the
pairs in the order of the set, and OUT.json records what the set was made from. Pairs are reordered if the ten folds
would have different numbers of same and different pairs.

validation.py can also read a list of aligned faces directly: --val_data NAME=pairs.txt:faces.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.cli.parser import Settings, choice, flag, option, parse, processes
from util.cli.types import SELECT, to_file
from util.errors import UsageError, run_script
from util.files import sha256
from util.parallel import resumable


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of applications.prepare.pairs."""

    list: Path = option(type=to_file, metavar="FILE", help="list of pairs", required=True)
    images: Path | None = option(
        type=to_file, metavar="DIR", help="folder of the images", default_help="the list's own folder"
    )
    out: Path = option(type=to_file, help="verification set to write", required=True)
    align: bool = flag(help="the images are photographs: align their faces")
    select: str = choice(SELECT, default="largest", help="which of several faces: largest, central or best")
    whole_image: bool = flag(help="if no face is found, use the resized image")
    force: bool = flag(help="start again, and replace a set that exists")
    processes: int | None = processes()


@resumable
def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.prepare.pairs", arguments, description=__doc__)
    if not flags.align and (flags.whole_image or flags.select != "largest"):
        raise UsageError("--select and --whole_image: are for --align. Add it, or remove them.")
    images = flags.images or flags.list.parent

    # These take seconds to import: report mistakes in the command line first.
    from applications.prepare.align_pairs import AlignedFaces, align_all, full_image
    from applications.prepare.write_set import is_made, new_order, read_rows, write_aligned

    made_from: dict[str, Any] = {"program": "pairs", "images": str(images.resolve()), "list": sha256(flags.list)}
    if flags.align:
        made_from["align"] = [flags.select, flags.whole_image]
    if is_made(flags.out, made_from, flags.force):
        return
    rows = read_rows(flags.list, images)
    order = new_order(flags.list, rows, balanced=True)
    names = [name for first, second, _ in rows for name in (first, second)]
    if flags.align:
        root = flags.out.with_name(f"{flags.out.name}_aligned")
        fallback = full_image if flags.whole_image else None
        aligned = align_all(
            images,
            names,
            root,
            fallback,
            listed=flags.list,
            select=flags.select,
            processes=flags.processes,
            force=flags.force,
        )
    else:
        aligned = AlignedFaces(images, images, {name: name for name in names})
    write_aligned(flags.out, aligned, rows, order=order, made_from=made_from)
    print(f"use it: python validation.py --val_data {flags.out.name}={flags.out}")


if __name__ == "__main__":
    run_script(main)
