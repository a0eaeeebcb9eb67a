"""Draws the demo data set: a training folder and four verification sets of drawn faces. No real person is in it.

    python -m applications.demo --out data/demo
    python -m applications.demo --out data/demo --people 200 --images 30 --pairs 1000

Every face is drawn from random numbers of (seed, person, image), so that the same flags give the same bytes on any
number of processes. The layout is the one that train.py and validation.py read:

    OUT/imgs/PERSON/PERSON_0001.jpg          training people, 112x112
    OUT/lfw_align_112/lfw                    light, pose, expression, age and blur all vary
    OUT/cfp_align_112/cfp_ff, cfp_fp         frontal with frontal, frontal with profile
    OUT/AgeDB/agedb_30                       one face young, one about 30 years older
    OUT/raw/PERSON/PERSON_0001.jpg           some of the training people before alignment, for applications/align
    OUT/people.json                          who is in which set: nobody in two of them
    OUT/contact_sheet.png, README.txt, demo.json
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from applications.demo.drawn.person import Condition, Person
from applications.demo.drawn.photograph import photograph
from applications.demo.drawn.render import draw_face
from util.cli.argparser import Parser
from util.errors import UsageError, run_script
from util.pairs.bcolz import write_carray
from util.verification import FOLDS

DRAWING = 2  # raise it when the drawing changes: a set drawn before is then another one
JPEG_QUALITY = 95
MARKER = "demo.json"  # in every complete set; it holds the Settings
# Set: (where it lies, conditions of the first and of the second image of a pair)
VALIDATION_SETS = {
    "lfw": ("lfw_align_112/lfw", ("mixed", "mixed")),
    "cfp_ff": ("cfp_align_112/cfp_ff", ("frontal", "frontal")),
    "cfp_fp": ("cfp_align_112/cfp_fp", ("frontal", "profile")),
    "agedb_30": ("AgeDB/agedb_30", ("young", "old")),
}
SHEET = "contact_sheet.png"
# A training person's images go through these in turn: all that the validation sets ask for.
TRAINING_KINDS = ("mixed", "profile", "mixed", "young", "frontal", "mixed", "old", "mixed", "profile", "mixed")
# The unaligned photographs of each of the first people; a tuple of two has another person on it too.
RAW_PEOPLE, RAW_KINDS = 12, (("frontal",), ("mixed",), ("old", "frontal"), ("young",))
SHEET_KINDS = ("frontal", "frontal", "mixed", "mixed", "mixed", "profile", "young", "old")
README = """These faces are drawn, not photographed: nobody in this folder exists.

Made by python -m applications.demo with {settings}.
imgs/ is for training, and raw/ has some of its people as they are before alignment. lfw_align_112/, cfp_align_112/ and
AgeDB/ hold four verification sets, named after the real sets whose conditions they imitate. Figures on drawn faces say
that a program works. They say nothing about how well it recognises people.
"""


@dataclass(frozen=True)
class Settings:
    """What the data set depends on."""

    seed: int
    people: int  # in the training set
    images: int  # of each of them
    pairs: int  # in each validation set
    drawing: int = DRAWING


@dataclass(frozen=True)
class Face:
    """One drawn image: who, which image of the person, and under which conditions."""

    seed: int
    person: int
    image: int
    kind: str  # as in Condition.draw


def people_of(settings: Settings) -> dict[str, list[int]]:
    """The numbers of the people in each set, "imgs" first; no number is in two sets."""
    counts = {"imgs": settings.people} | {name: settings.pairs // 2 for name in VALIDATION_SETS}
    people, first = {}, 1
    for name, count in counts.items():
        people[name] = list(range(first, first + count))
        first += count
    return people


def person_name(number: int) -> str:
    """The name of a drawn person's folder."""
    return f"drawn_{number:04d}"


def training_faces(settings: Settings) -> list[Face]:
    """All images of the training people, person after person."""
    return [
        Face(settings.seed, person, image, TRAINING_KINDS[image % len(TRAINING_KINDS)])
        for person in people_of(settings)["imgs"]
        for image in range(settings.images)
    ]


