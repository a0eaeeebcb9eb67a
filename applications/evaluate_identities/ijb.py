"""IJB-B and IJB-C (Whitelam et al. 2017, Maze et al. 2018), in the layout and by the protocol of InsightFace.

The folder, here of IJB-C; for IJB-B the names begin with ijbb:

loose_crop/1.jpg …                        faces that are cut out loosely
meta/ijbc_name_5pts_score.txt             NAME, five landmarks x y, score of the detector: one line an image
meta/ijbc_face_tid_mid.txt                NAME TEMPLATE MEDIUM: in the same order
meta/ijbc_template_pair_label.txt         TEMPLATE TEMPLATE 0|1: the pairs of 1:1
meta/ijbc_1N_gallery_G1.csv  …_G2.csv     TEMPLATE_ID,SUBJECT_ID,…: the two galleries of 1:N (S1 and S2 for IJB-B)
meta/ijbc_1N_probe_mixed.csv              the probes

Each image is aligned by its landmarks. Its embedding is the sum with the mirror image, not normalized, times the score
of the detector. util.identification.aggregate_templates() makes the templates.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Self

import numpy as np

from applications.align import align
from applications.evaluate_identities.report import Evaluation
from util.data.decode import MAX_IMAGE_BYTES, decode_image
from util.embedding import EmbeddedImages
from util.errors import DataError
from util.files import read_bytes
from util.identification import aggregate_templates, pair_scores, search

TITLES = {"ijbb": "IJB-B", "ijbc": "IJB-C"}
GALLERIES = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
FPIRS = (1e-2, 1e-1)
RANKS = (1, 5, 10)
_FIX = "Restore it."


class IjbSet:
    """The images of IJB-B or IJB-C, with templates, pairs, and the galleries and probes if their lists are there."""

    def __init__(self, folder: Path, name: str):
        """Read the lists. Raise DataError, naming the file, if one is damaged or an image is missing."""
        meta = folder / "meta"
        self._folder = folder
        self._name = name
        self._landmark_file = meta / f"{name}_name_5pts_score.txt"
        self._names = _read_columns(self._landmark_file, (0,), str)[:, 0]
        points = _read_columns(self._landmark_file, tuple(range(1, 12)), np.float32)
        self._landmarks = points[:, :10].reshape(-1, 5, 2)
        self.scores = points[:, 10]
        self.templates, self.media = _read_columns(meta / f"{name}_face_tid_mid.txt", (1, 2), np.int64).T
        if len(self.templates) != len(self._names):
            raise DataError(
                f"{meta}: {len(self._names)} images in {self._landmark_file.name} and {len(self.templates)} in "
                f"{name}_face_tid_mid.txt. Copy both again."
            )
        pairs = _read_columns(meta / f"{name}_template_pair_label.txt", (0, 1, 2), np.int64)
        self.pairs = self._rows(pairs[:, :2], meta / f"{name}_template_pair_label.txt")
        self.is_same = pairs[:, 2] == 1
        if min(np.count_nonzero(self.is_same), np.count_nonzero(~self.is_same)) < 2:
            raise DataError(
                f"{meta / f'{name}_template_pair_label.txt'}: lacks same or different pairs. Copy it again."
            )

        # The lists of 1:N, which InsightFace offers in another archive.
        files = [meta / f"{name}_1N_gallery_{gallery}.csv" for gallery in GALLERIES[name]]
        files.append(meta / f"{name}_1N_probe_mixed.csv")
        missing = [file.name for file in files if not file.is_file()]
        if 0 < len(missing) < len(files):
            raise DataError(f"{meta / missing[0]}: missing, and the other lists of 1:N are there. Copy it too.")
        self.subjects = [] if missing else [self._read_subjects(file) for file in files]

        on_disk = {path.name for path in (folder / "loose_crop").glob("*")}
        lost = [image for image in self._names.tolist() if image not in on_disk]
        if lost:
            raise DataError(f"{folder / 'loose_crop'}: {len(lost)} images are missing, first {lost[0]}. Copy them.")

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """Open the set if the folder holds one."""
        for name in GALLERIES:
            if (folder / "meta" / f"{name}_face_tid_mid.txt").is_file():
                return cls(folder, name)
        return None

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> np.ndarray:
        """Return face `index`, aligned by its landmarks, as (112, 112, 3) RGB uint8."""
        path = self._folder / "loose_crop" / self._names[index]
        image = decode_image(read_bytes(path, _FIX, MAX_IMAGE_BYTES), str(path), _FIX)
        try:
            return align(image, self._landmarks[index])
        except ValueError as error:
            raise DataError(f"{self._landmark_file}, line {index + 1}: {error}. Copy it again.") from None

    def describe(self) -> str:
        """Return the line that the program prints."""
        searches = "with the lists of 1:N" if self.subjects else "without the lists of 1:N, which are left out"
        counts = f"{len(self):,} images, {len(np.unique(self.templates)):,} templates, {len(self.pairs):,} pairs"
        return f"{TITLES[self._name]} in {self._folder}: {counts}, {searches}"

    def evaluate(self, embedded: EmbeddedImages) -> Evaluation:
        """Verify the pairs of templates, and search the probes in both galleries, by the embeddings of all images."""
        evaluation = Evaluation(TITLES[self._name], facts=[self.describe()])
        weights = embedded.norms * self.scores
        _, templates = aggregate_templates(embedded.embeddings * weights[:, None], self.templates, self.media)
        scores = pair_scores(templates, self.pairs[:, 0], self.pairs[:, 1])
        evaluation.add_pairs(TITLES[self._name], scores, self.is_same)
        if self.subjects:
            *galleries, (probe_rows, probe_ids) = self.subjects
            searches = {
                name: search(templates[probe_rows], probe_ids, templates[rows], ids)
                for name, (rows, ids) in zip(GALLERIES[self._name], galleries, strict=True)
            }
            evaluation.add_searches(searches, RANKS, FPIRS)
        return evaluation

    def _read_subjects(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows (T,) of the templates in a list of 1:N, each once, and their subjects (T,)."""
        listed = _read_columns(file, (0, 1), np.int64, separator=",", skip=1)
        templates, first = np.unique(listed[:, 0], return_index=True)
        return self._rows(templates, file), listed[first, 1]

    def _rows(self, templates: np.ndarray, file: Path) -> np.ndarray:
        """Return the positions of templates among all templates, ascending. Raise DataError for an unknown one."""
        known = np.unique(self.templates)
        rows = np.searchsorted(known, templates)
        wrong = known[np.minimum(rows, len(known) - 1)] != templates
        if wrong.any():
            raise DataError(
                f"{file}: template {templates[wrong][0]} has no image in {self._name}_face_tid_mid.txt. Copy both "
                f"again."
            )
        return rows


def _read_columns(
    file: Path, columns: tuple[int, ...], kind: type, *, separator: str | None = None, skip: int = 0
) -> np.ndarray:
    """Return some columns of a text file, (N, number of columns) of `kind`. Raise DataError if that fails."""
    if not file.is_file():
        raise DataError(f"{file}: missing. Copy all lists of the set.")
    try:
        with warnings.catch_warnings(action="ignore"):  # of an empty file
            found: np.ndarray = np.loadtxt(
                file, kind, delimiter=separator, skiprows=skip, usecols=columns, ndmin=2, comments=None
            )
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise DataError(f"{file}: cannot be read as a list of IJB ({reason}). Copy it again.") from None
    if not len(found):
        raise DataError(f"{file}: empty. Copy it again.")
    return found
