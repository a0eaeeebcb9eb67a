"""Find the faces in a folder of photographs and write them aligned, 112x112, for training. From the repository root:

python applications/align/face_align.py -source_root RAW -dest_root ALIGNED -crop_size 112
python applications/align/face_align.py --source_root RAW --dest_root data/imgs_train --contact_sheet sheet.png
python -m applications.align.face_align --source_root RAW --dest_root ALIGNED --keep_all --format png

RAW/PERSON/IMAGE becomes ALIGNED/PERSON/IMAGE.jpg, RAW/IMAGE becomes ALIGNED/IMAGE.jpg. RAW is only read.
ALIGNED/manifest.csv records the result of each file. Run the same command again to continue a stopped run.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.cli.argparser import Parser
from util.cli.types import to_gpus
from util.errors import DataError, UsageError, run_script
from util.files import require_writable_file


def main(arguments: list[str]) -> None:
    flags = _parse(arguments)
    gpus = _gpus(flags.gpu_num)

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
        thresholds=tuple(flags.thresholds),
        format=flags.format,
    )
    devices = select_devices(gpus)
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


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="face_align.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-source_root", "--source_root", type=Path, required=True, metavar="DIR", help="photographs; only read")
    add("-dest_root", "--dest_root", type=Path, required=True, metavar="DIR", help="where the aligned faces go")
    add("-crop_size", "--crop_size", type=int, default=112, metavar="N", help="pixels a side (112)")
    add("--select", default="largest", metavar="WHICH", help="of several faces the largest (default), central or best")
    add("--keep_all", action="store_true", help="write every face: IMAGE.jpg, IMAGE.face2.jpg, ...")
    add("--min_face", type=float, default=20.0, metavar="X", help="pixels of the smallest face to look for (20)")
    add(
        "--thresholds",
        type=float,
        nargs=3,
        default=(0.6, 0.7, 0.8),
        metavar="X",
        help="probability of a face that each of the three networks asks for (0.6 0.7 0.8)",
    )
    add("--format", default="jpg", metavar="NAME", help="jpg (default; quality 95) or png")
    add("--contact_sheet", type=Path, metavar="FILE.png", help="also draw a page of photographs and aligned faces")
    add(
        "--gpu_num",
        default="auto",
        metavar="LIST",
        help="GPUs, as 0 or [0,1]; cpu; auto (default): GPU 0 if there is one",
    )
    add("--processes", type=int, metavar="N", help="that share the work (one a core)")
    add("--force", action="store_true", help="remove what an earlier run aligned, and start over")
    flags = parser.parse_args(arguments)
    if flags.processes is not None and not 0 <= flags.processes <= 256:
        raise UsageError(f"--processes {flags.processes}: must lie between 0 and 256")
    if flags.contact_sheet:
        require_writable_file("--contact_sheet", flags.contact_sheet)
        if flags.contact_sheet.suffix.lower() != ".png":
            raise UsageError(f"--contact_sheet {flags.contact_sheet}: is a PNG file; let its name end in .png")
    return flags


def _gpus(text: str) -> tuple[int, ...]:
    """The numbers of the GPUs, as in training; for `auto` the first, if there is one; none for the CPU."""
    if text.strip().lower() == "auto":
        import torch

        return (0,) if torch.cuda.is_available() else ()
    try:
        return to_gpus(text)
    except ValueError as rule:
        raise UsageError(f"--gpu_num {text}: is not {rule} or auto") from None


if __name__ == "__main__":
    run_script(main)
