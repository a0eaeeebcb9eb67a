import pickle

import cv2
import numpy as np
import pytest

from util.data.image_folder import ImageFolder
from util.errors import DataError


def test_image_folder_is_in_alphabetical_order(write_image_folder):
    root = write_image_folder(Cid=1, Ann=2, Bob=3)
    images = ImageFolder(root)
    assert images.classes == ["Ann", "Bob", "Cid"]
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 2]
    names = ["Ann/Ann_0000", "Ann/Ann_0001", "Bob/Bob_0000", "Bob/Bob_0001", "Bob/Bob_0002", "Cid/Cid_0000"]
    assert [images.path(index) for index in range(len(images))] == [root / f"{name}.jpg" for name in names]


def test_image_folder_ignores_other_files_and_empty_folders(people_folder):
    (people_folder / "Bea").mkdir()
    (people_folder / "Bea" / "notes.txt").write_text("nobody")
    (people_folder / "Ann" / "Thumbs.db").write_text("no image")
    (people_folder / "Ann" / "Ann_0000.jpg").rename(people_folder / "Ann" / "Ann_0000.JPG")
    (people_folder / "readme.jpg").write_text("not in a person's folder")
    images = ImageFolder(people_folder)
    assert images.classes == ["Ann", "Bob", "Cid"]
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 1, 2]


def test_image_folder_refuses_fewer_than_two_people(write_image_folder):
    root = write_image_folder(Ann=3)
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"people: found images in 1 folders.*two people"):
        ImageFolder(root)


def test_image_folder_reads_names_outside_ascii(write_image_folder):
    root = write_image_folder(Ann=1, Bob=1)
    (root / "Ann").rename(root / "김연아")
    (root / "김연아" / "Ann_0000.jpg").rename(root / "김연아" / "사진 é.jpg")
    images = ImageFolder(root)
    assert images.classes == ["Bob", "김연아"]
    assert images.path(1).name == "사진 é.jpg"
    assert images.image(1).shape == (112, 112, 3)


def test_images_are_rgb_for_every_file_format(write_image_folder):
    root = write_image_folder(Ann=1, Bob=1)
    blue = np.zeros((112, 112, 4), np.uint8)
    blue[:, :, [0, 3]] = 255  # BGRA
    cv2.imwrite(str(root / "Ann" / "a_rgba.png"), blue)
    cv2.imwrite(str(root / "Ann" / "b_rgb.png"), blue[:, :, :3])
    cv2.imwrite(str(root / "Ann" / "c_gray.png"), np.full((112, 112), 77, np.uint8))
    images = ImageFolder(root)
    by_name = {images.path(index).name: images.image(index) for index in range(len(images))}
    assert all(image.shape == (112, 112, 3) and image.dtype == np.uint8 for image in by_name.values())
    for name, color in {"a_rgba.png": (0, 0, 255), "b_rgb.png": (0, 0, 255), "c_gray.png": (77, 77, 77)}.items():
        assert (by_name[name] == color).all()


def spoil_text(file):
    file.write_text("not an image")


def spoil_empty(file):
    file.write_bytes(b"")


def spoil_shape(file):
    cv2.imwrite(str(file), np.zeros((112, 96, 3), np.uint8))


def spoil_missing(file):
    file.unlink()


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (spoil_text, "not an image"),
        (spoil_empty, "empty"),
        (spoil_shape, "96x112 is not square"),
        (spoil_missing, "cannot be read"),
    ],
)
def test_image_error_names_the_file_in_one_line(people_folder, spoil, rule):
    images = ImageFolder(people_folder)
    spoil(images.path(3))
    with pytest.raises(DataError, match=rf"Bob/Bob_0001\.jpg: .*{rule}") as caught:
        images.image(3)
    assert "\n" not in str(caught.value)
    assert images.image(2).shape == (112, 112, 3)


def test_encoded_reads_files_of_any_length(people_folder):
    images = ImageFolder(people_folder)
    for length in (1, 16383, 16384, 16385, 100_000):
        content = np.random.default_rng(length).bytes(length)
        images.path(2).write_bytes(content)
        assert images.encoded(2) == content


def test_image_error_names_a_folder_called_like_an_image(people_folder):
    images = ImageFolder(people_folder)
    images.path(2).unlink()
    images.path(2).mkdir()
    with pytest.raises(DataError, match=r"Bob_0000\.jpg: cannot be read \(a folder\)\. Restore it or remove it"):
        images.image(2)


def test_image_folder_keeps_no_python_object_per_image(people_folder):
    """Worker processes would copy Python objects, because reading one writes its reference count."""
    images = ImageFolder(people_folder)
    kept = [value for name, value in vars(images).items() if name != "classes"]
    assert not any(isinstance(value, list | tuple | dict) for value in kept)
    assert pickle.loads(pickle.dumps(images)).where(6) == images.where(6)
