"""Convert a .bin verification set of InsightFace (lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin …) to bcolz.

    python -m applications.prepare.bin agedb_30.bin --out data/AgeDB/agedb_30

Pairs keep the order of the file if each of its ten folds has same and different pairs. Otherwise same and different
pairs are interleaved. Use this for programs that read bcolz only: train.py and validation.py read the .bin itself, from
data/ or with --val_data NAME=FILE.bin.
"""

from dataclasses import dataclass
from pathlib import Path

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
    out: Path = option(type=to_file, help="bcolz set to write", required=True)
    force: bool = flag(help="start again, and replace a set that exists")


def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.prepare.bin", arguments, description=__doc__)

    from applications.prepare.write_set import is_made, is_reordered, new_order, write_set
    from util.pairs import load_pairs
    from util.pairs.bin import BinPairs

    pairs = load_pairs(flags.file)
    if not isinstance(pairs, BinPairs):
        raise DataError(
            f"{flags.file}: not a .bin of InsightFace. For a list of pairs, use applications.prepare.pairs."
        )
    made_from = {"program": "bin", "file": str(flags.file.resolve()), "sha256": sha256(flags.file)}
    if is_made(flags.out, made_from, flags.force):
        return
    order = new_order(flags.file, pairs.issame)
    write_set(flags.out, pairs, order, made_from=made_from, notes={})
    same = int(pairs.issame.sum())
    how = "in its order"
    if is_reordered(order):
        how = "interleaved, because some of its ten folds would have only same or only different pairs"
    print(f"{flags.out}: {same} same and {len(pairs) - same} different pairs of {flags.file}, {how}")
    print(f"use it: python validation.py --val_data {flags.out.name}={flags.out}")


if __name__ == "__main__":
    run_script(main)
