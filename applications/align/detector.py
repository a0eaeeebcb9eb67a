"""MTCNN: finds faces and five landmarks in each. Three networks, each asked about what the one before it let through.

Protocol and constants are those of Zhang et al. 2016 as its public implementations have them: a pyramid by the factor
0.707 that starts where the smallest face fills a window of 12 pixels; thresholds 0.6, 0.7 and 0.8 on the probability of
a face; non-maximum suppression above an overlap of 0.5 within a level and 0.7 elsewhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import nn

from applications.align import networks, pyramid
from applications.align.boxes import calibrate, sizes, square, suppress
from util.errors import UsageError

MIN_FACE = 20.0
THRESHOLDS = (0.6, 0.7, 0.8)
_OVERLAP_IN_LEVEL, _OVERLAP = 0.5, 0.7
_MARGIN = networks.WINDOW - networks.STRIDE  # pixels that neighbouring pieces of a level share
# Crops that a network is given at once: more fall out of a processor's cache, fewer keep a GPU waiting.
_CROPS_ON_CPU, _CROPS_ON_GPU = {24: 64, 48: 16}, {24: 4096, 48: 1024}
_PIXELS = 4_000_000  # of the images that are worked on together


@dataclass(frozen=True)
class Face:
    """A face in an image, in pixels: `box` (4,) x1 y1 x2 y2 float64, `score` the probability of a face, `landmarks`
    (5, 2) x, y float64: the eyes, the nose, the corners of the mouth, each pair from left to right as seen."""

    box: np.ndarray
    score: float
    landmarks: np.ndarray


@dataclass(frozen=True)
class _Candidates:
    """N boxes that may be faces, each with the number of its image."""

    image: np.ndarray  # (N,) int
    boxes: np.ndarray  # (N, 4)
    scores: np.ndarray  # (N,)
    offsets: np.ndarray  # (N, 4), what the last network would move the sides by

    @staticmethod
    def joined(parts: "list[_Candidates]") -> "_Candidates":
        none = _Candidates(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
        values = zip(*(vars(part).values() for part in [none, *parts]), strict=True)
        return _Candidates(*map(np.concatenate, values))

    def take(self, indices: np.ndarray) -> "_Candidates":
        return _Candidates(*(values[indices] for values in vars(self).values()))

    def suppressed(self, groups: np.ndarray, overlap: float) -> "_Candidates":
        return self.take(suppress(self.boxes, self.scores, groups, overlap))

    def squared(self) -> "_Candidates":
        return replace(self, boxes=square(calibrate(self.boxes, self.offsets)))


class Detector:
    """Finds faces of `min_face` pixels and more. `thresholds`: the least probability for each of the networks."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        min_face: float = MIN_FACE,
        thresholds: Sequence[float] = THRESHOLDS,
    ):
        if not min_face >= networks.WINDOW:
            raise UsageError(f"min_face {min_face:g}: must be {networks.WINDOW} pixels or more")
        if len(thresholds) != 3 or not all(0 < threshold < 1 for threshold in thresholds):
            raise UsageError(f"thresholds {tuple(thresholds)}: must be three numbers between 0 and 1, one a network")
        self._device, self._min_face, self._thresholds = torch.device(device), min_face, thresholds
        self._chunks = _CROPS_ON_CPU if self._device.type == "cpu" else _CROPS_ON_GPU
        kinds = (networks.ProposalNet, networks.RefinementNet, networks.OutputNet)
        self._propose, self._refine, self._finish = (networks.build(kind, self._device) for kind in kinds)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        """Faces in each of the images, (H, W, 3) RGB uint8 of any sizes; the most probable first.

        Raises ValueError for an array of another shape or type.
        """
        faces: list[list[Face]] = []
        for batch in _batches(images):
            arrays = [_checked(image) for image in batch]
            faces += self._output(arrays, self._refinements(arrays, self._proposals(arrays)))
        return faces

    def _proposals(self, images: list[np.ndarray]) -> _Candidates:
        """P-Net on every level of every image."""
        pieces = [
            piece
            for number, image in enumerate(images)
            for level, scale in enumerate(pyramid.scales(*image.shape[:2], self._min_face, networks.WINDOW))
            for piece in pyramid.cut(number, level, scale, *pyramid.level_size(image, scale), _MARGIN)
        ]
        placed = pyramid.pack(pieces)
        on_canvas = [
            self._on_canvas(canvas, [item for item in placed if item[1].canvas == number])
            for number, canvas in enumerate(pyramid.paint(images, placed))
        ]
        found = _Candidates.joined([candidates for candidates, _ in on_canvas])
        levels = np.concatenate([np.zeros(0, int), *(levels for _, levels in on_canvas)])
        found = found.suppressed(levels, _OVERLAP_IN_LEVEL)
        return found.suppressed(found.image, _OVERLAP).squared()

    def _on_canvas(
        self, canvas: np.ndarray, placed: list[tuple[pyramid.Piece, pyramid.Place]]
    ) -> tuple[_Candidates, np.ndarray]:
        """What P-Net finds on a canvas, in pixels of the images, and for each a number of its image and level."""
        logits, offsets = self._propose(networks.normalize(torch.from_numpy(canvas)[None].to(self._device)))
        row, column = (logits[0] > _logit(self._thresholds[0])).nonzero(as_tuple=True)
        scores, offsets = logits[0, row, column].sigmoid().cpu().numpy(), offsets[0, row, column].cpu().numpy()
        row, column = row.cpu().numpy(), column.cpu().numpy()
        owner = np.full(logits.shape[1:], -1)
        for number, (piece, place) in enumerate(placed):
            top, left = place.top // networks.STRIDE, place.left // networks.STRIDE
            # Windows that lie wholly within the piece: all others see the gap or a neighbour.
            bottom, right = top + (piece.height - _MARGIN) // 2, left + (piece.width - _MARGIN) // 2
            owner[top:bottom, left:right] = number
        owner = owner[row, column]
        whole = owner >= 0
        owner, row, column = owner[whole], row[whole], column[whole]
        table = np.array([(p.image, p.level, p.scale, p.left - q.left, p.top - q.top) for p, q in placed])[owner]
        corner = np.stack([column, row], axis=1) * networks.STRIDE + table[:, 3:] + 1  # x, y in the level
        ends = np.hstack([corner, corner + networks.WINDOW])
        image, level = table[:, 0].astype(int), table[:, 1].astype(int)
        boxes = np.round(ends / table[:, 2:3])
        return _Candidates(image, boxes, scores[whole], offsets[whole]), image * 1000 + level

    def _refinements(self, images: list[np.ndarray], proposals: _Candidates) -> _Candidates:
        """R-Net on each proposal."""
        logits, offsets = self._look(self._refine, images, proposals, 24)
        likely = np.flatnonzero(logits > _logit(self._thresholds[1]))
        found = replace(proposals, scores=_sigmoid(logits), offsets=offsets).take(likely)
        return found.suppressed(found.image, _OVERLAP).squared()

    def _output(self, images: list[np.ndarray], refined: _Candidates) -> list[list[Face]]:
        """O-Net on what is left, which gives the landmarks too."""
        logits, offsets, landmarks = self._look(self._finish, images, refined, 48)
        likely = np.flatnonzero(logits > _logit(self._thresholds[2]))
        found = replace(refined, scores=_sigmoid(logits), offsets=offsets).take(likely)
        points = found.boxes[:, None, :2] + landmarks[likely] * sizes(found.boxes)[:, None]  # (N, 5, 2)
        boxes = calibrate(found.boxes, found.offsets)
        kept = suppress(boxes, found.scores, found.image, _OVERLAP, of_smaller=True)
        faces: list[list[Face]] = [[] for _ in images]
        for index in kept[np.argsort(-found.scores[kept], kind="stable")]:
            faces[found.image[index]].append(Face(boxes[index], float(found.scores[index]), points[index]))
        return faces

    def _look(
        self, network: nn.Module, images: list[np.ndarray], candidates: _Candidates, size: int
    ) -> tuple[np.ndarray, ...]:
        """What the network says of each candidate's crop of size x size."""
        crops = _crops(images, candidates, size)
        crops = crops if len(crops) else np.zeros((1, size, size, 3), np.uint8)  # of nothing, for the shapes
        outputs = [
            network(networks.normalize(torch.from_numpy(crops[start : start + self._chunks[size]]).to(self._device)))
            for start in range(0, len(crops), self._chunks[size])
        ]
        together = (torch.cat(parts).cpu().numpy() for parts in zip(*outputs, strict=True))
        return tuple(values[: len(candidates.boxes)] for values in together)


