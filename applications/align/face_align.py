"""Find the faces in a folder of photographs and write them aligned, 112x112, for training. From the repository root:

python applications/align/face_align.py -source_root RAW -dest_root ALIGNED -crop_size 112
python applications/align/face_align.py --source_root RAW --dest_root data/imgs_train --contact_sheet sheet.png
python -m applications.align.face_align --source_root RAW --dest_root ALIGNED --keep_all --format png

RAW/PERSON/IMAGE becomes ALIGNED/PERSON/IMAGE.jpg, RAW/IMAGE becomes ALIGNED/IMAGE.jpg. RAW is only read.
ALIGNED/manifest.csv records the result of each file. Run the same command again to continue a stopped run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.cli.parser import Settings, choice, flag, option, parse, processes
from util.cli.types import SELECT, integer, number, to_file, to_gpus, to_png
from util.errors import DataError, run_script
from util.files import require_writable_file
from util.parallel import resumable


@resumable
def main(arguments: list[str]) -> None:
    flags = parse_flags(arguments)

    # torch takes seconds to import: report mistakes in the command line first.
    from applications.align.batch import AlignSettings, align_tree
    from applications.align.contact_sheet import write_contact_sheet
    from applications.align.manifest import ALIGNED, FILE
    from util.device import select_devices
    from util.image_tree import printable

    source = printable(flags.source_root)
    settings = AlignSettings(
        crop_size=flags.crop_size,
        select=flags.select,
        keep_all=flags.keep_all,
        min_face=flags.min_face,
        thresholds=(flags.thresholds[0], flags.thresholds[1], flags.thresholds[2]),
        format=flags.format,
    )
    devices = select_devices(available_gpus() if flags.gpu_num is None else flags.gpu_num)
    summary = align_tree(
        flags.source_root, flags.dest_root, settings, devices, processes=flags.processes, force=flags.force
    )
    counts = ", ".join(f"{count} {status}" for status, count in sorted(summary.counts.items()))
    print(f"{source}: {counts or 'no files'}")
    if summary.new:
        print(f"{summary.new} files in {summary.seconds:.1f} s, {summary.new / summary.seconds:.1f} images/s")
    print(f"result of each file: {printable(flags.dest_root / FILE)}")
    if flags.contact_sheet:
        write_contact_sheet(flags.source_root, flags.dest_root, flags.contact_sheet)
        print(f"before and after: {printable(flags.contact_sheet)}")
    if not summary.counts[ALIGNED]:
        raise DataError(f"{source}: no face was aligned. The manifest has the reasons.")


def _to_gpus_or_auto(value: object) -> tuple[int, ...] | None:
    """Return GPU numbers as in training, or None for `auto`."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    try:
        return to_gpus(value)
    except ValueError as rule:
        raise ValueError(f"{rule} or auto") from None


def _to_thresholds(value: object) -> tuple[float, ...]:
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or len(items) != 3:
        raise ValueError("three numbers, like 0.6 0.7 0.8")
    return tuple(number("three numbers, like 0.6 0.7 0.8", lambda item: True)(item) for item in items)


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of face_align.py."""

    source_root: Path = option(
        type=to_file, metavar="DIR", help="folder of photographs; only read", required=True, single_dash=True
    )
    dest_root: Path = option(
        type=to_file, metavar="DIR", help="folder for the aligned faces", required=True, single_dash=True
    )
    crop_size: int = option(default=112, type=integer(16, 4096), help="pixels a side", single_dash=True)
    select: str = choice(SELECT, default="largest", help="which of several faces: largest, central or best")
    keep_all: bool = flag(help="write every face: IMAGE.jpg, IMAGE.face2.jpg, ...")
    min_face: float = option(
        default=20.0, type=number("a number", lambda value: True), help="pixels of the smallest face to look for"
    )
    thresholds: tuple[float, ...] = option(
        default=(0.6, 0.7, 0.8), type=_to_thresholds, metavar="X X X", help="least face probability in each network"
    )
    format: str = choice(("jpg", "png"), default="jpg", help="jpg (quality 95) or png")
    contact_sheet: Path | None = option(
        type=to_png, metavar="FILE.png", help="also draw a page of photographs and aligned faces"
    )
    gpu_num: tuple[int, ...] | None = option(
        type=_to_gpus_or_auto,
        metavar="LIST",
        help="GPUs, as 0 or [0,1]; or cpu; or auto",
        default_help="auto: GPU 0 if there is one",
    )
    processes: int | None = processes()
    force: bool = flag(help="remove what an earlier run aligned, and start again")


def parse_flags(arguments: list[str]) -> Flags:
    """Return the settings from the arguments. UsageError for a mistake."""
    flags = parse(Flags, "applications/align/face_align.py", arguments, description=__doc__)
    if flags.contact_sheet:
        require_writable_file("--contact_sheet", flags.contact_sheet)
    return flags


def available_gpus() -> tuple[int, ...]:
    """Return GPU 0 if there is one, and no GPU otherwise: the meaning of --gpu_num=auto."""
    import torch

    return (0,) if torch.cuda.is_available() else ()


if __name__ == "__main__":
    run_script(main)
