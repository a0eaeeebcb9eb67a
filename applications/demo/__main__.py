"""Make the demo data set: a training folder and four verification sets of drawn faces. It shows no real person.

    python -m applications.demo --out data/demo
    python -m applications.demo --out data/demo --people 200 --images 30 --pairs 1000

The random numbers of a face depend on (seed, person, image) alone, so the same flags give the same bytes with any
number of processes. train.py and validation.py read this layout:

    OUT/imgs/PERSON/PERSON_0001.jpg          training images, 112x112
    OUT/lfw_align_112/lfw                    light, pose, expression, age and blur all vary
    OUT/cfp_align_112/cfp_ff, cfp_fp         frontal with frontal, frontal with profile
    OUT/AgeDB/agedb_30                       one face young, one about 30 years older
    OUT/raw/PERSON/PERSON_0001.jpg           photographs of training people before alignment, for applications/align
    OUT/people.json                          the people of each set; no person is in two sets
    OUT/contact_sheet.png, README.txt, demo.json
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from util.cli.parser import Settings, flag, option, parse
from util.cli.types import integer, number, to_file, to_png
from util.errors import run_script
from util.files import Provenance


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of applications.demo."""

    out: Path = option(type=to_file, metavar="DIR", help="folder to write", required=True)
    seed: int = option(default=1337, type=integer(0), help="seed; another one draws other people")
    people: int = option(default=120, type=integer(2, 5000), help="identities in the training set")
    images: int = option(default=20, type=integer(1, 1000), help="images of each of them")
    pairs: int = option(
        default=400,
        type=number(
            "a multiple of 20 from 40 to 20000, so that each of 10 folds has as many same as different pairs, of two "
            "people or more",
            lambda pairs: pairs % 20 == 0 and 40 <= pairs <= 20000,
            int,
        ),
        help="pairs in each of the four verification sets",
    )
    sheet: Path | None = option(type=to_png, metavar="FILE.png", help="also write the contact sheet there")
    processes: int = option(
        default=min(os.cpu_count() or 1, 256), type=integer(1, 256), help="processes; the faces do not depend on it"
    )
    force: bool = flag(help="draw again what an earlier run has drawn")


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.demo", arguments, description=__doc__)

    # numpy and OpenCV take a second to import: report mistakes in the command line first.
    from applications.demo import data_set

    out = flags.out.resolve()
    settings = data_set.Settings(seed=flags.seed, people=flags.people, images=flags.images, pairs=flags.pairs)
    if Provenance(out / data_set.MARKER, asdict(settings)).matches() and not flags.force:
        print(f"{out}: already has these drawn faces; nothing to do (--force draws them again)")
    else:
        data_set.replace_set(out, settings, flags.processes, force=flags.force)
        print(
            f"{out}: drawn faces: {settings.people} people for training, and {len(data_set.VALIDATION_SETS)} "
            f"verification sets of {settings.pairs} pairs of other people"
        )
    if flags.sheet is not None:
        flags.sheet.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / data_set.SHEET, flags.sheet)


if __name__ == "__main__":
    run_script(main)
