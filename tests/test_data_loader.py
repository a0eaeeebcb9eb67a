import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from util import transform
from util.data.image_folder import ImageFolder
from util.data.loader import (
    INSIGHTFACE_FOLDERS,
    Augmentation,
    TrainLoader,
    find_train_data,
    open_training_images,
)
from util.data.record_dataset import RecordImages
from util.data.recordio import write_identities
from util.data.sampler import BalancedSampler, SampleRng
from util.data.workers import init_worker
from util.errors import DataError


def test_find_train_data_takes_the_first_known_folder(tmp_path):
    for name in ("imgs", "imgs_train", "ms1m_align_112", "imgs_casia"):  # each comes before the earlier ones
        (tmp_path / name).mkdir()
        assert find_train_data(tmp_path, None) == tmp_path / name


def test_find_train_data_takes_an_imgs_folder_inside(tmp_path):
    (tmp_path / "imgs_casia" / "imgs").mkdir(parents=True)
    assert find_train_data(tmp_path, None) == tmp_path / "imgs_casia" / "imgs"
    assert find_train_data(tmp_path, "imgs_casia") == tmp_path / "imgs_casia" / "imgs"


def test_find_train_data_searches_data_dir_before_the_path(tmp_path):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "imgs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert find_train_data(tmp_path / "data", "mine") == tmp_path / "data" / "mine"
    assert find_train_data(tmp_path / "data", str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


def test_find_train_data_error_names_the_known_folders(tmp_path):
    with pytest.raises(DataError, match=r"imgs_casia, ms1m_align_112, imgs_train, imgs.*--train_data"):
        find_train_data(tmp_path, None)
    with pytest.raises(DataError, match=r"--train_data=faces: no such folder or \.rec file"):
        find_train_data(tmp_path, "faces")


def test_find_train_data_takes_a_train_rec(tmp_path):
    for name in ("mine", "ms1m_align_112", "faces_emore"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.rec").touch()
    assert find_train_data(tmp_path, "mine") == tmp_path / "mine" / "train.rec"
    assert find_train_data(tmp_path, "mine/train.rec") == tmp_path / "mine" / "train.rec"
    assert find_train_data("elsewhere", str(tmp_path / "mine" / "train.rec")) == tmp_path / "mine" / "train.rec"
    assert find_train_data(tmp_path, None) == tmp_path / "ms1m_align_112" / "train.rec"
    (tmp_path / "ms1m_align_112" / "imgs").mkdir()  # its unpacked images
    assert find_train_data(tmp_path, None) == tmp_path / "ms1m_align_112" / "imgs"


@pytest.mark.parametrize("name", [*INSIGHTFACE_FOLDERS, "."])
def test_find_train_data_takes_insightface_sets(tmp_path, name):
    (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"no training folder .* and no train\.rec. Put one there"):
        find_train_data(tmp_path, None)  # a folder that has verification sets only
    (tmp_path / name / "train.rec").touch()
    assert find_train_data(tmp_path, None) == tmp_path / name / "train.rec"


def test_open_training_images_opens_folders_and_records(people_folder, tmp_path):
    folder = open_training_images(people_folder)
    people = [[folder.encoded(i) for i in np.flatnonzero(folder.labels == label)] for label in range(3)]
    write_identities(tmp_path / "train.rec", people)
    for path in (tmp_path, str(tmp_path / "train.rec")):
        records = open_training_images(path)
        assert isinstance(records, RecordImages) and records.root == tmp_path / "train.rec"
    assert isinstance(folder, ImageFolder)
    assert records.labels.tolist() == folder.labels.tolist()
    for index in range(len(folder)):
        assert records.encoded(index) == folder.encoded(index) == folder.path(index).read_bytes()
        np.testing.assert_array_equal(records.image(index), folder.image(index))
    assert folder.where(0) == str(people_folder / "Ann" / "Ann_0000.jpg")
    assert records.where(0) == f"{tmp_path / 'train.rec'}: record 1"


@pytest.mark.parametrize("name", ["train.idx", "missing"])
def test_open_training_images_refuses_other_files(tmp_path, name):
    (tmp_path / "train.idx").touch()
    with pytest.raises(DataError, match=rf"{name}: no training set. Name a folder of people, or a \.rec file"):
        open_training_images(tmp_path / name)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_raises_one_line_for_a_broken_image(people_folder, workers):
    images = ImageFolder(people_folder)
    for index in range(len(images)):
        images.path(index).write_text("not an image")
    loader = TrainLoader(images, 3, Augmentation(), num_workers=workers)
    with pytest.raises(DataError, match=r"\.jpg: not an image") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_program_exits_cleanly_while_a_loader_is_in_use(people_folder):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from util.data.loader import Augmentation, ImageFolder, TrainLoader\n"
        "loader = TrainLoader(ImageFolder(Path(sys.argv[1])), 2, Augmentation(), num_workers=1)\n"
        "sys.kept = batches = loader.epoch(0)\n"  # like the traceback of an error would keep it
        "next(batches)\n"
    )
    command = [sys.executable, "-c", program, str(people_folder)]
    done = subprocess.run(command, timeout=60, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def batches_of(loader: TrainLoader, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_epoch_is_the_same_with_any_number_of_workers(people_folder):
    images = ImageFolder(people_folder)
    augmentation = Augmentation(strong=True, low_res_sizes=(28, 56))
    alone = TrainLoader(images, 3, augmentation, seed=3)
    helped = TrainLoader(images, 3, augmentation, seed=3, num_workers=2)
    pixels, labels = batches_of(alone, 1)
    assert pixels.shape == (6, 112, 112, 3) and pixels.dtype == torch.uint8
    assert labels.dtype == torch.int64
    for loader, epoch, equal in ((helped, 1, True), (helped, 0, False), (helped, 1, True), (alone, 1, True)):
        again, labels_again = batches_of(loader, epoch)
        assert torch.equal(again, pixels) is equal
        assert torch.equal(labels_again, labels) or not equal
    assert not torch.equal(batches_of(TrainLoader(images, 3, augmentation, seed=4), 1)[0], pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_continues_from_any_step(people_folder, workers, monkeypatch):
    read = []
    image = ImageFolder.image
    images = ImageFolder(people_folder)
    loader = TrainLoader(images, 2, Augmentation(low_res_sizes=(28,)), seed=3, num_workers=workers, steps=6)
    full = list(loader.epoch(1))
    monkeypatch.setattr(ImageFolder, "image", lambda self, index: read.append(index) or image(self, index))
    for start_step in (4, 0, 6, 5):
        read.clear()
        rest = list(loader.epoch(1, start_step))
        assert len(rest) == 6 - start_step
        for (pixels, labels), (expected, expected_labels) in zip(rest, full[start_step:], strict=True):
            assert torch.equal(pixels, expected) and torch.equal(labels, expected_labels)
        if not workers:
            assert read == BalancedSampler(images.labels, 2, seed=3, steps=6).order(1)[2 * start_step :].tolist()
    assert len(list(loader.epoch(1))) == 6


def test_any_sample_can_be_reproduced(people_folder):
    images = ImageFolder(people_folder)
    pixels, labels = batches_of(TrainLoader(images, 2, Augmentation(), seed=3), 4)
    index = BalancedSampler(images.labels, 2, seed=3).order(4)[5]
    expected = transform.train_crop(images.image(index), SampleRng(3, 4).for_sample(5))
    np.testing.assert_array_equal(pixels[5].numpy(), expected)
    assert labels[5] == images.labels[index]


@pytest.mark.parametrize("augmentation", [Augmentation(low_res_sizes=(28, 56)), Augmentation(strong=True)])
def test_ranks_together_see_the_pixels_of_one_process(people_folder, augmentation):
    images = ImageFolder(people_folder)
    alone = TrainLoader(images, 6, augmentation, seed=3, steps=3)
    ranks = [TrainLoader(images, 2, augmentation, seed=3, steps=3, rank=rank, world_size=3) for rank in range(3)]
    assert [len(loader) for loader in [alone, *ranks]] == [3] * 4
    steps = [list(loader.epoch(2)) for loader in ranks]
    for step, (pixels, labels) in enumerate(alone.epoch(2)):
        assert torch.equal(torch.cat([batches[step][0] for batches in steps]), pixels)
        assert torch.equal(torch.cat([batches[step][1] for batches in steps]), labels)


def test_first_images_come_from_the_first_batch(people_folder):
    loader = TrainLoader(ImageFolder(people_folder), 3, Augmentation())
    batches_of(loader, 5)
    assert torch.equal(loader.first_images(), batches_of(loader, 0)[0][:3])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_leaves_the_global_random_state_alone(people_folder, workers):
    loader = TrainLoader(ImageFolder(people_folder), 3, Augmentation(), num_workers=workers)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    batches_of(loader, 0)
    assert torch.equal(torch.get_rng_state(), before)


def augmented(augmentation: Augmentation, image: np.ndarray, seeds: int) -> np.ndarray:
    """Return the image augmented with the random numbers of each seed, (seeds, 112, 112, 3)."""
    pixels = np.empty((seeds, 112, 112, 3), np.uint8)
    augmentation(((image, np.random.default_rng(seed)) for seed in range(seeds)), pixels)
    return pixels


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)


def test_augmentation_degrades_half_of_the_samples():
    changed = 0
    crops, samples = (
        augmented(augmentation, noise(), 300) for augmentation in (Augmentation(), Augmentation(low_res_sizes=(28,)))
    )
    for crop, sample in zip(crops, samples, strict=True):
        if (sample != crop).any():
            changed += 1
            np.testing.assert_array_equal(sample, transform.degrade(crop, 28))
    assert 115 < changed < 185


def test_augmentation_degrades_by_fraction_and_sizes():
    low_res = Augmentation(low_res_sizes=(56, 28, 14), low_res_prob=0.9)
    counts = dict.fromkeys((112, 56, 28, 14), 0)
    for crop, sample in zip(augmented(Augmentation(), noise(), 300), augmented(low_res, noise(), 300), strict=True):
        fitting = [size for size in counts if (sample == (transform.degrade(crop, size) if size < 112 else crop)).all()]
        counts[fitting[0]] += 1
    assert 15 <= counts[112] <= 45 and all(60 < counts[size] < 120 for size in (56, 28, 14))
    assert sum(counts.values()) == 300


def test_augmentation_strong_selects_the_warp():
    for augmentation, change in (
        (Augmentation(strong=True), transform.train_warp),
        (Augmentation(strong=True, crop="whole"), partial(transform.train_warp, full=True)),
        (Augmentation(crop="whole"), transform.train_full),
        (Augmentation(), transform.train_crop),
    ):
        expected = change(noise(), np.random.default_rng(0))
        np.testing.assert_array_equal(augmented(augmentation, noise(), 1)[0], expected)


class ThreadCounts(torch.utils.data.Dataset):
    """Reports how many threads the BLAS libraries of its process may use."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[int]:
        np.ones((64, 64)) @ np.ones((64, 64))
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_loader_workers_compute_on_one_thread():
    loader = torch.utils.data.DataLoader(ThreadCounts(), batch_size=None, num_workers=1, worker_init_fn=init_worker)
    (counts,) = loader
    assert counts and set(counts) == {1}