def validation_faces(settings: Settings, name: str) -> tuple[list[Face], list[bool]]:
    """The images of a validation set, two a pair, and the truth for each pair.

    Each of the ten contiguous folds has people of its own and as many same as different pairs, in alternation. In a
    fold of k people there are k same pairs (each person once) and k different ones (each person with the next).
    """
    first, second = VALIDATION_SETS[name][1]
    people = people_of(settings)[name]
    fold_size = len(people) // FOLDS
    faces, issame = [], []
    for fold in range(FOLDS):
        group = people[fold * fold_size : (fold + 1) * fold_size]
        for person, other in zip(group, group[1:] + group[:1], strict=True):
            faces += [Face(settings.seed, person, 0, first), Face(settings.seed, person, 1, second)]
            faces += [Face(settings.seed, person, 2, first), Face(settings.seed, other, 3, second)]
            issame += [True, False]
    return faces, issame


@lru_cache(maxsize=4)
def draw_person(seed: int, number: int) -> Person:
    """The drawn person of that number."""
    return Person.draw(np.random.default_rng((seed, number)))


def draw(face: Face) -> np.ndarray:
    """Draws a face: (112, 112, 3) RGB uint8."""
    person = draw_person(face.seed, face.person)
    condition = Condition.draw(np.random.default_rng((face.seed, face.person, face.image + 1)), person, face.kind)
    return draw_face(person, condition)[0]


def main(arguments: list[str]) -> None:
    """Makes the data set; see the module's docstring."""
    out, settings, sheet, force, processes = parse(arguments)
    if is_complete(out, settings) and not force:
        print(f"{out}: these drawn faces are there already; nothing to do (--force draws them again)")
    else:
        check_free(out, force)
        replace(out, settings, processes)
        print(
            f"{out}: drawn faces: {settings.people} people for training, and {len(VALIDATION_SETS)} verification sets "
            f"of {settings.pairs} pairs of other people"
        )
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / SHEET, sheet)


def replace(out: Path, settings: Settings, processes: int) -> None:
    """Makes the set under a temporary name and renames it, so that a set that exists is a whole one."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make(partial, settings, processes)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def parse(arguments: list[str]) -> tuple[Path, Settings, Path | None, bool, int]:
    """The command line as (out, settings, sheet, force, processes); raises UsageError."""
    parser = Parser(prog="applications.demo", description="Draws a demo data set of faces: people who do not exist.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--seed", type=int, default=1337, help="another seed draws other people")
    parser.add_argument("--people", type=int, default=120, help="people in the training set")
    parser.add_argument("--images", type=int, default=20, help="images of each of them")
    parser.add_argument("--pairs", type=int, default=400, help="pairs in each of the four validation sets")
    parser.add_argument("--sheet", type=Path, help="also write the contact sheet there, as PNG")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="they change the time, not the faces")
    parser.add_argument("--force", action="store_true", help="draw again what an earlier run has drawn")
    flags = parser.parse_args(arguments)
    for name, low, high in (("people", 2, 5000), ("images", 1, 1000), ("processes", 1, 256)):
        if not low <= getattr(flags, name) <= high:
            raise UsageError(f"--{name} {getattr(flags, name)}: must lie between {low} and {high}")
    if flags.seed < 0:
        raise UsageError(f"--seed {flags.seed}: must not be negative")
    if flags.pairs % (2 * FOLDS) or not 4 * FOLDS <= flags.pairs <= 20000:
        raise UsageError(
            f"--pairs {flags.pairs}: must be a multiple of {2 * FOLDS} from {4 * FOLDS} to 20000, so that each of "
            f"{FOLDS} folds has as many same as different pairs, of two people or more"
        )
    if flags.sheet and flags.sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet {flags.sheet}: the contact sheet is a PNG file; let its name end in .png")
    settings = Settings(flags.seed, flags.people, flags.images, flags.pairs)
    return flags.out.resolve(), settings, flags.sheet, flags.force, flags.processes


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether `out` holds the whole set that these settings make."""
    try:
        return json.loads((out / MARKER).read_text()) == asdict(settings)
    except (OSError, ValueError):
        return False


