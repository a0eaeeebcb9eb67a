"""Make the verification sets CFP-FF and CFP-FP from "Celebrities in Frontal-Profile in the Wild".

    python -m applications.prepare.cfp --source /sets/cfp-dataset

SOURCE, or a folder in it, has Data/Images/001/frontal/01.jpg ... 10.jpg and profile/01.jpg ... 04.jpg of 500 people,
and Protocol/ with Pair_list_F.txt, Pair_list_P.txt and Split/{FF,FP}/{01..10}/{same,diff}.txt (or --protocol DIR).

DATA_DIR/cfp_align_112/ gets cfp_ff/ and cfp_fp/ with their _list.npy, which train.py and validation.py find
automatically, their _pairs.txt and .json, and aligned/ with the aligned faces, which may be removed. Each set has 7,000
pairs: the ten splits in order, each with 350 same and then 350 different pairs. No pair is left out: if no face is
found, as happens in profile, the program searches with lower thresholds, and then uses the full image, which in CFP
shows little more than the face.
"""

from dataclasses import dataclass
from pathlib import Path

from util.cli.parser import Settings, flag, option, parse, processes
from util.cli.types import to_file
from util.errors import DataError, run_script
from util.files import format_names, read_bytes, sha256
from util.parallel import resumable

OUT = "cfp_align_112"
# {set: (split, kind of the first image, kind of the second image)}
SETS = {"cfp_ff": ("FF", "frontal", "frontal"), "cfp_fp": ("FP", "frontal", "profile")}
LISTS = {"frontal": "Pair_list_F.txt", "profile": "Pair_list_P.txt"}
IMAGES_OF = {"frontal": 10, "profile": 4}  # images of each person
PEOPLE = 500
SPLITS = 10
OF_A_KIND = 350  # same pairs, and as many different pairs, in each split


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """The settings of applications.prepare.cfp."""

    source: Path = option(type=to_file, metavar="DIR", help="folder of the published set", required=True)
    protocol: Path | None = option(type=to_file, metavar="DIR", help="folder Protocol", default_help="found in SOURCE")
    data_dir: Path = option(default=Path("data"), type=to_file, metavar="DIR", help="folder of the sets")
    force: bool = flag(help="start again, and replace a set that exists")
    processes: int | None = processes()


@resumable
def main(arguments: list[str]) -> None:
    flags = parse(Flags, "-m applications.prepare.cfp", arguments, description=__doc__)

    # These take seconds to import: report mistakes in the command line first.
    from applications.prepare.align_pairs import align_all, full_image
    from applications.prepare.write_set import is_made, new_order, write_aligned

    images, protocol = find_folders(flags.source, flags.protocol)
    folder = flags.data_dir / OUT
    # The sets to make, and the photographs that they need.
    to_make = {}
    photographs: set[str] = set()
    for name, (split, *_) in SETS.items():
        pairs = read_protocol(protocol, name)
        checksums = [sha256(file) for file in sorted((protocol / "Split" / split).rglob("*.txt"))]
        made_from = {"program": "cfp", "photographs": str(images.resolve()), "protocol": checksums}
        if not is_made(folder / name, made_from, flags.force):
            to_make[name] = (pairs, made_from)
            for first, second, _ in pairs:
                photographs |= {first, second}
    if not to_make:
        return
    missing = sorted(name for name in photographs if not (images / name).is_file())
    if missing:
        raise DataError(
            f"{images}: {len(missing)} of {len(photographs)} images of the protocol are missing, first "
            f"{format_names(missing, 3)}. Unpack the set again."
        )
    root = folder / "aligned"
    aligned = align_all(images, sorted(photographs), root, full_image, processes=flags.processes, force=flags.force)
    for name, (pairs, made_from) in to_make.items():
        write_aligned(folder / name, aligned, pairs, order=new_order(protocol, pairs), made_from=made_from)
    print(f"use them: python validation.py --data_dir {flags.data_dir}")


