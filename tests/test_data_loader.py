import subprocess
import sys
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
    _start_worker,
    find_train_data,
    open_training_images,
)
from util.data.record_dataset import RecordImages
from util.data.recordio import write_identities
from util.data.sampler import BalancedSampler, SampleRng
from util.errors import DataError


def test_the_first_known_folder_is_trained_on(tmp_path):
    for name in ("imgs", "imgs_train", "ms1m_align_112", "imgs_casia"):  # each goes before the earlier ones
        (tmp_path / name).mkdir()
        assert find_train_data(tmp_path, None) == tmp_path / name


def test_an_imgs_folder_inside_is_taken(tmp_path):
    (tmp_path / "imgs_casia" / "imgs").mkdir(parents=True)
    assert find_train_data(tmp_path, None) == tmp_path / "imgs_casia" / "imgs"
    assert find_train_data(tmp_path, "imgs_casia") == tmp_path / "imgs_casia" / "imgs"


def test_a_named_folder_is_looked_for_under_data_dir_and_then_as_a_path(tmp_path):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "imgs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert find_train_data(tmp_path / "data", "mine") == tmp_path / "data" / "mine"
    assert find_train_data(tmp_path / "data", str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


def test_no_training_folder_is_an_error_that_says_where_to_put_one(tmp_path):
    with pytest.raises(DataError, match=r"imgs_casia, ms1m_align_112, imgs_train, imgs.*--train_data"):
        find_train_data(tmp_path, None)
    with pytest.raises(DataError, match=r"--train_data=faces: no such folder or \.rec file"):
        find_train_data(tmp_path, "faces")


def test_a_folder_of_records_is_recognized_by_its_train_rec(tmp_path):
    for name in ("mine", "ms1m_align_112", "faces_emore"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.rec").touch()
    assert find_train_data(tmp_path, "mine") == tmp_path / "mine" / "train.rec"
    assert find_train_data(tmp_path, "mine/train.rec") == tmp_path / "mine" / "train.rec"
    assert find_train_data("elsewhere", str(tmp_path / "mine" / "train.rec")) == tmp_path / "mine" / "train.rec"
    assert find_train_data(tmp_path, None) == tmp_path / "ms1m_align_112" / "train.rec"
    (tmp_path / "ms1m_align_112" / "imgs").mkdir()  # what was taken out of it
    assert find_train_data(tmp_path, None) == tmp_path / "ms1m_align_112" / "imgs"


@pytest.mark.parametrize("name", [*INSIGHTFACE_FOLDERS, "."])
def test_a_set_under_insightfaces_name_or_in_data_dir_itself_is_found(tmp_path, name):
    (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"no training folder .* and no train\.rec; put one there"):
        find_train_data(tmp_path, None)  # as where only its verification sets were taken along
    (tmp_path / name / "train.rec").touch()
    assert find_train_data(tmp_path, None) == tmp_path / name / "train.rec"


def test_folders_and_records_are_told_apart(people_folder, tmp_path):
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
def test_what_is_neither_a_folder_nor_records_is_refused(tmp_path, name):
    (tmp_path / "train.idx").touch()
    with pytest.raises(DataError, match=rf"{name}: no training set; name a folder of people, or a \.rec file"):
        open_training_images(tmp_path / name)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_hands_up_a_broken_image_in_one_line(people_folder, workers):
    images = ImageFolder(people_folder)
    for index in range(len(images)):
        images.path(index).write_text("not an image")
    loader = TrainLoader(images, 3, Augmentation(), num_workers=workers)
    with pytest.raises(DataError, match=r"\.jpg: not an image") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_a_program_ends_although_a_loader_is_in_use(people_folder):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from util.data.loader import Augmentation, ImageFolder, TrainLoader\n"
        "loader = TrainLoader(ImageFolder(Path(sys.argv[1])), 2, Augmentation(), num_workers=1)\n"
        "sys.kept = batches = loader.epoch(0)\n"  # as the traceback of an error would keep it
        "next(batches)\n"
    )
    command = [sys.executable, "-c", program, str(people_folder)]
    done = subprocess.run(command, timeout=60, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def batches_of(loader: TrainLoader, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_is_the_same_with_any_number_of_workers_and_each_time(people_folder):
    images = ImageFolder(people_folder)
    augmentation = Augmentation(strong=True, lr_sizes=(28, 56))
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


def test_any_sample_can_be_made_again(people_folder):
    images = ImageFolder(people_folder)
    pixels, labels = batches_of(TrainLoader(images, 2, Augmentation(), seed=3), 4)
    index = BalancedSampler(images.labels, 2, seed=3).order(4)[5]
    expected = transform.train_crop(images.image(index), SampleRng(3, 4).at(5))
    np.testing.assert_array_equal(pixels[5].numpy(), expected)
    assert labels[5] == images.labels[index]


@pytest.mark.parametrize("augmentation", [Augmentation(lr_sizes=(28, 56)), Augmentation(strong=True)])
def test_ranks_together_see_the_pixels_that_one_process_sees(people_folder, augmentation):
    images = ImageFolder(people_folder)
    alone = TrainLoader(images, 6, augmentation, seed=3, steps=3)
    ranks = [TrainLoader(images, 2, augmentation, seed=3, steps=3, rank=rank, world_size=3) for rank in range(3)]
    assert [len(loader) for loader in [alone, *ranks]] == [3] * 4
    steps = [list(loader.epoch(2)) for loader in ranks]
    for step, (pixels, labels) in enumerate(alone.epoch(2)):
        assert torch.equal(torch.cat([batches[step][0] for batches in steps]), pixels)
        assert torch.equal(torch.cat([batches[step][1] for batches in steps]), labels)


def test_the_first_images_are_those_of_the_first_batch(people_folder):
    loader = TrainLoader(ImageFolder(people_folder), 3, Augmentation())
    batches_of(loader, 5)
    assert torch.equal(loader.first_images(), batches_of(loader, 0)[0][:3])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_leaves_the_global_random_state_alone(people_folder, workers):
    loader = TrainLoader(ImageFolder(people_folder), 3, Augmentation(), num_workers=workers)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    batches_of(loader, 0)
    assert torch.equal(torch.get_rng_state(), before)


def seen(augmentation: Augmentation, image: np.ndarray, seeds: int) -> np.ndarray:
    """(seeds, 112, 112, 3): the image as it is seen with the random numbers of each seed."""
    pixels = np.empty((seeds, 112, 112, 3), np.uint8)
    augmentation(((image, np.random.default_rng(seed)) for seed in range(seeds)), pixels)
    return pixels


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)


def test_about_half_of_the_samples_are_degraded():
    changed = 0
    crops, samples = (
        seen(augmentation, noise(), 300) for augmentation in (Augmentation(), Augmentation(lr_sizes=(28,)))
    )
    for crop, sample in zip(crops, samples, strict=True):
        if (sample != crop).any():
            changed += 1
            np.testing.assert_array_equal(sample, transform.degrade(crop, 28))
    assert 115 < changed < 185


def test_the_share_and_the_sizes_of_degraded_samples_can_be_chosen():
    several = Augmentation(lr_sizes=(56, 28, 14), lr_prob=0.9)
    counts = dict.fromkeys((112, 56, 28, 14), 0)
    for crop, sample in zip(seen(Augmentation(), noise(), 300), seen(several, noise(), 300), strict=True):
        fitting = [size for size in counts if (sample == (transform.degrade(crop, size) if size < 112 else crop)).all()]
        counts[fitting[0]] += 1
    assert 15 <= counts[112] <= 45 and all(60 < counts[size] < 120 for size in (56, 28, 14))
    assert sum(counts.values()) == 300


def test_the_strong_augmentation_is_chosen_by_its_setting():
    for augmentation, change in (
        (Augmentation(strong=True), transform.train_warp),
        (Augmentation(), transform.train_crop),
    ):
        expected = change(noise(), np.random.default_rng(0))
        np.testing.assert_array_equal(seen(augmentation, noise(), 1)[0], expected)


class ThreadCounts(torch.utils.data.Dataset):
    """Says how many threads the BLAS libraries of its process may use."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[int]:
        np.ones((64, 64)) @ np.ones((64, 64))
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_loader_processes_compute_on_one_thread():
    loader = torch.utils.data.DataLoader(ThreadCounts(), batch_size=None, num_workers=1, worker_init_fn=_start_worker)
    (counts,) = loader
    assert counts and set(counts) == {1}
