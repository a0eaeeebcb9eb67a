"""Makes the verification sets CFP-FF and CFP-FP out of "Celebrities in Frontal-Profile in the Wild".

    python -m applications.prepare.cfp --source /sets/cfp-dataset

SOURCE, or a folder in it, has Data/Images/001/frontal/01.jpg ... 10.jpg and profile/01.jpg ... 04.jpg of 500 people,
and Protocol/ with Pair_list_F.txt, Pair_list_P.txt and Split/{FF,FP}/{01..10}/{same,diff}.txt (or --protocol DIR).

DATA_DIR/cfp_align_112/ gets cfp_ff/ and cfp_fp/ with their _list.npy, which train.py and validation.py find by
themselves, beside their _pairs.txt, their .json and aligned/, which holds the aligned faces and may be removed. Each
set has 7,000 pairs: the ten splits in order, in each 350 same and then 350 different pairs. No pair is left out: a face
that is not found, as happens in profile, is looked for with lower thresholds, and then the whole image, which in CFP is
little more than the face, is taken.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from applications.prepare.checksum import sha256_of
from applications.prepare.commands import new_parser, parse
from util.errors import DataError, run_script

OUT = "cfp_align_112"
SETS = {"cfp_ff": ("FF", "frontal", "frontal"), "cfp_fp": ("FP", "frontal", "profile")}  # split, kinds of both images
LISTS = {"frontal": "Pair_list_F.txt", "profile": "Pair_list_P.txt"}
IMAGES_OF = {"frontal": 10, "profile": 4}  # of each person
PEOPLE, SPLITS, OF_A_KIND = 500, 10, 350  # same pairs, and as many different ones, in each split


def main(arguments: list[str]) -> None:
    parser = new_parser("cfp", __doc__, force=True, processes=True)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the set as it is published")
    parser.add_argument("--protocol", type=Path, metavar="DIR", help="its folder Protocol, where that lies elsewhere")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="where sets lie (data)")
    flags = parse(parser, arguments)

    from applications.prepare.align_pairs import align_all, describe, whole_image
    from applications.prepare.write_set import is_made, list_file, new_order, write_aligned

    images, protocol = find_folders(flags.source, flags.protocol)
    folder, left = flags.data_dir / OUT, {}
    for name, kinds in SETS.items():
        pairs = read_protocol(protocol, *kinds)
        made_from = {"program": "cfp", "photographs": str(images.resolve()), "protocol": checksums(protocol, kinds[0])}
        if not is_made(folder / name, made_from, flags.force):
            left[name] = pairs, made_from
    photographs = sorted({image for pairs, _ in left.values() for pair in pairs for image in pair[:2]})
    if not photographs:
        return
    check_there(images, photographs)
    aligned = align_all(
        images, photographs, folder / "aligned", whole_image, processes=flags.processes, force=flags.force
    )
    for name, (pairs, made_from) in left.items():
        order = new_order(protocol, np.array([same for *_, same in pairs]))
        write_aligned(folder / name, aligned, pairs, order, made_from)
        print(f"{folder / name}: {len(pairs)} pairs of photographs in {images}, listed in {list_file(folder / name)}")
    for line in describe(aligned, "taken whole and resized"):
        print(line)
    print(f"use them: python validation.py --data_dir {flags.data_dir}")


def find_folders(source: Path, protocol: Path | None) -> tuple[Path, Path]:
    """The folder of the people, 001 to 500, and that of the protocol. DataError if one is not there."""
    roots = [source, *sorted(folder for folder in source.glob("*") if folder.is_dir())]
    images = [root / "Data" / "Images" for root in roots] + [root / "Images" for root in roots]
    protocols = [protocol] if protocol else [root / "Protocol" for root in roots]
    found = []
    for candidates, what in ((images, "Data/Images/001"), (protocols, "Protocol/Split")):
        inside = what.rsplit("/", 1)[1]
        there = next((folder for folder in candidates if (folder / inside).is_dir()), None)
        if there is None:
            where = protocol if protocol and inside == "Split" else f"{source} and the folders in it"
            raise DataError(f"{where}: no {what}; name the folder of the set as it is published")
        found.append(there)
    return found[0], found[1]


def read_protocol(protocol: Path, split: str, first: str, second: str) -> list[tuple[str, str, bool]]:
    """(image, image, same) for each of the 7,000 pairs of a protocol, images relative to Data/Images."""
    numbered = {kind: read_images(protocol, kind) for kind in {first, second}}
    pairs = []
    for number in range(1, SPLITS + 1):
        for name, same in (("same", True), ("diff", False)):
            file = protocol / "Split" / split / f"{number:02d}" / f"{name}.txt"
            for one, other in read_numbers(file, len(numbered[first]), len(numbered[second])):
                pairs.append((numbered[first][one - 1], numbered[second][other - 1], same))
    return pairs


def read_numbers(file: Path, most_of_first: int, most_of_second: int) -> list[tuple[int, int]]:
    """The 350 pairs of numbers, counted from 1, in a file of a split. DataError for anything else."""
    pairs = []
    for line, text in enumerate(read_text(file).split("\n"), start=1):
        words = [word.strip() for word in text.split(",")]
        if words == [""]:
            continue
        if len(words) != 2 or not all(word.isdecimal() for word in words):
            raise DataError(f"{file}, line {line}: must be two numbers such as `7,448`, and is {text[:50]!r}")
        numbers = int(words[0]), int(words[1])
        if not (1 <= numbers[0] <= most_of_first and 1 <= numbers[1] <= most_of_second):
            raise DataError(
                f"{file}, line {line}: {text.strip()}, and the images are numbered from 1 to {most_of_first} and "
                f"{most_of_second}; copy the protocol again"
            )
        pairs.append(numbers)
    if len(pairs) != OF_A_KIND:
        raise DataError(f"{file}: {len(pairs)} pairs, and each split has {OF_A_KIND}; copy the protocol again")
    return pairs


def read_images(protocol: Path, kind: str) -> list[str]:
    """The images of a kind in the order of their numbers, as 001/frontal/01.jpg.

    They are those of the published list where it is there (`1 ../Data/Images/001/frontal/01.jpg`), or else in the
    order of people, which is what the list says.
    """
    of_each = IMAGES_OF[kind]
    images = [
        f"{person:03d}/{kind}/{image:02d}.jpg" for person in range(1, PEOPLE + 1) for image in range(1, of_each + 1)
    ]
    file = protocol / LISTS[kind]
    if not file.exists():
        return images
    listed = [line.split() for line in read_text(file).split("\n") if line.strip()]
    for number, (words, image) in enumerate(zip(listed, images, strict=False), start=1):
        if len(words) != 2 or words[0] != str(number) or not words[1].endswith(f"/{image}"):
            raise DataError(
                f"{file}: image {number} should be {image}, as published, and the list has {' '.join(words)[:80]!r}; "
                f"copy the protocol again"
            )
    if len(listed) != len(images):
        raise DataError(f"{file}: lists {len(listed)} images, and there are {len(images)}; copy the protocol again")
    return images


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not the text of a protocol"
        raise DataError(f"{file}: cannot be read ({reason}); copy the protocol again") from None


def checksums(protocol: Path, split: str) -> list[str]:
    return [sha256_of(file) for file in sorted((protocol / "Split" / split).rglob("*.txt"))]


def check_there(images: Path, photographs: list[str]) -> None:
    missing = [name for name in photographs if not (images / name).is_file()]
    if missing:
        raise DataError(
            f"{images}: {len(missing)} of {len(photographs)} images of the protocol are missing, first "
            f"{', '.join(missing[:3])}; unpack the set again"
        )


if __name__ == "__main__":
    run_script(main)
