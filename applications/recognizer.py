"""Recognize faces from Python, with any network that validation.py reads:

    from applications.recognizer import Recognizer

    recognizer = Recognizer("net.onnx")
    print(recognizer.compare("a.jpg", "b.jpg").cosine)
    gallery = recognizer.enroll("people")  # people/NAME/IMAGE.jpg
    for match in recognizer.search("group.jpg", gallery, far=0.01):
        print(match.name or "unknown", match.cosine)

An image is the path of a photograph, or (H, W, 3) RGB uint8.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from applications.align.batch import select_face
from applications.align.detector import Detector, Face
from applications.align.warp import align
from model.backbone.fold import fold_batch_norm
from util.calibration import find_calibration
from util.checkpoint.run_dir import find_backbone
from util.cli.options import PhotographSettings
from util.cli.types import EMBEDDING_SUFFIXES
from util.console import logger
from util.device import default_eval_batch_size, prepare_module, select_devices
from util.embedding_table import read_table
from util.errors import DataError, UsageError
from util.evaluate import embed
from util.face import ARCFACE_TEMPLATE, FACE_SIZE
from util.files import sha256
from util.gallery import Gallery
from util.image_io import NotAnImage, UnreadableImage, read_photo
from util.image_tree import printable, walk
from util.progress import progress
from util.public_networks import read_public_network
from util.transform import EVAL_CROPS, full_crop

Image = str | Path | np.ndarray
CALIBRATE = "Make one with python -m applications.calibrate"
_PHOTOGRAPHS_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class FoundFace:
    """The face of a photograph that is compared, and how many faces were found there."""

    image: np.ndarray  # the photograph, (H, W, 3) RGB uint8
    face: Face
    aligned: np.ndarray  # (112, 112, 3) RGB uint8
    embedding: np.ndarray  # (D,) float32, L2-normalized
    faces: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two faces. `far` is the fraction of strangers that look as alike; None without a calibration."""

    first: FoundFace
    second: FoundFace
    cosine: float
    far: float | None

    @property
    def squared_distance(self) -> float:
        """Return the squared Euclidean distance of the embeddings, which validation.py's thresholds are for."""
        return 2 - 2 * self.cosine


@dataclass(frozen=True, eq=False)
class Match:
    """A face of a photograph, and the known person who is nearest. An unknown person has no `name`."""

    name: str | None
    nearest: str
    cosine: float
    face: Face


