"""Enlarge all images of a folder, and of the folders in it, by super resolution. From the repository root:

python -m applications.super_resolution.upscale --source small --out large        # by the newest network for scale 4
python -m applications.super_resolution.upscale --source small --out large --sr_checkpoint_dir SR_12_6000.pth
python -m applications.super_resolution.upscale --source data/imgs --out look --degrade   # faces, shrunk beforehand

SOURCE/PERSON/IMAGE.jpg becomes OUT/PERSON/IMAGE.png. The same command continues where it was stopped.
"""

from __future__ import annotations

from pathlib import Path

from applications.super_resolution.settings import FACE, parse_upscale
from util.errors import DataError, UsageError, run_script
from util.files import Provenance, check_source_and_dest, sha256

RECORD = "upscale.json"  # in OUT: the settings that its images were made with
DEFAULT_SCALE = 4  # of the network that is searched for in a folder of runs


def main(arguments: list[str]) -> None:
    settings = parse_upscale(arguments)
    source, out = Path(settings.source), Path(settings.out)
    check_source_and_dest("--source", source, "--out", out)

    # torch takes seconds to import: import it after the command line was read without an error.
    from applications.super_resolution.batch import Enlarger, enlarge_tree
    from util.device import prepare_module, select_devices
    from util.image_tree import printable
    from util.super_resolution import find_super_resolution, load_super_resolution

    devices = select_devices(settings.gpu_num)
    file = find_super_resolution(settings.sr_checkpoint_dir, settings.scale or DEFAULT_SCALE)
    network = load_super_resolution(file, settings.scale)
    scale = network.scale
    if settings.degrade and FACE % scale:
        raise UsageError(f"--degrade: a face of {FACE} pixels cannot be shrunk {scale} times. Leave it out.")
    made_with = {"checkpoint": sha256(file), "degrade": settings.degrade, "format": settings.format}
    Provenance(out / RECORD, made_with, indent=2).check_or_write(f"--out={out}", "Name a new folder.")
    print(f"enlarging {scale} times with {printable(str(file))}", flush=True)
    enlarger = Enlarger(
        prepare_module(network, devices),
        scale,
        devices[0],
        batch_size=settings.batch_size,
        degrade=settings.degrade,
    )
    counts = enlarge_tree(source, out, enlarger, settings.format)
    print(f"{printable(str(out))}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    if not counts["enlarged"] + counts["there already"]:
        raise DataError(f"--source={printable(str(source))}: no image in it that can be enlarged. Name another folder.")


if __name__ == "__main__":
    run_script(main)
