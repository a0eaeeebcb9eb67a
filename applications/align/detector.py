"""Find faces and their five landmarks with MTCNN: a cascade of three networks (P-Net, R-Net, O-Net).

The protocol and constants follow Zhang et al. 2016 and the public implementations: an image pyramid with the factor
0.707, whose first level shows the smallest face at 12 pixels; thresholds 0.6, 0.7 and 0.8 on the probability of a face;
non-maximum suppression above an overlap of 0.5 within a level and of 0.7 elsewhere.
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
_OVERLAP_IN_LEVEL = 0.5
_OVERLAP = 0.7
_MARGIN = networks.WINDOW - networks.STRIDE  # pixels by which neighboring pieces of a level overlap
# {crop size: crops in a batch}. Larger batches leave the cache of a CPU, smaller ones leave a GPU idle.
_CROPS_ON_CPU = {24: 64, 48: 16}
_CROPS_ON_GPU = {24: 4096, 48: 1024}
_PIXELS = 4_000_000  # pixels of the images that are processed together


@dataclass(frozen=True)
class Face:
    """A face in an image. Coordinates are pixels of the image."""

    box: np.ndarray  # (4,) x1 y1 x2 y2 float64
    score: float  # probability of a face
    landmarks: np.ndarray  # (5, 2) x, y float64: eyes, nose, corners of the mouth, each pair from left to right


@dataclass(frozen=True)
class _Candidates:
    """N boxes that may be faces."""

    image: np.ndarray  # (N,) int, index of the image
    boxes: np.ndarray  # (N, 4)
    scores: np.ndarray  # (N,)
    offsets: np.ndarray  # (N, 4), shifts of the four sides that the last network predicts

    @staticmethod
    def concatenate(parts: "list[_Candidates]") -> "_Candidates":
        none = np.zeros((0, 4), np.float32)
        empty = _Candidates(np.zeros(0, int), np.zeros((0, 4)), scores=none[:, 0], offsets=none)
        values = zip(*(vars(part).values() for part in [empty, *parts]), strict=True)
        return _Candidates(*map(np.concatenate, values))

    def take(self, indices: np.ndarray) -> "_Candidates":
        return _Candidates(*(values[indices] for values in vars(self).values()))

    def suppress(self, groups: np.ndarray, overlap: float) -> "_Candidates":
        return self.take(suppress(self.boxes, self.scores, groups, overlap))

    def to_squares(self) -> "_Candidates":
        return replace(self, boxes=square(calibrate(self.boxes, self.offsets)))


class Detector:
    """The three networks on one device. Calling it finds the faces of a list of images. For its values see detect."""

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
        self._device = torch.device(device)
        self._min_face = min_face
        self._thresholds = thresholds
        self._chunks = _CROPS_ON_CPU if self._device.type == "cpu" else _CROPS_ON_GPU
        self._pnet = networks.build(networks.ProposalNet, self._device)
        self._rnet = networks.build(networks.RefinementNet, self._device)
        self._onet = networks.build(networks.OutputNet, self._device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        """Return the faces of each (H, W, 3) RGB uint8 image of any size, the most probable first."""
        faces: list[list[Face]] = []
        for batch in _batches(images):
            arrays = [_as_torch_input(image) for image in batch]
            proposals = self._run_pnet(arrays)
            refined = self._run_rnet(arrays, proposals)
            faces += self._run_onet(arrays, refined)
        return faces

    def _run_pnet(self, images: list[np.ndarray]) -> _Candidates:
        """Run P-Net on every pyramid level of every image."""
        pieces: list[pyramid.Piece] = []
        for number, image in enumerate(images):
            height, width = image.shape[:2]
            for level, scale in enumerate(pyramid.scales(height, width, self._min_face, networks.WINDOW)):
                pieces += pyramid.cut(number, level, scale, size=pyramid.level_size(image, scale), overlap=_MARGIN)
        placed = pyramid.pack(pieces)
        candidates = []
        levels = [np.zeros(0, int)]
        for number, canvas in enumerate(pyramid.paint(images, placed)):
            on_canvas = [(piece, place) for piece, place in placed if place.canvas == number]
            found_on_canvas, levels_on_canvas = self._run_pnet_on_canvas(canvas, on_canvas)
            candidates.append(found_on_canvas)
            levels.append(levels_on_canvas)
        found = _Candidates.concatenate(candidates)
        found = found.suppress(np.concatenate(levels), _OVERLAP_IN_LEVEL)
        return found.suppress(found.image, _OVERLAP).to_squares()

    def _run_pnet_on_canvas(
        self, canvas: np.ndarray, placed: list[tuple[pyramid.Piece, pyramid.Place]]
    ) -> tuple[_Candidates, np.ndarray]:
        """Return the candidates of a canvas, in pixels of their images, and (N,) a group number for image and level."""
        logits, offsets = self._pnet(networks.normalize(torch.from_numpy(canvas)[None].to(self._device)))
        rows, columns = (logits[0] > _logit(self._thresholds[0])).nonzero(as_tuple=True)
        scores = logits[0, rows, columns].sigmoid().cpu().numpy()
        offsets = offsets[0, rows, columns].cpu().numpy()
        rows, columns = rows.cpu().numpy(), columns.cpu().numpy()

        # (H', W') the piece that each window lies in; -1 for a window that also sees the gap or a neighboring piece.
        owners = np.full(logits.shape[1:], -1)
        for number, (piece, place) in enumerate(placed):
            top, left = place.top // networks.STRIDE, place.left // networks.STRIDE
            bottom = top + (piece.height - _MARGIN) // networks.STRIDE
            right = left + (piece.width - _MARGIN) // networks.STRIDE
            owners[top:bottom, left:right] = number
        owner = owners[rows, columns]
        inside = np.flatnonzero(owner >= 0)
        owner = owner[inside]

        # Map each window from the canvas to its level, and then, by the scale, to its image.
        pieces = [piece for piece, _ in placed]
        images = np.array([piece.image for piece in pieces])[owner]
        levels = np.array([piece.level for piece in pieces])[owner]
        scales = np.array([piece.scale for piece in pieces])[owner]
        shifts = np.array([(piece.left - place.left, piece.top - place.top) for piece, place in placed])[owner]
        corners = np.stack([columns[inside], rows[inside]], axis=1) * networks.STRIDE + shifts + 1  # x, y in the level
        boxes = np.round(np.hstack([corners, corners + networks.WINDOW]) / scales[:, None])
        candidates = _Candidates(images, boxes, scores=scores[inside], offsets=offsets[inside])
        return candidates, images * 1000 + levels

    def _run_rnet(self, images: list[np.ndarray], proposals: _Candidates) -> _Candidates:
        """Run R-Net on the crop of each proposal."""
        logits, offsets = self._run_on_crops(self._rnet, images, proposals, size=24)
        likely = np.flatnonzero(logits > _logit(self._thresholds[1]))
        found = replace(proposals, scores=_sigmoid(logits), offsets=offsets).take(likely)
        return found.suppress(found.image, _OVERLAP).to_squares()

    def _run_onet(self, images: list[np.ndarray], refined: _Candidates) -> list[list[Face]]:
        """Run O-Net, which also predicts the landmarks, on the crop of each remaining candidate."""
        logits, offsets, landmarks = self._run_on_crops(self._onet, images, refined, size=48)
        likely = np.flatnonzero(logits > _logit(self._thresholds[2]))
        found = replace(refined, scores=_sigmoid(logits), offsets=offsets).take(likely)
        # Landmarks are fractions of the box that O-Net saw: convert them before the box is moved.
        points = found.boxes[:, None, :2] + landmarks[likely] * sizes(found.boxes)[:, None]  # (N, 5, 2)
        boxes = calibrate(found.boxes, found.offsets)
        kept = suppress(boxes, found.scores, found.image, _OVERLAP, of_smaller=True)
        faces: list[list[Face]] = [[] for _ in images]
        for index in kept[np.argsort(-found.scores[kept], kind="stable")]:
            faces[found.image[index]].append(Face(boxes[index], float(found.scores[index]), points[index]))
        return faces

    def _run_on_crops(
        self, network: nn.Module, images: list[np.ndarray], candidates: _Candidates, size: int
    ) -> tuple[np.ndarray, ...]:
        """Return the outputs of a network, (N, ...) each, for the candidates' crops of size x size pixels."""
        crops = _crops(images, candidates, size)
        if not len(crops):
            crops = np.zeros((1, size, size, 3), np.uint8)  # one blank crop gives the outputs their shapes
        outputs = []
        for start in range(0, len(crops), self._chunks[size]):
            chunk = torch.from_numpy(crops[start : start + self._chunks[size]]).to(self._device)
            outputs.append(network(networks.normalize(chunk)))
        merged = (torch.cat(parts).cpu().numpy() for parts in zip(*outputs, strict=True))
        return tuple(values[: len(candidates.boxes)] for values in merged)


