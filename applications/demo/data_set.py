"""Make the demo data set, whose layout applications/demo/__main__.py describes."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from applications.demo.drawn.person import Condition, Person
from applications.demo.drawn.photograph import photograph
from applications.demo.drawn.render import render_face
from util.errors import UsageError
from util.files import Provenance
from util.image_io import write_image
from util.pairs.bcolz import write_carray
from util.parallel import parallel_map
from util.verification import FOLDS

DRAWING = 2  # increase it when the renderer changes, so that older sets no longer count as equal
MARKER = "demo.json"  # in every complete set; it holds the Settings
SHEET_NUMBER = 10_000  # number of the first image of the contact sheet
RAW_NUMBER = 20_000  # number of the first photograph
# Set: (its path, conditions of the first and of the second image of a pair)
VALIDATION_SETS = {
    "lfw": ("lfw_align_112/lfw", ("mixed", "mixed")),
    "cfp_ff": ("cfp_align_112/cfp_ff", ("frontal", "frontal")),
    "cfp_fp": ("cfp_align_112/cfp_fp", ("frontal", "profile")),
    "agedb_30": ("AgeDB/agedb_30", ("young", "old")),
}
SHEET = "contact_sheet.png"
# The images of a training person cycle through these conditions, which include all conditions above.
TRAINING_KINDS = ("mixed", "profile", "mixed", "young", "frontal", "mixed", "old", "mixed", "profile", "mixed")
RAW_PEOPLE = 12
# The photographs of each of these people; two conditions stand for two people on one photograph.
RAW_KINDS = (("frontal",), ("mixed",), ("old", "frontal"), ("young",))
SHEET_KINDS = ("frontal", "frontal", "mixed", "mixed", "mixed", "profile", "young", "old")
README = """These faces are drawn, not photographed: nobody in this folder exists.

Made by python -m applications.demo with {settings}.
imgs/ is for training, and raw/ has photographs of some of its people before alignment. lfw_align_112/, cfp_align_112/
and AgeDB/ hold four verification sets, named after the real sets whose conditions they imitate. Results on drawn faces
show that a program works. They do not show how well it recognizes people.
"""


@dataclass(frozen=True)
class Settings:
    """All settings that the data set depends on."""

    seed: int
    people: int  # in the training set
    images: int  # of each training person
    pairs: int  # in each validation set
    drawing: int = DRAWING


@dataclass(frozen=True)
class Face:
    """One drawn image: the person, the number of the image, and the conditions."""

    seed: int
    person: int
    image: int
    kind: str  # as in Condition.sample


def people_of(settings: Settings) -> dict[str, list[int]]:
    """Return the numbers of the people in each set, "imgs" first. No number is in two sets."""
    counts = {"imgs": settings.people} | {name: settings.pairs // 2 for name in VALIDATION_SETS}
    people = {}
    first = 1
    for name, count in counts.items():
        people[name] = list(range(first, first + count))
        first += count
    return people


def person_name(number: int) -> str:
    """Return the folder name of a drawn person."""
    return f"drawn_{number:04d}"


def training_faces(settings: Settings) -> list[Face]:
    """Return all images of the training people, ordered by person."""
    return [
        Face(settings.seed, person, image, TRAINING_KINDS[image % len(TRAINING_KINDS)])
        for person in people_of(settings)["imgs"]
        for image in range(settings.images)
    ]


def validation_faces(settings: Settings, name: str) -> tuple[list[Face], list[bool]]:
    """Return the images of a validation set, two for each pair, and whether each pair shows the same person.

    No person is in two of the ten contiguous folds. Same and different pairs alternate in a fold. A fold of k people
    has k same pairs (one for each person) and k different pairs (each person with the next one).
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
def sample_person(seed: int, number: int) -> Person:
    """Return the drawn person of that number."""
    return Person.sample(np.random.default_rng((seed, number)))