class Recognizer:
    """Finds faces in photographs and compares them with a network.

    Args:
        network: a Backbone file, the folder of a run, a network of another project, or an exported network.
        gpu_num: GPUs as in training; () is the CPU.
        calibration: a file of applications.calibrate; None: what an exported network holds.
        select: which of several faces is embedded and compared, one of util.cli.types.SELECT.
        aligned: the images are aligned faces, and no face is searched.
        channel_order: what the network takes, where its file does not tell. See read_public_network().
        input_scale: the same.
        crop: the same.

    Attributes:
        network: the PublicNetwork.
        file: its file.
        calibration: the Calibration, or None.

    Raises:
        DataError: the network or the calibration cannot be read, or they do not belong together.
        UsageError: a GPU does not exist.
    """

    def __init__(
        self,
        network: str | Path,
        *,
        gpu_num: Sequence[int] = (),
        calibration: str | Path | None = None,
        select: str = "largest",
        aligned: bool = False,
        channel_order: str | None = None,
        input_scale: str | None = None,
        crop: str | None = None,
    ):
        self._devices = select_devices(gpu_num)
        self.file = find_backbone(network, flag="--network")
        self.network = read_public_network(self.file, channel_order, input_scale, crop=crop)
        self.sha256 = sha256(self.file)
        self.calibration = find_calibration(
            Path(calibration) if calibration else None, self.file, self.network.metadata, sha256=self.sha256
        )
        self._select = select
        self._aligned = aligned
        self._module = prepare_module(fold_batch_norm(self.network.network), self._devices)
        self._detector = Detector(self._devices[0])

    @classmethod
    def from_settings(cls, settings: PhotographSettings) -> Self:
        """Return the recognizer that a command line asks for. Raise as the constructor does."""
        return cls(
            settings.network,
            gpu_num=settings.gpu_num,
            calibration=settings.calibration,
            select=settings.select,
            aligned=settings.aligned,
            channel_order=settings.channel_order,
            input_scale=settings.input_scale,
            crop=settings.eval_crop,
        )

    def find(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        """Return the faces of each image, the most probable first. An aligned face is one face with known landmarks."""
        if not self._aligned:
            return self._detector(images)
        found = []
        for image in images:
            height, width = image.shape[:2]
            landmarks = np.array(ARCFACE_TEMPLATE) * (width / FACE_SIZE, height / FACE_SIZE)
            found.append([Face(np.array([0.0, 0, width - 1, height - 1]), 1.0, landmarks)])
        return found

    def align(self, image: np.ndarray, face: Face) -> np.ndarray:
        """Return a face of an image as (112, 112, 3) RGB uint8."""
        return full_crop(image) if self._aligned else align(image, face.landmarks)

    def embed_aligned(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        """Return the embeddings (N, D) float32, L2-normalized, of aligned faces, (112, 112, 3) RGB uint8 each."""
        if not len(faces):
            return np.zeros((0, self.network.embedding_size), np.float32)
        step = default_eval_batch_size(self._devices)
        crops = EVAL_CROPS[self.network.crop](np.stack(faces))
        batches = [crops[start : start + step] for start in range(0, len(crops), step)]
        return torch.cat([embed(self._module, batch, self._devices[0]) for batch in batches]).cpu().numpy()

    def embed(self, images: Iterable[Image]) -> np.ndarray:
        """Return the embeddings (N, D) float32, L2-normalized, of one face of each image.

        Raises DataError if an image cannot be read, or no face is found in it.
        """
        faces = [self._find_one(image) for image in images]
        return self.embed_aligned([aligned for _, _, aligned, _ in faces])

    def compare(self, first: Image, second: Image) -> Comparison:
        """Compare one face of each image. Raise DataError if an image cannot be read, or no face is found in it."""
        found = [self._find_one(image) for image in (first, second)]
        embeddings = self.embed_aligned([aligned for _, _, aligned, _ in found])
        faces = [
            FoundFace(image, face, aligned, embedding=embedding, faces=count)
            for (image, face, aligned, count), embedding in zip(found, embeddings, strict=True)
        ]
        cosine = float(embeddings[0] @ embeddings[1])
        far = None if self.calibration is None else self.calibration.far(cosine)
        return Comparison(faces[0], faces[1], cosine, far=far)

    def enroll(self, people: str | Path) -> Gallery:
        """Return the gallery of a folder PEOPLE/NAME/IMAGE, or of a file of applications.embed.

        Photographs that cannot be read or show no face are named in a warning, and left out.

        Raises:
            DataError: no face is left, or the file was made with another network.
        """
        people = Path(people)
        if people.suffix in EMBEDDING_SUFFIXES and people.is_file():
            table = read_table(people)
            if table.metadata.get("sha256") not in (self.sha256, self.network.metadata.get("source_sha256")):
                raise DataError(
                    f"{people}: was made with another network than {self.file}. Run applications.embed again with it."
                )
            return Gallery([name.partition("/")[0] for name in table.names], table.embeddings)
        if not people.is_dir():
            raise DataError(f"{people}: no such folder. Name a folder with people, PEOPLE/NAME/IMAGE.jpg.")
        files = [
            (Path(folder).parts[0], people / folder / name)
            for folder, names in walk(people, people.parent)  # no folder in it is left out
            for name in names
            if Path(folder).parts
        ]
        names: list[str] = []
        embeddings: list[np.ndarray] = []
        for start in progress(range(0, len(files), _PHOTOGRAPHS_AT_ONCE), "enrolling", "batches"):
            faces = []
            for name, file in files[start : start + _PHOTOGRAPHS_AT_ONCE]:
                try:
                    faces.append(self._find_one(file)[2])
                    names.append(printable(name))
                except DataError as error:
                    logger.warning(f"warning: left out: {error}")
            embeddings.append(self.embed_aligned(faces))
        if not names:
            raise DataError(f"{people}: no face to enroll. Lay the photographs out as {people}/NAME/IMAGE.jpg.")
        return Gallery(names, np.concatenate(embeddings))

    def threshold(self, far: float, faces: int = 1) -> float:
        """Return the cosine above which a stranger is accepted with a probability of at most `far`.

        Args:
            far: false accept rate.
            faces: how many faces of known people a stranger is compared with. Each is a chance of a false accept.

        Raises:
            UsageError: there is no calibration, or it has too few pairs.
        """
        if self.calibration is None:
            raise UsageError(f"{self.file}: has no calibration, which a false accept rate needs. {CALIBRATE}.")
        lowest = self.calibration.lowest_far
        if far / faces < lowest:
            raise UsageError(
                f"--far={far:g}: with {faces} faces in the gallery, a comparison may accept {far / faces:.1g} of the "
                f"strangers, and the calibration of {self.calibration.pairs:,} pairs shows no rate below {lowest:.1g}. "
                f"Give {lowest * faces:.2g} or more, or calibrate on more people."
            )
        return self.calibration.threshold(far / faces)

    def search(self, image: Image, gallery: Gallery, far: float = 0.01, threshold: float | None = None) -> list[Match]:
        """Name all faces of an image.

        Args:
            image: the photograph.
            gallery: the people who are known.
            far: the fraction of strangers that may get a name by mistake.
            threshold: the least cosine for a name, instead of `far`.

        Raises:
            DataError: the image cannot be read.
            UsageError: there is no calibration for `far`, and no threshold.
        """
        threshold = self.threshold(far, len(gallery)) if threshold is None else threshold
        photograph = load_image(image)
        (faces,) = self.find([photograph])
        if not faces:
            return []
        nearest = gallery.nearest(self.embed_aligned([self.align(photograph, face) for face in faces]))
        return [
            Match(name if cosine >= threshold else None, name, cosine, face)
            for (name, cosine), face in zip(nearest, faces, strict=True)
        ]

    def _find_one(self, image: Image) -> tuple[np.ndarray, Face, np.ndarray, int]:
        """Return a photograph, its selected face, this face aligned, and the number of faces."""
        photograph = load_image(image)
        (faces,) = self.find([photograph])
        if not faces:
            place = "image" if isinstance(image, np.ndarray) else printable(image)
            raise DataError(
                f"{place}: no face found. Take a larger or sharper face, or say that it is aligned already."
            )
        face = select_face(faces, photograph, self._select)
        return photograph, face, self.align(photograph, face), len(faces)


def load_image(image: Image) -> np.ndarray:
    """Return a photograph as (H, W, 3) RGB uint8. Raise DataError if it cannot be read."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DataError(f"image: must be (H, W, 3) RGB uint8, and is {image.shape} {image.dtype}.")
        return image
    try:
        return read_photo(Path(image))
    except (NotAnImage, UnreadableImage) as error:
        raise DataError(f"{printable(image)}: {error}.") from None
