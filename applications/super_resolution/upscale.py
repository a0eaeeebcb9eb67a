"""Enlarges all images of a folder, and of the folders in it, by super resolution. From the repository root:

python -m applications.super_resolution.upscale --source small --out large        # by the newest network for scale 4
python -m applications.super_resolution.upscale --source small --out large --sr_checkpoint_dir SR_12_6000.pth
python -m applications.super_resolution.upscale --source data/imgs --out look --degrade   # faces, shrunk beforehand

SOURCE/PERSON/IMAGE.jpg becomes OUT/PERSON/IMAGE.png. The same command, given again, goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from applications.super_resolution.settings import FACE, parse_upscale
from util.errors import DataError, UsageError, run_script
from util.files import atomic_write, check_source_and_dest

RECORD = "upscale.json"  # in OUT: what its images were made with
DEFAULT_SCALE = 4  # where the network is to be found in a folder of runs


def main(arguments: list[str]) -> None:
    settings = parse_upscale(arguments)
    source, out = Path(settings.source), Path(settings.out)
    check_source_and_dest("--source", source, "--out", out)

    # torch takes seconds to import, and a mistake in the command line is answered at once.
    from applications.super_resolution.batch import Enlarger, enlarge_tree
    from util.device import prepare_module, select_devices
    from util.image_tree import printable
    from util.super_resolution import find_super_resolution, load_super_resolution

    devices = select_devices(settings.gpu_num)
    file = find_super_resolution(settings.sr_checkpoint_dir, settings.scale or DEFAULT_SCALE)
    network = load_super_resolution(file, settings.scale)
    scale = network.scale
    if settings.degrade and FACE % scale:
        raise UsageError(f"--degrade: a face of {FACE} pixels cannot be shrunk {scale} times; leave it out")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    note_settings(out, {"checkpoint": digest, "degrade": settings.degrade, "format": settings.format})
    print(f"enlarging {scale} times with {printable(str(file))}", flush=True)
    enlarger = Enlarger(prepare_module(network, devices), scale, devices[0], settings.batch_size, settings.degrade)
    counts = enlarge_tree(source, out, enlarger, settings.format)
    print(f"{printable(str(out))}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    if not counts["enlarged"] + counts["there already"]:
        raise DataError(f"--source={printable(str(source))}: no image in it that can be enlarged; name another folder")


def note_settings(out: Path, made_with: dict[str, str | bool]) -> None:
    """Notes in OUT what its images are made with. UsageError if there are some already, made with something else."""
    file = out / RECORD
    if file.is_file():
        try:
            before = json.loads(file.read_text())
        except (ValueError, OSError):
            before = None
        for name, value in made_with.items():
            if not isinstance(before, dict) or before.get(name) != value:
                raise UsageError(
                    f"--out={out}: holds images that were made otherwise ({RECORD}: another {name}); name a new folder"
                )
        return
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(made_with, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
