"""TinyFace (Cheng et al. 2018): search probes of native low resolution among 4,443 mates and 153,428 distractors.

The published layout, in the folder Testing_Set:

gallery_match_img_ID_pairs.mat     gallery_set: names of the images in Gallery_Match, gallery_ids: their people
probe_img_ID_pairs.mat             probe_set: names of the images in Probe, probe_ids: their people
Gallery_Match/  Gallery_Distractor/  Probe/

The protocol of the authors' evaluation code: every image of the gallery is a template of its own, and a distractor is
never a mate. Rank-k and the mean average precision are over all probes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import cv2
import numpy as np

from applications.evaluate_identities.report import Evaluation
from util.data.decode import MAX_IMAGE_BYTES, decode_image
from util.embedding import EmbeddedImages
from util.errors import DataError
from util.face import FACE_SIZE
from util.files import read_bytes
from util.identification import search
from util.image_io import SUFFIXES
from util.image_tree import walk

LISTS = ("gallery_match_img_ID_pairs.mat", "probe_img_ID_pairs.mat")
GALLERY, DISTRACTORS, PROBES = "Gallery_Match", "Gallery_Distractor", "Probe"
RANKS = (1, 5, 20)
DISTRACTOR = -100  # the person of a distractor, as in the authors' code
_FIX = "Restore it."


class TinyFaceSet:
    """The images of TinyFace: probes first, then the gallery with its mates, then the distractors."""

    def __init__(self, lists: Path, images: Path):
        """Read the lists and find all images. Raise DataError for a damaged list or a missing image."""
        probe_names, self.probe_ids = _read_list(lists / LISTS[1], "probe")
        mate_names, mate_ids = _read_list(lists / LISTS[0], "gallery")
        distractors = list(_find_images(images / DISTRACTORS).values())
        self._paths = [
            *_place(probe_names, images / PROBES, lists / LISTS[1]),
            *_place(mate_names, images / GALLERY, lists / LISTS[0]),
            *distractors,
        ]
        self.gallery_ids = np.append(mate_ids, np.full(len(distractors), DISTRACTOR))
        if missing := len(set(self.probe_ids.tolist()) - set(mate_ids.tolist())):
            raise DataError(f"{lists / LISTS[1]}: {missing} people have no image in the gallery. {_FIX}")
        self._place = images
        self._stretched: set[int] = set()

    @classmethod
    def find(cls, folder: Path, images: Path | None) -> Self | None:
        """Open TinyFace if its lists are in the folder or in its Testing_Set, with images there or in `images`."""
        for place in (folder, folder / "Testing_Set"):
            if all((place / name).is_file() for name in LISTS):
                return cls(place, images or place)
        return None

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> np.ndarray:
        """Return image `index`, (S, S, 3) RGB uint8. An image that is not square is stretched, and counted."""
        path = self._paths[index]
        image = decode_image(read_bytes(path, _FIX, MAX_IMAGE_BYTES), str(path), _FIX)
        if image.shape[0] != image.shape[1]:
            self._stretched.add(index)
            image = cv2.resize(image, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_CUBIC)
        return image

    def describe(self) -> str:
        """Return the line that the program prints."""
        mates = int(np.count_nonzero(self.gallery_ids != DISTRACTOR))
        distractors = len(self.gallery_ids) - mates
        return (
            f"TinyFace in {self._place}: {len(self.probe_ids):,} probes, a gallery of {mates:,} images of their people "
            f"and {distractors:,} distractors"
        )

    def evaluate(self, embedded: EmbeddedImages) -> Evaluation:
        """Search the probes in the gallery, by the embeddings of all images."""
        evaluation = Evaluation("TinyFace", facts=[self.describe()])
        if self._stretched:
            evaluation.facts.append(
                f"warning: {len(self._stretched):,} images are not square: the faces are not aligned, and the figures "
                f"are lower than published ones. Give aligned images with --images."
            )
        count = len(self.probe_ids)
        found = search(embedded.embeddings[:count], self.probe_ids, embedded.embeddings[count:], self.gallery_ids)
        evaluation.add_searches({"TinyFace": found}, RANKS, ())
        precision = found.mean_average_precision
        evaluation.tables["Mean average precision"] = [["probes", "mAP"], [f"{count:,}", f"{precision:.4f}"]]
        evaluation.figures["mean_average_precision"] = precision
        return evaluation


def _read_list(path: Path, kind: str) -> tuple[list[str], np.ndarray]:
    """Return the names (N) and people (N,) in a .mat file with the variables KIND_set and KIND_ids."""
    from scipy.io import loadmat

    try:
        content = loadmat(path)
        names = [str(np.ravel(cell)[0]) for cell in np.ravel(content[f"{kind}_set"])]  # a cell holds a text
        ids = np.ravel(content[f"{kind}_ids"]).astype(np.int64)
        if not len(names) == len(ids) > 0:
            raise ValueError(f"{len(names)} names and {len(ids)} people")
    except Exception as error:  # scipy raises many types on damaged files
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a list of TinyFace that can be read ({reason}). Copy it again.") from None
    return names, ids


def _find_images(folder: Path) -> dict[str, Path]:
    """Return {name without suffix: file} of the images in a folder and its folders. Raise DataError without any."""
    found = {file.stem: file for file in _images_below(folder)}
    if not found:
        raise DataError(f"{folder}: no images in it. Copy them there, or name another folder with --images.")
    return found


def _images_below(folder: Path) -> Iterator[Path]:
    for place, names in walk(folder, dest=folder / ".none"):  # there is no destination to skip
        yield from (folder / place / name for name in names if Path(name).suffix.lower() in SUFFIXES)


def _place(names: list[str], folder: Path, list_file: Path) -> list[Path]:
    """Return the files of names, whose suffix may be another: aligned images are often saved as PNG."""
    found = _find_images(folder)
    missing = [name for name in names if Path(name).stem not in found]
    if missing:
        raise DataError(
            f"{list_file}: {len(missing)} of its images are not in {folder}, first {missing[0]:.200}. {_FIX}"
        )
    return [found[Path(name).stem] for name in names]
