"""Makes a data folder from a part of LFW: training images of some people, and a verification set of others.

python -m benchmarks.lfw_split --source LFW --out data/lfw

SOURCE has aligned_112/PERSON/PERSON_0001.jpg (112x112), train_people.txt (a name a line) and pairs.txt (LFW's official
form), whose last fold has none of the training people. OUT gets imgs/ (links to the images of those people who have two
or more) and lfw_align_112/lfw (the last fold, same and different pairs alternating, so that each tenth holds both).
"""

import argparse
import shutil
from pathlib import Path

import cv2
import numpy as np

from util.cli import Parser
from util.errors import DataError, run_script
from util.pairs import write_carray


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--people", type=int, help="take the first so many people only")
    parser.add_argument("--pairs", type=int, help="take the first so many pairs only")
    options = parser.parse_args(arguments)
    for name in ("aligned_112", "train_people.txt", "pairs.txt"):
        if not (options.source / name).exists():
            raise DataError(f"{options.source / name}: missing; --source has to have it")
    aligned = options.source / "aligned_112"
    people = (options.source / "train_people.txt").read_text().split()
    pairs = last_fold(options.source / "pairs.txt")[: options.pairs]
    seen = {name for pair in pairs for name, _ in pair[:2]} & set(people)
    if seen:
        raise DataError(f"{options.source}: {len(seen)} people are in both parts, {sorted(seen)[0]} among them")
    count = link_images(aligned, people[: options.people], options.out / "imgs")
    images = (read_image(aligned / name / f"{name}_{number:04d}.jpg") for pair in pairs for name, number in pair[:2])
    write_carray(options.out / "lfw_align_112" / "lfw", images, [same for *_, same in pairs])
    print(f"{options.out}: {count} training images, {len(pairs)} pairs of people that are not among them")


def last_fold(path: Path) -> list[tuple[tuple[str, int], tuple[str, int], bool]]:
    """((name, number), (name, number), same) for each pair of the last fold, same and different ones in turn."""
    header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
    per_kind = int(header[1])
    same = [((name, int(first)), (name, int(second)), True) for name, first, second in lines[-2 * per_kind : -per_kind]]
    different = [((a, int(i)), (b, int(j)), False) for a, i, b, j in lines[-per_kind:]]
    return [pair for both in zip(same, different, strict=True) for pair in both]


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


def read_image(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(f"{path}: missing or not an image")
    return image


if __name__ == "__main__":
    run_script(main)
