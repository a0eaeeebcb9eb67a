"""Make the demo data set, whose layout applications/demo/__main__.py describes."""

import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from applications.demo.drawn.person import Condition, Person
from applications.demo.drawn.photograph import photograph
from applications.demo.drawn.render import render_face
from util.errors import UsageError
from util.files import Provenance
from util.image_io import write_image
from util.pairs.bcolz import write_carray
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
    """Write the training images of a demo data set as folder/PERSON/PERSON_0001.jpg and so on, without other sets.

    Args:
        folder: the folder to write to.
        people: number of people.
        images: number of images of each person.
        seed: another seed gives other people.
        processes: number of processes; they change the time, not the images.
    """
    faces = training_faces(Settings(seed, people, images, pairs=0))
    with renderer(processes) as render_all:
        _write_people(folder, faces, iter(render_all(faces)))


def replace_set(out: Path, settings: Settings, processes: int) -> None:
    """Make the set under a temporary name and rename it, so that `out` is never incomplete."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make(partial, settings, processes)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(out: Path, force: bool) -> None:
    """Raise UsageError unless `out` is missing, empty, or an earlier demo set that `force` may replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out}: is a file. Name a folder.")
    if (out / MARKER).is_file():
        if not force:
            raise UsageError(f"--out {out}: has drawn faces of other settings. Add --force or name another folder.")
    elif any(out.iterdir()):
        raise UsageError(f"--out {out}: has other content, which is never overwritten. Name another folder.")


def make(folder: Path, settings: Settings, processes: int) -> None:
    """Write the complete data set into `folder`."""
    sets = {name: validation_faces(settings, name) for name in VALIDATION_SETS}
    training = training_faces(settings)
    photographs = raw_faces(settings)
    sheet = contact_sheet_faces(settings)
    raw = [face for faces in photographs for face in faces]
    total = len(training) + len(sheet) + len(raw) + sum(len(faces) for faces, _ in sets.values())
    folder.mkdir(parents=True)
    with renderer(processes) as render_all, tqdm(total=total, desc="drawn faces", unit="face", smoothing=0) as bar:

        def rendered(faces: list[Face]) -> Iterator[np.ndarray]:
            for image in render_all(faces):
                bar.update()
                yield image

        _write_people(folder / "imgs", training, rendered(training))
        for name, (faces, issame) in sets.items():
            write_carray(folder / VALIDATION_SETS[name][0], rendered(faces), issame)
        _write_photographs(folder / "raw", photographs, rendered(raw))
        write_image(folder / SHEET, contact_sheet(list(rendered(sheet))))
    names = {name: [person_name(number) for number in people] for name, people in people_of(settings).items()}
    (folder / "people.json").write_text(json.dumps(names, indent=1) + "\n")
    (folder / "README.txt").write_text(README.format(settings=settings))
    Provenance(folder / MARKER, asdict(settings)).write()


@contextmanager
def renderer(processes: int) -> Iterator[Callable[[list[Face]], Iterable[np.ndarray]]]:
    """Yield a function that renders a list of faces, in order, with that number of processes."""
    if processes == 1:
        yield lambda faces: map(render, faces)
        return
    with multiprocessing.get_context("spawn").Pool(processes, _init_process) as pool:
        yield lambda faces: pool.imap(render, faces, chunksize=10)


def _init_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    cv2.setNumThreads(1)


def _write_people(folder: Path, faces: list[Face], images: Iterator[np.ndarray]) -> None:
    for face, image in zip(faces, images, strict=True):
        name = person_name(face.person)
        write_image(folder / name / f"{name}_{face.image + 1:04d}.jpg", image)


def raw_faces(settings: Settings) -> list[list[Face]]:
    """Return the faces on each photograph before alignment, beginning with the person it is named after."""
    people = people_of(settings)["imgs"][:RAW_PEOPLE]
    photographs = []
    for index in range(len(people)):
        for image, kinds in enumerate(RAW_KINDS):
            faces = []
            for offset, kind in enumerate(kinds):  # the second face shows the next person
                person = people[(index + offset) % len(people)]
                faces.append(Face(settings.seed, person, RAW_NUMBER + image, kind))
            photographs.append(faces)
    return photographs


def _write_photographs(folder: Path, photographs: list[list[Face]], images: Iterator[np.ndarray]) -> None:
    for faces in photographs:
        first = faces[0]
        rng = np.random.default_rng((first.seed, first.person, first.image))
        name = person_name(first.person)
        picture = photograph([next(images) for _ in faces], rng)
        write_image(folder / name / f"{name}_{first.image - RAW_NUMBER + 1:04d}.jpg", picture)


def contact_sheet_faces(settings: Settings) -> list[Face]:
    """Return the faces of the contact sheet: a row for each of the first people, a column for each condition."""
    people = people_of(settings)["imgs"][:8]
    return [
        Face(settings.seed, person, SHEET_NUMBER + column, kind)
        for person in people
        for column, kind in enumerate(SHEET_KINDS)
    ]


def contact_sheet(images: list[np.ndarray]) -> np.ndarray:
    """Return the images in rows of people, (rows * 112, 8 * 112, 3) RGB uint8."""
    across = len(SHEET_KINDS)
    return np.vstack([np.hstack(images[start : start + across]) for start in range(0, len(images), across)])
