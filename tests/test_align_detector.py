"""Compare the detector with the known landmarks of drawn faces, and with a reference detector on photographs."""

import json
from functools import cache

import cv2
import numpy as np
import pytest
import torch

from applications.align import Detector, Face, align, detect
from applications.align.boxes import distance_to_center
from applications.demo.data_set import sample_person
from applications.demo.drawn.person import Condition
from applications.demo.drawn.render import render_face
from util.errors import UsageError


@cache
def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a drawn face (112, 112, 3) and its landmarks (5, 2)."""
    person = sample_person(5, number)
    return render_face(person, Condition.sample(np.random.default_rng((5, number)), person, "frontal"))


def scene(*faces: tuple[int, int, int, float], height: int = 300, width: int = 400) -> tuple[np.ndarray, list]:
    """Draw faces (number, left, top, scale) on grey, and return the image and the landmarks of each."""
    image, points = np.full((height, width, 3), 120, np.uint8), []
    for number, left, top, scale in faces:
        face, landmarks = drawn(number)
        size = round(112 * scale)
        image[top : top + size, left : left + size] = cv2.resize(face, (size, size), interpolation=cv2.INTER_AREA)
        points.append((landmarks + 0.5) * scale - 0.5 + [left, top])
    return image, points


def error(face: Face, landmarks: np.ndarray) -> float:
    return float(np.linalg.norm(face.landmarks - landmarks, axis=1).mean())


def assert_same(found: list[Face], expected: list[Face], tolerance: float = 1e-3) -> None:
    assert len(found) == len(expected)
    for face, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(face.box, other.box, atol=tolerance)
        np.testing.assert_allclose(face.landmarks, other.landmarks, atol=tolerance)
        assert face.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("scale", [0.6, 1.0, 2.3])
def test_detect_finds_drawn_face_and_landmarks(number, scale):
    image, (landmarks,) = scene((number, 30, 20, scale))
    face, *others = detect([image])[0]
    assert others == []
    assert error(face, landmarks) < 5 * scale
    assert face.score > 0.8
    eyes, mouth = face.landmarks[:2], face.landmarks[3:]
    assert eyes[0, 0] < eyes[1, 0] and mouth[0, 0] < mouth[1, 0] and eyes[:, 1].max() < mouth[:, 1].min()
    assert (face.box[:2] < face.landmarks.min(axis=0)).all() and (face.box[2:] > face.landmarks.max(axis=0)).all()
    expected = cv2.resize(drawn(number)[0], (112, 112))
    assert np.abs(align(image, face.landmarks).astype(int) - expected).mean() < 30


def test_detect_orders_faces_by_score():
    image, points = scene((1, 10, 10, 1.0), (2, 200, 20, 1.4), (3, 40, 170, 0.9))
    faces = detect([image])[0]
    assert len(faces) == 3
    assert [face.score for face in faces] == sorted((face.score for face in faces), reverse=True)
    for landmarks in points:
        assert min(error(face, landmarks) for face in faces) < 6


def test_detect_batch_equals_single_images():
    images = [
        scene((number, 20, 10, 1.0), height=height, width=width)[0]
        for number, (height, width) in enumerate([(300, 400), (150, 140), (301, 403), (700, 140), (300, 400)], start=1)
    ]
    images += [np.zeros((5, 5, 3), np.uint8), np.full((1, 700, 3), 90, np.uint8), np.full((200, 200, 3), 90, np.uint8)]
    together = detect(images)
    assert [len(faces) for faces in together] == [1, 1, 1, 1, 1, 0, 0, 0]
    for image, faces in zip(images, together, strict=True):
        assert_same(faces, detect([image])[0])


def test_detect_splits_many_pixels_into_batches(monkeypatch):
    images = [scene((number, 20, 10, 1.0))[0] for number in (1, 2, 3)]
    expected = detect(images)
    monkeypatch.setattr("applications.align.detector._PIXELS", 200_000)
    for faces, other in zip(detect(images), expected, strict=True):
        assert_same(faces, other)


def test_detect_large_image_in_pieces():
    small, (landmarks,) = scene((1, 30, 20, 1.0))
    large = np.full((1500, 1400, 3), 120, np.uint8)
    large[1100:1400, 900:1300] = small
    (face,) = [face for face in detect([large])[0] if face.score > 0.9]
    assert error(face, landmarks + [900, 1100]) < 4


def test_detect_face_at_the_image_border():
    image, (landmarks,) = scene((1, 0, 0, 1.0))
    (face,) = detect([np.ascontiguousarray(image[18:, 12:])])[0]
    assert error(face, landmarks - [12, 18]) < 6
    assert face.box[1] < 5


def test_detect_min_face():
    image, (landmarks,) = scene((1, 100, 100, 0.4))
    assert [round(error(face, landmarks)) <= 3 for face in detect([image], min_face=20)[0]] == [True]
    assert detect([image], min_face=80)[0] == []


def test_detect_higher_thresholds_find_fewer():
    image = scene((1, 10, 10, 1.0), (4, 220, 10, 1.0))[0]
    scores = [face.score for face in detect([image])[0]]
    assert len(scores) == 2
    assert len(detect([image], thresholds=(0.6, 0.7, sum(scores) / 2))[0]) == 1


def test_detect_without_images():
    assert detect([]) == []


def test_detect_takes_views_and_read_only_arrays():
    image = scene((1, 30, 20, 1.0))[0]
    locked = image.copy()
    locked.flags.writeable = False
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    expected = detect([image])[0]
    for other in (locked, bgr[:, :, ::-1], np.asfortranarray(image)):
        assert_same(detect([other])[0], expected)


@pytest.mark.parametrize("image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))])
def test_detect_refuses_other_arrays(image):
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) RGB uint8"):
        detect([image])


@pytest.mark.parametrize("min_face", [0, -5, 11.9, float("nan")])
def test_detector_refuses_min_face_below_window(min_face):
    with pytest.raises(UsageError, match=r"min_face .*12 pixels or more"):
        Detector(min_face=min_face)


@pytest.mark.parametrize("thresholds", [(0.6, 0.7), (0, 0.7, 0.8), (0.6, 0.7, 1.0), (0.6, float("nan"), 0.8)])
def test_detector_refuses_thresholds_out_of_range(thresholds):
    with pytest.raises(UsageError, match=r"thresholds .*between 0 and 1"):
        Detector(thresholds=thresholds)


@pytest.mark.slow
def test_detect_photographs_match_the_reference(shared):
    """Compare every ninth image of LFW with the older toolkit's detector, which resizes with Pillow."""
    lines = (shared / "lfw" / "landmarks.jsonl").read_text().splitlines()[::9]
    references = [json.loads(line) for line in lines]
    errors, differences = [], []
    for start in range(0, len(references), 32):
        part = references[start : start + 32]
        names = [f"{reference['name'].rsplit('_', 1)[0]}/{reference['name']}.jpg" for reference in part]
        images = [cv2.imread(str(shared / "lfw" / "images" / name), cv2.IMREAD_COLOR_RGB) for name in names]
        for name, reference, image, faces in zip(names, part, images, detect(images), strict=True):
            assert faces, name
            boxes = np.stack([face.box for face in faces])
            face = faces[int(np.argmin(distance_to_center(boxes, *image.shape[1::-1])))]
            errors.append(error(face, np.reshape(reference["landmarks"][reference["central"]], (2, 5)).T))
            expected = cv2.imread(str(shared / "lfw" / "aligned_112" / name), cv2.IMREAD_COLOR_RGB)
            differences.append(np.abs(align(image, face.landmarks).astype(int) - expected).mean())
    assert len(errors) == 770
    assert np.median(errors) < 0.05 and np.percentile(errors, 99) < 3
    assert np.mean(differences) < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_detect_gpu_matches_cpu():
    images = [scene((number, 20, 10, 1.0))[0] for number in range(1, 9)]
    for faces, other in zip(detect(images, device="cuda"), detect(images), strict=True):
        assert_same(faces, other, tolerance=0.5)
