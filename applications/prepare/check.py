"""Reads whole training and verification sets and says what is wrong with them: before a training finds out.

    python -m applications.prepare.check                            # what train.py and validation.py find in data/
    python -m applications.prepare.check data/imgs_casia faces_emore/train.rec lfw.bin
    python -m applications.prepare.check own/pairs.txt --root own/faces --report report.json

A folder of people, a .rec file or a folder with one is a training set; a bcolz folder, a .bin or a list of pairs (with
its images in --root) is a verification set. Every image is decoded. Exit code 3 if training or validation would fail,
and 0 otherwise, also with warnings. "Swapped" colours are a guess from the colour of skin, and wrong for about one face
in 2,000; for a set as a whole it can be trusted.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
        default=(), type=_to_files, metavar="PATH", help="sets", default_help="the sets in DATA_DIR", positional=True
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
            raise UsageError(f"{path}: no such file or folder; name a training or a verification set")

    from util.device import num_cpus

    processes = num_cpus() if flags.processes is None else flags.processes
    found = []
    for findings in (
        check_paths(flags.paths, flags.root, processes) if flags.paths else check_all(flags.data_dir, processes)
    ):
        print("\n".join(findings.lines()), flush=True)
        found.append(findings)
    if flags.report:
        with atomic_write(flags.report) as partial:
            partial.write_text(json.dumps([findings.to_dict() for findings in found], indent=1) + "\n")
        print(f"report: {flags.report}")
    conclude(found)


def check_paths(paths: list[Path], root: Path | None, processes: int) -> "Iterator[Findings]":
    from applications.prepare.check_pairs import check_pairs

    for path in paths:
        if path.suffix == ".rec" or (path.is_dir() and not (path / "meta").is_dir()):
            yield check_images(path, processes)
        else:
            yield check_pairs(path.stem, path, root)


def check_all(data_dir: Path, processes: int) -> "Iterator[Findings]":
    """Findings about all that train.py and validation.py would take from `data_dir`. DataError if that is nothing."""
    from applications.prepare.check_pairs import check_pairs
    from util.data.loader import find_train_data
    from util.pairs import VERIFICATION_SETS

    try:
        images = find_train_data(data_dir, None)
    except DataError as error:
        images, missing = None, str(error)
    sets = {}
    for name, places in VERIFICATION_SETS.items():
        paths = [data_dir / place for place in places]
        sets[name] = next((path for path in paths if (path / "meta").is_dir() or path.is_file()), None)
    if images is None and not any(sets.values()):
        raise DataError(f"{missing}; nor is there a verification set")
    if images is None:
        print(f"nothing to train on: {missing}")
    else:
        yield check_images(images, processes)
    for name, path in sets.items():
        if path is not None:
            yield check_pairs(name, path)
    if None in sets.values():
        print(f"not in {data_dir}: {', '.join(name for name, path in sets.items() if path is None)}")


def check_images(path: Path, processes: int) -> "Findings":
    from applications.prepare.check_training import check_training
    from applications.prepare.report import Findings
    from util.data.loader import open_training_images

    try:
        images = open_training_images(path)
    except DataError as error:
        return Findings("training images", str(path), errors=[str(error)])
    return check_training(images, processes)


def conclude(found: "list[Findings]") -> None:
    """Says how many sets are all right. DataError if training or validation would fail on one."""
    failing = [findings.path for findings in found if findings.errors]
    warnings = sum(len(findings.warnings) for findings in found)
    if failing:
        raise DataError(f"{len(failing)} of {len(found)} sets cannot be used as they are: {', '.join(failing)}")
    sets = "the set can" if len(found) == 1 else f"all {len(found)} sets can"
    print(f"{sets} be used; {warnings or 'no'} warning{'' if warnings == 1 else 's'}")


if __name__ == "__main__":
    run_script(main)