def detect(
    images: Sequence[np.ndarray],
    device: torch.device | str = "cpu",
    min_face: float = MIN_FACE,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[list[Face]]:
    """Faces in each of the images, (H, W, 3) RGB uint8 of any sizes; the most probable first. As Detector does it."""
    return _detector(torch.device(device), min_face, tuple(thresholds))(images)


@cache
def _detector(device: torch.device, min_face: float, thresholds: tuple[float, ...]) -> Detector:
    return Detector(device, min_face, thresholds)


def _batches(images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The images in groups of a bounded number of pixels, which also bounds the memory that their canvases take."""
    batch: list[np.ndarray] = []
    for image in images:
        if batch and sum(other.size for other in batch) + image.size > 3 * _PIXELS:
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def _checked(image: np.ndarray) -> np.ndarray:
    """The image as torch takes it, the same memory where it can be."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be (H, W, 3) RGB uint8, and is {image.shape} {image.dtype}")
    return np.require(image, requirements=("C", "W"))


def _crops(images: list[np.ndarray], candidates: _Candidates, size: int) -> np.ndarray:
    """The pixels of the boxes as squares, (N, size, size, 3) uint8: black where a box leaves its image.

    Boxes of one shape are resized together, which takes half the time that they would take one by one. In whole pixels,
    a square may be one pixel higher than wide.
    """
    boxes = candidates.boxes.astype(int)
    crops = np.zeros((len(boxes), size, size, 3), np.uint8)
    shapes, number = np.unique(boxes[:, [3, 2]] - boxes[:, [1, 0]] + 1, axis=0, return_inverse=True)
    for index, (height, width) in enumerate(shapes.tolist()):
        if min(height, width) < 1:
            continue
        alike, at_once = np.flatnonzero(number == index), max(1, _PIXELS // (height * width))
        for part in (alike[start : start + at_once] for start in range(0, len(alike), at_once)):
            pixels = np.zeros((len(part), height, width, 3), np.uint8)
            for target, image, (left, top, *_) in zip(
                pixels, candidates.image[part], boxes[part].tolist(), strict=True
            ):
                _copy(images[image], left, top, target)
            crops[part] = pyramid.resize(pixels, size, size)
    return crops


def _copy(image: np.ndarray, left: int, top: int, target: np.ndarray) -> None:
    """Fills the target with the image's pixels from (left, top) on, as far as there are any."""
    down, right = max(-top, 0), max(-left, 0)
    part = image[max(top, 0) : max(top + target.shape[0], 0), max(left, 0) : max(left + target.shape[1], 0)]
    target[down : down + part.shape[0], right : right + part.shape[1]] = part


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))
