"""Makes a bcolz verification set out of a .bin file of InsightFace: lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin ...

    python -m applications.prepare.bin agedb_30.bin --out data/AgeDB/agedb_30

Pairs stay in the order of the file where ten folds can be cut from it; otherwise same and different ones are
interleaved. This is for programs that read bcolz only: train.py and validation.py read the .bin itself, in data/ or
with --val_data NAME=FILE.bin.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from util.cli.parser import Settings, flag, option, parse
from util.cli.types import to_file
from util.errors import DataError, run_script
from util.files import sha256


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of applications.prepare.bin."""

    file: Path = option(
        type=to_file,
        metavar="FILE.bin",
        help="verification set in InsightFace's format",
        required=True,
        positional=True,
    )
    out: Path = option(type=to_file, metavar="PATH", help="bcolz set to write", required=True)
    force: bool = flag(help="start again, and replace a set that exists")


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.prepare.bin", arguments, description=__doc__)

    from applications.prepare.write_set import is_made, is_reordered, new_order, write_set
    from util.pairs import load_pairs
    from util.pairs.bin import BinPairs

    pairs = load_pairs(flags.file)
    if not isinstance(pairs, BinPairs):
        raise DataError(f"{flags.file}: not a .bin of InsightFace; for a list of pairs use applications.prepare.pairs")
    made_from = {"program": "bin", "file": str(flags.file.resolve()), "sha256": sha256(flags.file)}
    if is_made(flags.out, made_from, flags.force):
        return
    order = new_order(flags.file, pairs.issame)
    write_set(flags.out, pairs, order, made_from, {})
    same = int(pairs.issame.sum())
    how = "in its order" if not is_reordered(order) else "interleaved, since its own order cannot be cut into ten folds"
    print(f"{flags.out}: {same} same and {len(pairs) - same} different pairs of {flags.file}, {how}")
    print(f"use it: python validation.py --val_data {flags.out.name}={flags.out}")


if __name__ == "__main__":
    run_script(main)
