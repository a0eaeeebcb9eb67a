"""Make a data folder from a part of LFW: training images of some people, and a verification set of others.

python -m benchmarks.lfw_split --source LFW --out data/lfw

SOURCE has aligned_112/PERSON/PERSON_0001.jpg (112x112), train_people.txt (one name per line) and pairs.txt (LFW's
official format). The last fold of pairs.txt must not contain training people. The program writes three things:

OUT/imgs/                the training people with two or more images, as links
OUT/lfw_align_112/lfw    the last fold; same and different pairs alternate, so that each tenth has both
OUT/more_pairs.txt       all same pairs of the first six images of each person of the last fold, and as many random
                         different pairs; pairs share images and are not independent, but there are more of them

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

FIRST = 6  # images of a person in more_pairs.txt; without a limit a few people would make most of the same pairs


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of this benchmark."""

    source: Path = option(type=to_file, metavar="DIR", help="folder with aligned_112/ and pairs.txt", required=True)
    out: Path = option(type=to_file, metavar="DIR", help="folder to write", required=True)
    people: int | None = option(type=integer(1), help="take the first N people only", default_help="all")
    pairs: int | None = option(type=integer(1), help="take the first N pairs only", default_help="all")


def main(arguments: list[str]) -> None:
    options = parse(Flags, "-m benchmarks.lfw_split", arguments, description=__doc__)
    aligned = options.source / "aligned_112"
    listed = options.source / "pairs.txt"
    train_people = options.source / "train_people.txt"
    for path in (aligned, train_people, listed):
        if not path.exists():
            raise DataError(f"{path}: missing. Name a folder that has it with --source.")
    people = train_people.read_text().split()
    pairs = load_pairs(listed, aligned)
    chosen = last_fold(pairs.issame)[: options.pairs]
    lines = read_pair_list(listed)
    test_people = {Path(file).parts[0] for pair in chosen for file in (lines[pair].first, lines[pair].second)}
    shared = sorted(test_people & set(people))
    if shared:
        raise DataError(
            f"{train_people}: {len(shared)} people are in the last fold too, such as {shared[0]}. Remove them."
        )
    count = link_images(aligned, people[: options.people], options.out / "imgs")
    fold = PairSubset(pairs, chosen)
    write_carray(options.out / "lfw_align_112" / "lfw", iter_images(fold), fold.issame)
    more = every_pair(aligned, sorted(test_people))
    (options.out / "more_pairs.txt").write_text("".join(f"{first} {second} {same:d}\n" for first, second, same in more))
    print(f"{options.out}: {count} training images, {len(fold)} pairs of other people")


def last_fold(issame: np.ndarray) -> np.ndarray:
    """Return the indices of the pairs of the last fold, same and different pairs alternating."""
    # In pairs.txt the same pairs of a fold come first.
    begins = np.flatnonzero(issame & ~np.roll(issame, 1))
    fold = np.arange(begins[-1], len(issame))
    return fold[interleaved_order(issame[fold])]


def every_pair(aligned: Path, people: list[str]) -> list[tuple[str, str, bool]]:
    """Return (first image, second image, is same) of all same pairs and as many random different pairs, alternating."""
    images = {}
    for person in people:
        images[person] = sorted(f"{person}/{file.name}" for file in (aligned / person).glob("*.jpg"))[:FIRST]
    same = [pair for person in people for pair in combinations(images[person], 2)]
    rng = np.random.default_rng(0)
    rng.shuffle(same)
    different: set[tuple[str, str]] = set()
    while len(different) < len(same):
        first, second = (images[people[index]] for index in rng.choice(len(people), 2, replace=False))
        different.add((str(rng.choice(first)), str(rng.choice(second))))
    pairs = []
    for same_pair, different_pair in zip(same, sorted(different), strict=True):
        pairs.append((*same_pair, True))
        pairs.append((*different_pair, False))
    return pairs


def link_images(aligned: Path, people: list[str], out: Path) -> int:
    """Link the images of all people with two or more images into `out`. Return the number of images."""
    if out.exists():
        shutil.rmtree(out)  # an earlier call may have linked more people
    count = 0
    for person in people:
        files = list((aligned / person).glob("*.jpg"))
        if len(files) >= 2:
            (out / person).mkdir(parents=True)
            for file in files:
                (out / person / file.name).symlink_to(file.resolve())
            count += len(files)
    return count


if __name__ == "__main__":
    run_script(main)
