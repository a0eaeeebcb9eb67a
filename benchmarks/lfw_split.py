"""Makes a data folder from a part of LFW: training images of some people, and a verification set of others.

python -m benchmarks.lfw_split --source LFW --out data/lfw

SOURCE has aligned_112/PERSON/PERSON_0001.jpg (112x112), train_people.txt (a name a line) and pairs.txt (LFW's official
form), whose last fold has none of the training people. OUT gets imgs/ (links to the images of those people who have two
or more), lfw_align_112/lfw (the last fold, same and different pairs alternating, so that each tenth holds both) and
more_pairs.txt: every same pair of the first images (six at most) of each of the last fold's people, and as many
different ones, drawn at random. They share images, so they are not quite independent, but leave less to chance:

python validation.py --data_dir data/lfw --val_data more=data/lfw/more_pairs.txt:LFW/aligned_112
"""

import shutil
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from util.cli.parser import Settings, option, parse
from util.cli.types import integer, to_file
from util.errors import DataError, run_script
from util.pairs import PairSubset, interleaved_order, iter_images, load_pairs
from util.pairs.bcolz import write_carray
from util.pairs.text_list import read_pair_list

FIRST = 6  # images of a person in more_pairs.txt: else a few people make most of the same pairs


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of this benchmark."""

    source: Path = option(type=to_file, metavar="DIR", help="folder with aligned_112/ and pairs.txt", required=True)
    out: Path = option(type=to_file, metavar="DIR", help="folder to write", required=True)
    people: int | None = option(type=integer(1), metavar="N", help="take the first N people only", default_help="all")
    pairs: int | None = option(type=integer(1), metavar="N", help="take the first N pairs only", default_help="all")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.lfw_split", arguments, description=__doc__)
    aligned, listed = options.source / "aligned_112", options.source / "pairs.txt"
    for path in (aligned, options.source / "train_people.txt", listed):
        if not path.exists():
            raise DataError(f"{path}: missing; --source has to have it")
    people = (options.source / "train_people.txt").read_text().split()
    pairs = load_pairs(listed, aligned)
    chosen = last_fold(pairs.issame)[: options.pairs]
    lines = read_pair_list(listed)
    named = {Path(name).parts[0] for pair in chosen for name in (lines[pair].first, lines[pair].second)}
    seen = sorted(named & set(people))
    if seen:
        raise DataError(f"{options.source}: {len(seen)} people are in both parts, {seen[0]} among them")
    count = link_images(aligned, people[: options.people], options.out / "imgs")
    fold = PairSubset(pairs, chosen)
    write_carray(options.out / "lfw_align_112" / "lfw", iter_images(fold), fold.issame)
    more = every_pair(aligned, sorted(named))
    (options.out / "more_pairs.txt").write_text("".join(f"{first} {second} {same:d}\n" for first, second, same in more))
    print(f"{options.out}: {count} training images, {len(fold)} pairs of people that are not among them")


def last_fold(issame: np.ndarray) -> np.ndarray:
    """The numbers of the pairs of the last fold, same and different ones in turn. A fold begins with its same pairs."""
    begins = np.flatnonzero(issame & ~np.roll(issame, 1))
    fold = np.arange(begins[-1], len(issame))
    return fold[interleaved_order(issame[fold])]


def every_pair(aligned: Path, people: list[str]) -> list[tuple[str, str, bool]]:
    """All same pairs of these people's first images and as many random different ones, in turn: paths in `aligned`."""
    images = {person: sorted(f"{person}/{file.name}" for file in (aligned / person).glob("*.jpg")) for person in people}
    images = {person: files[:FIRST] for person, files in images.items()}
    same = [pair for person in people for pair in combinations(images[person], 2)]
    rng = np.random.default_rng(0)
    rng.shuffle(same)
    different: set[tuple[str, str]] = set()
    while len(different) < len(same):
        first, second = (images[people[index]] for index in rng.choice(len(people), 2, replace=False))
        different.add((str(rng.choice(first)), str(rng.choice(second))))
    pairs = zip(same, sorted(different), strict=True)
    return [(*pair, is_same) for both in pairs for pair, is_same in zip(both, (True, False), strict=True)]


def link_images(aligned: Path, people: list[str], out: Path) -> int:
    if out.exists():
        shutil.rmtree(out)  # links of an earlier call, perhaps of more people
    count = 0
    for person in people:
        files = sorted((aligned / person).glob("*.jpg"))
        if len(files) >= 2:
            (out / person).mkdir(parents=True)
            for file in files:
                (out / person / file.name).symlink_to(file.resolve())
            count += len(files)
    return count


if __name__ == "__main__":
    run_script(main)
