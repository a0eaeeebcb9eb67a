"""What was found in a training set, as text, as rows of a list and as a page of pictures."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import cv2
import numpy as np

from applications.prepare.clean_find import THUMBNAIL, Finding, TrainingSet
from applications.prepare.clean_list import (
    DUPLICATE,
    KINDS,
    MISLABELED,
    OUTLIER,
    TWO_NAMES,
    VERIFICATION,
    Row,
    image_name,
)
from util.cli.types import split_pair_set
from util.data.decode import decode_face
from util.data.loader import TrainingImages, open_training_images
from util.embedding import EmbeddedImages
from util.html_page import Section, paragraph, picture, pictures, render_page, table
from util.image_tree import printable
from util.pairs import PairSet, load_pairs
from util.transform import full_crop

PICTURES = 100  # findings of each kind on the page
# Headings on the page, and what its pictures show.
_TITLES = {
    MISLABELED: ("Images that fit another person", "The image, its own person, and the person that it fits."),
    OUTLIER: ("Images that fit nobody", "The image, its own person, and the most similar other person."),
    TWO_NAMES: ("People under two names", "The person with fewer images first."),
    DUPLICATE: ("Copies of an image", "The copy, and the image that is kept."),
    VERIFICATION: ("People who are in a verification set", "The person, and the image in the verification set."),
}


class FingerprintedImages:
    """A training set that notes the hash of each file, (N,) uint64, and a gray thumbnail, while it is embedded."""

    def __init__(self, images: TrainingImages):
        self._images = images
        self.hashes = np.zeros(len(images), np.uint64)
        self.thumbnails = np.zeros((len(images), THUMBNAIL, THUMBNAIL), np.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (S, S, 3) RGB uint8. Raise DataError if it cannot be used."""
        encoded = self._images.encoded(index)
        image = decode_face(encoded, self._images.where(index), "Restore it or remove it.")
        self.hashes[index] = int.from_bytes(blake2b(encoded, digest_size=8).digest())
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        self.thumbnails[index] = cv2.resize(gray, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        return image


class VerificationImages:
    """The images of a verification set, and which of them show one person."""

    def __init__(self, source: PairSet | TrainingImages, name: str):
        self._source = source
        self._name = name

    def __len__(self) -> int:
        return len(self._source) * (2 if isinstance(self._source, PairSet) else 1)

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (S, S, 3) RGB uint8. Raise DataError if it cannot be used."""
        if isinstance(self._source, PairSet):
            return self._source.images(index, index + 1)[0]
        return self._source.image(index)

    def name(self, index: int) -> str:
        """Return the place of image `index`."""
        if isinstance(self._source, PairSet):
            return f"{self._name}, pair {index // 2 + 1}, image {index % 2 + 1}"
        return self._source.where(index)

    def templates(self, embedded: EmbeddedImages) -> tuple[np.ndarray, np.ndarray]:
        """Return an embedding (V, D) for each person, and an image (V,) of each.

        In a set of pairs that is the mean of a same pair, and each image of a different pair.
        """
        if isinstance(self._source, PairSet):
            pair = embedded.indices // 2
            people = np.where(self._source.issame[pair], 2 * pair, embedded.indices)
        else:
            people = self._source.labels[embedded.indices]
        _, first, people = np.unique(people, return_index=True, return_inverse=True)
        sums = np.zeros((len(first), embedded.embeddings.shape[1]), np.float32)
        np.add.at(sums, people, embedded.embeddings)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True), embedded.indices[first]


def open_verification(text: str) -> VerificationImages:
    """Open a folder of people, a .rec file, or a verification set, PATH or LIST:ROOT."""
    _, place, root = split_pair_set(text)
    path = Path(place)
    is_people = path.suffix == ".rec" or (path.is_dir() and not (path / "meta" / "storage").is_file())
    return VerificationImages(open_training_images(path) if is_people else load_pairs(path, root), path.name)


class CleaningReport:
    """The findings in a training set.

    Args:
        images: the set.
        indices: (N,) the positions in the set of the images that were embedded.
        people: (C,) the classes of the set that have an embedded image.
        found_in: the embeddings, whose labels count in `people`.
    """

    def __init__(self, images: TrainingImages, indices: np.ndarray, people: np.ndarray, found_in: TrainingSet):
        self._images = images
        self._indices = indices
        self._people = people
        self._set = found_in
        self._facts: list[str] = []
        self._findings: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
        self._verification: list[VerificationImages] = []  # of each finding of the kind

    def search(self, fingerprinted: FingerprintedImages, *, own_far: float, far: float | None) -> None:
        """Search for all that needs no other set."""
        found, threshold = self._set.find_mislabeled(far)
        self._findings[MISLABELED] = sorted(
            (finding for finding in found if finding.kind == MISLABELED), key=lambda finding: -finding.cosine
        )
        self._findings[OUTLIER] = sorted(
            (finding for finding in found if finding.kind == OUTLIER), key=lambda finding: finding.own_cosine
        )
        two_names, name_threshold = self._set.find_two_names(far)
        self._findings[TWO_NAMES] = sorted(two_names, key=lambda finding: -finding.cosine)
        self._findings[DUPLICATE] = self._set.find_duplicates(
            fingerprinted.hashes[self._indices], fingerprinted.thumbnails[self._indices]
        )
        rate = "one expected false accept in each search" if far is None else f"FAR {far:g}"
        self._facts += [
            f"{len(self._indices):,} images of {len(self._people):,} people in {printable(self._images.root)}",
            f"an image is doubtful if its cosine with its person is below {self._set.own_threshold:.3f} "
            f"(FAR {own_far:g})",
            f"an image fits another person from {threshold:.3f}, and two people are one from {name_threshold:.3f} "
            f"({rate})",
        ]

    def search_verification(self, others: VerificationImages, embedded: EmbeddedImages, *, far: float | None) -> None:
        """Search for people of a verification set."""
        templates, shown = others.templates(embedded)
        found, threshold = self._set.find_verification_people(templates, shown, far)
        found.sort(key=lambda finding: -finding.cosine)
        self._findings[VERIFICATION] += found
        self._verification += [others] * len(found)
        self._facts.append(
            f"{others.name(0).split(', pair')[0]}: {len(templates):,} people or images; found from {threshold:.3f}"
        )

    def rows(self) -> list[Row]:
        """Return the rows of the list."""
        return [self._row(kind, number) for kind in KINDS for number in range(len(self._findings[kind]))]

    def text(self, shown: int) -> str:
        """Return the facts, and the first findings of each kind, for the console."""
        lines = list(self._facts)
        for kind, found in self._findings.items():
            lines.append(f"{kind}: {len(found):,}")
            for number in range(min(shown, len(found))):
                row = self._row(kind, number)
                other = row.other_image or row.other_person
                own = f", own person {row.own_cosine}" if row.own_cosine else ""
                lines.append(f"  {printable(row.image or row.person)}: {printable(other)} {row.cosine}{own}")
            if len(found) > shown:
                lines.append(f"  and {len(found) - shown:,} more")
        return "\n".join(lines)

    def page(self) -> str:
        """Return the page with pictures."""
        counts = [[_TITLES[kind][0], f"{len(found):,}"] for kind, found in self._findings.items()]
        sections = [Section("What was found", [*map(paragraph, self._facts), table(["", "number"], counts)])]
        for kind, found in self._findings.items():
            title, shown = _TITLES[kind]
            number = min(len(found), PICTURES)
            note = f"{shown} The first {number} of {len(found):,}." if number < len(found) else shown
            drawn = pictures([picture(*self._draw(kind, position)) for position in range(number)])
            sections.append(Section(title, [paragraph(note if found else "None."), drawn]))
        return render_page(f"Findings in {printable(self._images.root)}", sections)

    def _row(self, kind: str, number: int) -> Row:
        finding = self._findings[kind][number]
        other_image = self._image_name(finding.other_image)
        if kind == VERIFICATION:
            other_image = self._verification[number].name(finding.other_image)
        return Row(
            kind,
            person=self._person_name(finding.person),
            image=self._image_name(finding.image),
            other_person=self._person_name(finding.other_person),
            other_image=other_image,
            cosine=f"{finding.cosine:.4f}",
            own_cosine="" if np.isnan(finding.own_cosine) else f"{finding.own_cosine:.4f}",
        )

    def _person_name(self, label: int) -> str:
        return self._images.classes[self._people[label]] if label >= 0 else ""

    def _image_name(self, position: int) -> str:
        return image_name(self._images, int(self._indices[position])) if position >= 0 else ""

    def _draw(self, kind: str, number: int) -> tuple[np.ndarray, str]:
        """Return the images of a finding side by side, with a caption."""
        finding = self._findings[kind][number]
        row = self._row(kind, number)
        shown = [finding.image if finding.image >= 0 else self._set.nearest_to_center(finding.person)]
        caption = f"{row.image or row.person}"
        if kind in (MISLABELED, OUTLIER):
            shown.append(self._other_image_of(finding.person, finding.image))
            caption += f"\nown person: cosine {row.own_cosine}"
        if kind == VERIFICATION:
            faces = [self._face(shown[0]), full_crop(self._verification[number].image(finding.other_image))]
            return np.hstack(faces), printable(f"{caption}\n{row.other_image}: cosine {row.cosine}")
        shown.append(finding.other_image)
        caption += f"\n{row.other_image if kind == DUPLICATE else row.other_person}: cosine {row.cosine}"
        return np.hstack([self._face(position) for position in shown]), printable(caption)

    def _other_image_of(self, person: int, image: int) -> int:
        """Return the image of a person that is most similar to the center, but another than `image`."""
        nearest = self._set.nearest_to_center(person)
        others = self._set.groups[person][self._set.groups[person] != image]
        return nearest if nearest != image or not len(others) else int(others[0])

    def _face(self, position: int) -> np.ndarray:
        return full_crop(self._images.image(int(self._indices[position])))
