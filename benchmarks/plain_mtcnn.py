"""A usual MTCNN, which processes one photograph and one level of the pyramid at a time.

It is the baseline of benchmarks/align.py. It has the networks, weights, thresholds and steps of applications/align, in
PyTorch's default memory layout. Images are resized with Pillow, as in older toolkits.
"""

import math

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

from applications.align import networks
from applications.align.boxes import calibrate, sizes, square
from applications.align.detector import MIN_FACE, THRESHOLDS
from applications.align.warp import align


class PlainDetector:
    """A detector that returns (box, score, landmarks) of each face of an image, like applications.align.Detector.

    With `crops_together`, R-Net and O-Net get all crops of a photograph in one batch, otherwise one by one.
    """

    def __init__(self, crops_together: bool):
        self._crops_together = crops_together
        self._pnet = networks.ProposalNet().eval()
        self._rnet = networks.RefinementNet().eval()
        self._onet = networks.OutputNet().eval()

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> list[tuple[np.ndarray, float, np.ndarray]]:
        picture = Image.fromarray(image)
        boxes, scores, offsets = self._proposals(picture)
        kept = _suppress(boxes, scores, 0.7)
        boxes = square(calibrate(boxes[kept], offsets[kept]))
        scores, offsets = self._run_on_crops(self._rnet, image, boxes, size=24)
        likely = np.flatnonzero(scores > THRESHOLDS[1])
        kept = likely[_suppress(boxes[likely], scores[likely], 0.7)]
        boxes = square(calibrate(boxes[kept], offsets[kept]))
        scores, offsets, landmarks = self._run_on_crops(self._onet, image, boxes, size=48)
        likely = np.flatnonzero(scores > THRESHOLDS[2])
        points = boxes[likely, None, :2] + landmarks[likely] * sizes(boxes[likely])[:, None]
        boxes = calibrate(boxes[likely], offsets[likely])
        kept = _suppress(boxes, scores[likely], 0.7, of_smaller=True)
        return [(boxes[index], float(scores[likely[index]]), points[index]) for index in kept]

    def _proposals(self, picture: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = [(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 4)))]
        scale = networks.WINDOW / MIN_FACE
        while min(picture.size) * scale > networks.WINDOW:
            size = math.ceil(picture.width * scale), math.ceil(picture.height * scale)
            logits, offsets = self._pnet(_input(np.array(picture.resize(size, Image.Resampling.BILINEAR))))
            scores = logits[0].sigmoid().numpy()
            row, column = np.nonzero(scores > THRESHOLDS[0])
            corners = networks.STRIDE * np.stack([column, row, column, row], axis=1) + 1
            boxes = np.round((corners + [0, 0, networks.WINDOW, networks.WINDOW]) / scale)
            scores, offsets = scores[row, column], offsets[0].numpy()[row, column]
            kept = _suppress(boxes, scores, 0.5)
            found.append((boxes[kept], scores[kept], offsets[kept]))
            scale *= 0.707
        boxes, scores, offsets = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return boxes, scores, offsets

    def _run_on_crops(
        self, network: nn.Module, image: np.ndarray, boxes: np.ndarray, size: int
    ) -> tuple[np.ndarray, ...]:
        crops = np.zeros((max(len(boxes), 1), size, size, 3), np.uint8)
        for crop, box in zip(crops, boxes.astype(int), strict=False):
            picture = Image.fromarray(image).crop((box[0], box[1], box[2] + 1, box[3] + 1))
            crop[:] = np.array(picture.resize((size, size), Image.Resampling.BILINEAR))
        inputs = [_input(crop) for crop in crops]
        if self._crops_together:
            inputs = [torch.cat(inputs)]
        outputs = [network(batch) for batch in inputs]
        logits, *others = (torch.cat(values) for values in zip(*outputs, strict=True))
        return tuple(values.numpy()[: len(boxes)] for values in (logits.sigmoid(), *others))


def align_image(detector: PlainDetector, source: str, target: str) -> None:
    """Read a photograph and write its largest face aligned, if it has one."""
    image = cv2.imread(source)
    assert image is not None, f"{source} cannot be read"
    image = image[:, :, ::-1].copy()
    faces = detector(image)
    if faces:
        face = max(faces, key=lambda face: sizes(face[0][None]).prod())
        cv2.imwrite(target, align(image, face[2])[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])


def _input(pixels: np.ndarray) -> torch.Tensor:
    """Turn (H, W, 3) RGB uint8 into (1, 3, H, W) float32, contiguous."""
    return torch.from_numpy(((pixels.astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)[None].copy())


def _suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float, of_smaller: bool = False) -> np.ndarray:
    """Return the indices kept by non-maximum suppression, best first, in the usual loop over boxes."""
    width, height = sizes(boxes).T
    areas = width * height
    order = np.argsort(-scores)
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[rest, :2])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.clip(high - low + 1, 0, None).prod(axis=1)
        total = np.minimum(areas[best], areas[rest]) if of_smaller else areas[best] + areas[rest] - shared
        order = rest[shared / total <= threshold]
    return np.array(kept, int)
