"""Read all images of training and verification sets, and report errors before a training fails on them.

    python -m applications.prepare.check                            # all sets that train.py and validation.py find
    python -m applications.prepare.check data/imgs_casia faces_emore/train.rec lfw.bin
    python -m applications.prepare.check own/pairs.txt --root own/faces --report report.json

Training sets are a folder of people, a .rec file, or a folder with a .rec file. Verification sets are a bcolz folder,
a .bin or a list of pairs (with its images in --root). Every image is decoded. The exit code is 3 if training or
validation would fail, and 0 otherwise, also with warnings. "Swapped" colors are a guess from the color of skin. It is
wrong for about one face in 2,000, but reliable for a complete set.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from util.cli.parser import Settings, option, parse, processes
from util.cli.types import to_file
from util.errors import DataError, UsageError, run_script
from util.files import atomic_write, require_writable_file

if TYPE_CHECKING:
    from applications.prepare.report import Findings


def _to_files(value: object) -> tuple[Path, ...]:
    return tuple(map(to_file, value if isinstance(value, list | tuple) else [value]))


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of applications.prepare.check."""

    paths: tuple[Path, ...] = option(
        default=(), type=_to_files, help="sets", default_help="the sets in DATA_DIR", positional=True
    )
    data_dir: Path = option(default=Path("data"), type=to_file, metavar="DIR", help="folder of the sets")
    root: Path | None = option(
        type=to_file, metavar="DIR", help="images of a list of pairs", default_help="the list's own folder"
    )
    report: Path | None = option(
        type=to_file, metavar="FILE.json", help="write everything that was found, all names included"
    )
    processes: int | None = processes()


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.prepare.check", arguments, description=__doc__)
    if flags.report:
        require_writable_file("--report", flags.report)
    for path in flags.paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder. Name a training or a verification set.")

    from util.device import num_cpus

    found = []
    for findings in check_sets(flags, num_cpus() if flags.processes is None else flags.processes):
        print("\n".join(findings.lines()), flush=True)
        found.append(findings)
    if flags.report:
        with atomic_write(flags.report) as partial:
            partial.write_text(json.dumps([asdict(findings) for findings in found], indent=1) + "\n")
        print(f"report: {flags.report}")
    failing = [findings.path for findings in found if findings.errors]
    warnings = sum(len(findings.warnings) for findings in found)
    if failing:
        raise DataError(f"{len(failing)} of {len(found)} sets cannot be used: {', '.join(failing)}")
    sets = "the set can" if len(found) == 1 else f"all {len(found)} sets can"
    print(f"{sets} be used; {warnings or 'no'} warning{'' if warnings == 1 else 's'}")


def check_sets(flags: Flags, processes: int) -> "Iterator[Findings]":
    """Yield findings about the named sets, or about all sets that train.py and validation.py use in the data folder."""
    from applications.prepare.check_pairs import check_pairs
    from applications.prepare.check_training import check_training
    from util.data.loader import find_train_data
    from util.pairs import USUAL_SETS, locate_sets

    if flags.paths:
        for path in flags.paths:
            if path.suffix == ".rec" or (path.is_dir() and not (path / "meta").is_dir()):
                yield check_training(path, processes)
            else:
                yield check_pairs(path.stem, path, flags.root)
        return
    sets = locate_sets(flags.data_dir)
    try:
        images = find_train_data(flags.data_dir, None)
    except DataError as error:
        if not sets:
            raise DataError(f"{error} There is no verification set either.") from None
        print(f"no training images: {error}")
    else:
        yield check_training(images, processes)
    for name, (place, root) in sets.items():
        yield check_pairs(name, Path(place), None if root is None else Path(root))
    absent = [name for name in USUAL_SETS if name not in sets]
    if absent:
        print(f"not in {flags.data_dir}: {', '.join(absent)}")


if __name__ == "__main__":
    run_script(main)