def check_free(out: Path, force: bool) -> None:
    """Raises UsageError unless `out` may be (re)placed: it is absent, empty, or an earlier demo set and `force`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder")
    if (out / MARKER).is_file():
        if not force:
            raise UsageError(f"--out {out}: holds drawn faces of other settings; add --force or name another folder")
    elif any(out.iterdir()):
        raise UsageError(f"--out {out}: has other content, which is never overwritten; name another folder")


def make(folder: Path, settings: Settings, processes: int) -> None:
    """Draws everything into `folder`."""
    sets = {name: validation_faces(settings, name) for name in VALIDATION_SETS}
    training = training_faces(settings)
    sheet_faces = contact_sheet_faces(settings)
    raw = raw_faces(settings)
    total = len(training) + len(sheet_faces) + sum(map(len, raw)) + sum(len(faces) for faces, _ in sets.values())
    folder.mkdir(parents=True)
    with painters(processes) as paint, tqdm(total=total, desc="drawn faces", unit="face", smoothing=0) as bar:

        def drawn(faces: list[Face]) -> Iterator[np.ndarray]:
            for image in paint(faces):
                bar.update()
                yield image

        write_folder(folder / "imgs", training, drawn(training))
        for name, (faces, issame) in sets.items():
            write_carray(folder / VALIDATION_SETS[name][0], drawn(faces), issame)
        write_raw(folder / "raw", raw, drawn([face for faces in raw for face in faces]))
        write_image(folder / SHEET, contact_sheet(list(drawn(sheet_faces))))
    names = {name: [person_name(number) for number in people] for name, people in people_of(settings).items()}
    (folder / "people.json").write_text(json.dumps(names, indent=1) + "\n")
    (folder / "README.txt").write_text(README.format(settings=settings))
    (folder / MARKER).write_text(json.dumps(asdict(settings)) + "\n")


@contextmanager
def painters(processes: int) -> Iterator[Callable[[list[Face]], Iterable[np.ndarray]]]:
    """Gives a function that draws a list of faces, in its order, on that many processes."""
    if processes == 1:
        yield lambda faces: map(draw, faces)
        return
    with multiprocessing.get_context("spawn").Pool(processes, _start_painter) as pool:
        yield lambda faces: pool.imap(draw, faces, chunksize=10)


def _start_painter() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    cv2.setNumThreads(1)


def write_folder(folder: Path, faces: list[Face], images: Iterator[np.ndarray]) -> None:
    """Writes images as folder/PERSON/PERSON_0001.jpg and so on."""
    for face, image in zip(faces, images, strict=True):
        name = person_name(face.person)
        write_image(folder / name / f"{name}_{face.image + 1:04d}.jpg", image)


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes an RGB uint8 image as JPEG or PNG, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix == ".jpg" else []
    whole, data = cv2.imencode(path.suffix.lower(), image[:, :, ::-1], options)
    assert whole, path
    path.write_bytes(data.tobytes())


def raw_faces(settings: Settings) -> list[list[Face]]:
    """The faces on each of the unaligned photographs, the person's own first."""
    people = people_of(settings)["imgs"][:RAW_PEOPLE]
    return [
        [
            Face(settings.seed, people[(index + other) % len(people)], 20_000 + image, kind)
            for other, kind in enumerate(kinds)
        ]
        for index in range(len(people))
        for image, kinds in enumerate(RAW_KINDS)
    ]


def write_raw(folder: Path, photographs: list[list[Face]], images: Iterator[np.ndarray]) -> None:
    """Writes photographs of the drawn faces as folder/PERSON/PERSON_0001.jpg and so on."""
    for faces in photographs:
        own = faces[0]
        rng = np.random.default_rng((own.seed, own.person, own.image))
        name = person_name(own.person)
        picture = photograph([next(images) for _ in faces], rng)
        write_image(folder / name / f"{name}_{own.image - 20_000 + 1:04d}.jpg", picture)


def contact_sheet_faces(settings: Settings) -> list[Face]:
    """A row for each of the first people, a column for each kind of condition."""
    people = people_of(settings)["imgs"][:8]
    return [
        Face(settings.seed, person, 10_000 + column, kind)
        for person in people
        for column, kind in enumerate(SHEET_KINDS)
    ]


def contact_sheet(images: list[np.ndarray]) -> np.ndarray:
    """The images in rows of people, (rows * 112, 8 * 112, 3) RGB uint8."""
    across = len(SHEET_KINDS)
    return np.vstack([np.hstack(images[start : start + across]) for start in range(0, len(images), across)])


if __name__ == "__main__":
    run_script(main)
