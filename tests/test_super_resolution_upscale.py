"""upscale.py: what it writes, how it goes on, and how it refuses."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from applications.super_resolution import batch as tree
from applications.super_resolution import upscale
from model.super_resolution import RCAN, rcan_from_state_dict
from util.errors import DataError, RunError, UsageError
from util.super_resolution import enlarge
from util.transform import shrink


@pytest.fixture
def network_file(tmp_path) -> Path:
    torch.manual_seed(3)
    file = tmp_path / "best" / "SR_x2_2022-07-28-19-15" / "SR_Best.pth"
    file.parent.mkdir(parents=True)
    torch.save(RCAN(2, 4, 1, 1, 2).state_dict(), file)
    return file


@pytest.fixture
def source(tmp_path) -> Path:
    """A tree of images of three shapes, beside other files."""
    root, rng = tmp_path / "source", np.random.default_rng(0)
    for name, shape in (
        ("top.png", (20, 30)), ("Ann/1.png", (20, 30)), ("Ann/2.png", (9, 7)), ("Bob/한글.bmp", (20, 30))
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(cv2.imencode(Path(name).suffix, rng.integers(0, 256, (*shape, 3), np.uint8))[1])
    (root / "notes.txt").write_text("no image")
    (root / "Ann" / "broken.jpg").write_bytes(b"no image either")
    return root


@pytest.fixture
def run(tmp_path, source, network_file):
    def run_with(*flags: str, out: Path = tmp_path / "out") -> Path:
        common = [f"--source={source}", f"--out={out}", f"--sr_checkpoint_dir={network_file}", "--gpu_num=cpu"]
        upscale.main([*common, *flags])
        return out

    return run_with


def read(path: Path) -> np.ndarray:
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_upscale_enlarges_all_images_and_lists_the_others(run, source, network_file, capfd):
    out = run()
    assert files(out) == sorted(["Ann/1.png", "Ann/2.png", "Bob/한글.png", "top.png", "upscale.json"])
    network = rcan_from_state_dict(torch.load(network_file, weights_only=True))
    for name, image in (("Ann/1.png", "Ann/1.png"), ("Ann/2.png", "Ann/2.png"), ("Bob/한글.png", "Bob/한글.bmp")):
        expected = enlarge(network, torch.from_numpy(read(source / image)[None]))[0].numpy()
        assert np.abs(read(out / name).astype(int) - expected).max() <= 1  # batches round otherwise than single images
    said = capfd.readouterr()
    assert "4 enlarged, 0 there already, 1 left out" in said.out
    assert said.err.count("\n") == 1 and "Ann/broken.jpg: not an image in spite of its name" in said.err


def test_what_is_there_already_is_left_alone(run, capsys):
    out = run()
    (out / "Ann" / "1.png").unlink()
    (out / "top.png").write_bytes(b"mine")
    capsys.readouterr()
    run()
    assert "1 enlarged, 3 there already, 1 left out" in capsys.readouterr().out
    assert (out / "top.png").read_bytes() == b"mine" and read(out / "Ann" / "1.png").shape == (40, 60, 3)


@pytest.mark.parametrize("change", ["--degrade", "--format=jpg", "network"])
def test_images_made_otherwise_are_not_mixed(run, network_file, change):
    run()
    if change == "network":
        torch.save(RCAN(2, 4, 1, 1, 1).state_dict(), network_file)
    with pytest.raises(UsageError, match=r"--out=.*was made with other settings \(upscale\.json: "):
        run(*([] if change == "network" else [change]))


def test_faces_are_shrunk_first_where_that_is_wanted(tmp_path, run, source, people_folder, network_file):
    out = tmp_path / "faces"
    upscale.main([f"--source={people_folder}", f"--out={out}", f"--sr_checkpoint_dir={network_file}",
                  "--gpu_num=cpu", "--degrade", "--format=jpg"])  # fmt: skip
    names = files(out)
    assert len(names) == 8 and "Ann/Ann_0000.jpg" in names
    face = read(people_folder / "Ann" / "Ann_0000.jpg")
    expected = enlarge(
        rcan_from_state_dict(torch.load(network_file, weights_only=True)), torch.from_numpy(shrink(face[None], 56))
    )
    assert expected.shape == (1, 112, 112, 3)
    assert np.abs(read(out / "Ann" / "Ann_0000.jpg").astype(int) - expected[0].numpy()).mean() < 12


def test_images_that_are_no_faces_are_left_out_of_a_look(run, capfd):
    with pytest.raises(DataError, match="no image in it that can be enlarged"):
        run("--degrade")
    assert capfd.readouterr().err.count("is not square") == 4


def test_large_photographs_are_left_out(run, source, monkeypatch, capfd):
    monkeypatch.setattr(tree, "_MAX_PIXELS", 100)
    out = run()
    assert files(out) == ["Ann/2.png", "upscale.json"]
    assert "top.png: 30x20 are too many pixels to enlarge, 100 at most" in capfd.readouterr().err


def test_batches_are_as_large_as_their_pixels_allow(monkeypatch):
    sizes = []
    monkeypatch.setattr(tree, "enlarge", lambda network, batch: sizes.append(len(batch)) or batch)
    images = list(np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(56, 1).repeat(56, 2).repeat(3, 3))
    made = list(tree.Enlarger(None, 2, torch.device("cpu"), batch_size=1)(images))
    assert sizes == [4, 4, 2] and all(np.array_equal(one, other) for one, other in zip(images, made, strict=True))


def test_a_folder_of_runs_gives_the_one_for_the_scale(run, network_file, tmp_path):
    out = run(f"--sr_checkpoint_dir={network_file.parents[1]}", "--scale=2")
    assert read(out / "top.png").shape == (40, 60, 3)
    with pytest.raises(DataError, match=r"no super resolution network for scale 4 in it\. Train one with"):
        run(f"--sr_checkpoint_dir={network_file.parents[1]}", out=tmp_path / "other")
    with pytest.raises(DataError, match="enlarges 2 times, but scale 4 is requested"):
        run("--scale=4", out=tmp_path / "other")


def test_a_full_disk_ends_the_run_with_what_to_do(run, monkeypatch):
    def full(path, image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tree, "write_image", full)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\)\. Run the same command again"):
        run()


def test_folders_that_cannot_be_used_are_refused(run, source, tmp_path):
    with pytest.raises(UsageError, match=r"--out=.*holds the source"):
        run(out=tmp_path)
    with pytest.raises(UsageError, match=r"--source=.*gone: no such folder"):
        run(f"--source={tmp_path / 'gone'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in it that can be enlarged"):
        run(f"--source={tmp_path / 'empty'}")
    with pytest.raises(UsageError, match="--out: missing"):
        upscale.main([f"--source={source}"])


def test_upscale_follows_no_link_out_of_its_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "Ann").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"Ann/\d\.png: would be written into .*out, but is a link out of that folder"):
        run()
    assert not files(tmp_path / "elsewhere")