def find_folders(source: Path, protocol: Path | None) -> tuple[Path, Path]:
    """Return the folders of the people, 001 to 500, and of the protocol. Raise DataError if one is missing."""
    roots = [source, *sorted(folder for folder in source.glob("*") if folder.is_dir())]
    images = [root / "Data" / "Images" for root in roots] + [root / "Images" for root in roots]
    protocols = [protocol] if protocol else [root / "Protocol" for root in roots]
    found = []
    for candidates, parent, child in ((images, "Data/Images", "001"), (protocols, "Protocol", "Split")):
        folder = next((folder for folder in candidates if (folder / child).is_dir()), None)
        if folder is None:
            place = protocol if protocol and child == "Split" else f"{source} and the folders in it"
            raise DataError(f"{place}: no {parent}/{child}. Name the folder of the published set.")
        found.append(folder)
    return found[0], found[1]


def read_protocol(protocol: Path, name: str) -> list[tuple[str, str, bool]]:
    """Read the 7,000 pairs of a set of SETS: (image, image, same), with images relative to Data/Images.

    Raises DataError if a file of the protocol is missing or damaged.
    """
    split, first, second = SETS[name]
    first_images = read_images(protocol, first)
    second_images = read_images(protocol, second)
    pairs = []
    for number in range(1, SPLITS + 1):
        for kind, same in (("same", True), ("diff", False)):
            file = protocol / "Split" / split / f"{number:02d}" / f"{kind}.txt"
            for one, other in _read_numbers(file, len(first_images), len(second_images)):
                pairs.append((first_images[one - 1], second_images[other - 1], same))
    return pairs


def _read_numbers(file: Path, first_max: int, second_max: int) -> list[tuple[int, int]]:
    """Read the 350 pairs of image numbers, counted from 1, in a file of a split. Raise DataError for other content."""
    pairs = []
    for line, text in enumerate(_read_text(file).split("\n"), start=1):
        words = [word.strip() for word in text.split(",")]
        if words == [""]:
            continue
        if len(words) != 2 or not all(word.isdecimal() and len(word) < 10 for word in words):
            raise DataError(f"{file}, line {line}: must be two numbers such as `7,448`, but is {text[:50]!r}.")
        first, second = int(words[0]), int(words[1])
        if not (1 <= first <= first_max and 1 <= second <= second_max):
            raise DataError(
                f"{file}, line {line}: {text.strip()}, but the images are numbered from 1 to {first_max} and "
                f"{second_max}. Copy the protocol again."
            )
        pairs.append((first, second))
    if len(pairs) != OF_A_KIND:
        raise DataError(f"{file}: {len(pairs)} pairs, but each split has {OF_A_KIND}. Copy the protocol again.")
    return pairs


def read_images(protocol: Path, kind: str) -> list[str]:
    """Return the images of a kind, such as 001/frontal/01.jpg, ordered by their numbers in the protocol.

    The numbers follow the order of the people. If the published list (`1 ../Data/Images/001/frontal/01.jpg`) is in the
    protocol, it must agree. Raises DataError if it does not.
    """
    images = []
    for person in range(1, PEOPLE + 1):
        images += [f"{person:03d}/{kind}/{image:02d}.jpg" for image in range(1, IMAGES_OF[kind] + 1)]
    file = protocol / LISTS[kind]
    if not file.exists():
        return images
    listed = [line.split() for line in _read_text(file).split("\n") if line.strip()]
    for number, (words, image) in enumerate(zip(listed, images, strict=False), start=1):
        if len(words) != 2 or words[0] != str(number) or not words[1].endswith(f"/{image}"):
            raise DataError(
                f"{file}: image {number} should be {image}, but the list has {' '.join(words)[:80]!r}. "
                f"Copy the protocol again."
            )
    if len(listed) != len(images):
        raise DataError(f"{file}: lists {len(listed)} images, but CFP has {len(images)}. Copy the protocol again.")
    return images


def _read_text(file: Path) -> str:
    """Return the text of a file of the protocol. Raise DataError if it is missing or not ASCII."""
    try:
        return read_bytes(file, "Copy the protocol again.").decode("ascii")
    except UnicodeDecodeError:
        raise DataError(f"{file}: not the text of a protocol. Copy the protocol again.") from None


if __name__ == "__main__":
    run_script(main)