def detect(
    images: Sequence[np.ndarray],
    device: torch.device | str = "cpu",
    min_face: float = MIN_FACE,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[list[Face]]:
    """Return the faces of each image, the most probable first, with a Detector that is kept for the next call.

    Args:
        images: (H, W, 3) RGB uint8 of any sizes.
        device: where the networks run.
        min_face: size in pixels of the smallest face to look for, 12 or more.
        thresholds: least probability of a face for each of the three networks, each between 0 and 1.

    Raises:
        UsageError: `min_face` or a threshold is out of range.
        DataError: the weights of the networks are missing or damaged.
        ValueError: an image has another shape or type.
    """
    return _detector(torch.device(device), min_face, tuple(thresholds))(images)


_detector = cache(Detector)


def _batches(images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yield the images in groups of at most _PIXELS pixels, which bounds the memory of their canvases."""
    batch: list[np.ndarray] = []
    for image in images:
        if batch and sum(other.size for other in batch) + image.size > 3 * _PIXELS:
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def _as_torch_input(image: np.ndarray) -> np.ndarray:
    """Check an image and return it contiguous and writable, as torch.from_numpy needs it. Copy only if necessary."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be (H, W, 3) RGB uint8, and is {image.shape} {image.dtype}")
    return np.require(image, requirements=("C", "W"))


def _crops(images: list[np.ndarray], candidates: _Candidates, size: int) -> np.ndarray:
    """Return the pixels of the boxes, (N, size, size, 3) uint8, black where a box leaves its image.

    Boxes of one shape are resized together, which takes half the time. After rounding, a square may be one pixel
    higher than wide.
    """
    boxes = candidates.boxes.astype(int)
    crops = np.zeros((len(boxes), size, size, 3), np.uint8)
    shapes, shape_index = np.unique(boxes[:, [3, 2]] - boxes[:, [1, 0]] + 1, axis=0, return_inverse=True)
    for number, (height, width) in enumerate(shapes.tolist()):
        if min(height, width) < 1:
            continue
        same_shape = np.flatnonzero(shape_index == number)
        step = max(1, _PIXELS // (height * width))
        for start in range(0, len(same_shape), step):
            indices = same_shape[start : start + step]
            pixels = np.zeros((len(indices), height, width, 3), np.uint8)
            for target, index in zip(pixels, indices, strict=True):
                left, top = boxes[index, :2].tolist()
                _copy(images[candidates.image[index]], left, top, target)
            crops[indices] = pyramid.resize(pixels, size, size)
    return crops


def _copy(image: np.ndarray, left: int, top: int, target: np.ndarray) -> None:
    """Copy the image's pixels from (left, top) on into `target`, except for the part outside the image."""
    height, width = target.shape[:2]
    part = image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    down, right = max(-top, 0), max(-left, 0)
    target[down : down + part.shape[0], right : right + part.shape[1]] = part


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))