def render(face: Face) -> np.ndarray:
    """Return the image of a face, (112, 112, 3) RGB uint8."""
    person = sample_person(face.seed, face.person)
    condition = Condition.sample(np.random.default_rng((face.seed, face.person, face.image + 1)), person, face.kind)
    return render_face(person, condition)[0]


def make_faces(folder: Path, people: int, images: int, seed: int = 1337, processes: int = 1) -> None:
    """Write the training images alone, `images` of each of the `people`, as folder/PERSON/PERSON_0001.jpg and so on."""
    faces = training_faces(Settings(seed, people, images, pairs=0))
    with parallel_map(_render_item, None, faces, processes, fork=False) as rendered:
        _write_people(folder, faces, rendered)


def replace_set(out: Path, settings: Settings, processes: int, force: bool) -> None:
    """Make the set under a temporary name and rename it, so that `out` is never incomplete.

    Raises UsageError unless `out` is missing, empty, or an earlier demo set that `force` may replace.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file. Name a folder.")
    if (out / MARKER).is_file():
        if not force:
            raise UsageError(f"--out {out}: has drawn faces of other settings. Add --force or name another folder.")
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"--out {out}: has other content, which is never overwritten. Name another folder.")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make(partial, settings, processes)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def make(folder: Path, settings: Settings, processes: int) -> None:
    """Write the complete data set into `folder`."""
    people = people_of(settings)
    training = training_faces(settings)
    sets = {name: validation_faces(settings, name) for name in VALIDATION_SETS}
    # The faces on each photograph, beginning with the person it is named after; a second face shows the next person.
    shown_people = people["imgs"][:RAW_PEOPLE]
    photographs = []
    for first, second in zip(shown_people, shown_people[1:] + shown_people[:1], strict=True):
        for image, kinds in enumerate(RAW_KINDS):
            pairs = zip((first, second), kinds, strict=False)
            photographs.append([Face(settings.seed, person, RAW_NUMBER + image, kind) for person, kind in pairs])
    sheet = [
        Face(settings.seed, person, SHEET_NUMBER + column, kind)
        for person in people["imgs"][:8]
        for column, kind in enumerate(SHEET_KINDS)
    ]
    faces = [*training, *chain(*(faces for faces, _ in sets.values())), *chain(*photographs), *sheet]
    folder.mkdir(parents=True)
    with parallel_map(_render_item, None, faces, processes, fork=False) as rendered:
        images = iter(tqdm(rendered, "drawn faces", len(faces), unit="face", smoothing=0))
        _write_people(folder / "imgs", training, images)
        for name, (pair_faces, issame) in sets.items():
            write_carray(folder / VALIDATION_SETS[name][0], islice(images, len(pair_faces)), issame)
        for shown in photographs:
            face = shown[0]
            rng = np.random.default_rng((face.seed, face.person, face.image))
            picture = photograph(list(islice(images, len(shown))), rng)
            write_image(_image_file(folder / "raw", face.person, face.image - RAW_NUMBER), picture)
        # A row for each person, a column for each condition.
        across = len(SHEET_KINDS)
        rows = [np.hstack(list(islice(images, across))) for _ in range(0, len(sheet), across)]
        write_image(folder / SHEET, np.vstack(rows))
    names = {name: [person_name(number) for number in numbers] for name, numbers in people.items()}
    (folder / "people.json").write_text(json.dumps(names, indent=1) + "\n")
    (folder / "README.txt").write_text(README.format(settings=settings))
    Provenance(folder / MARKER, asdict(settings)).write()


def _render_item(_: None, face: Face) -> np.ndarray:
    return render(face)


def _write_people(folder: Path, faces: list[Face], images: Iterator[np.ndarray]) -> None:
    for face, image in zip(faces, images, strict=False):  # more images may follow
        write_image(_image_file(folder, face.person, face.image), image)


def _image_file(folder: Path, person: int, image: int) -> Path:
    name = person_name(person)
    return folder / name / f"{name}_{image + 1:04d}.jpg"
