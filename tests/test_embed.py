"""Files of embeddings: what they hold, how a stopped run continues, and the calibration that is made from them."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pytest
import torch

from applications.calibrate.__main__ import main as calibrate_main
from applications.embed.__main__ import main as embed_main
from model.backbone import build_backbone
from util.calibration import read_calibration
from util.embedding_table import EmbeddingTable, read_table
from util.errors import DataError, Interrupted
from util.evaluate import embed
from util.files import sha256
from util.public_networks import read_public_network
from util.transform import eval_crop


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """Return a Backbone file with random weights."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("network") / "Backbone_Best.pth"
    torch.save(build_backbone("MobileFaceNet_025", embedding_size=8).state_dict(), file)
    return file


@pytest.fixture
def embed_folder(network, people_folder, tmp_path):
    """Return a function that embeds the folder of seven images of three people into a file, and reads it."""

    def run(name: str = "e.npz", *more: str) -> EmbeddingTable:
        embed_main(
            [f"--network={network}", f"--data={people_folder}", f"--out={tmp_path}/{name}", "--gpu_num=cpu", *more]
        )
        return read_table(tmp_path / name)

    return run


def test_embeddings_are_those_of_the_evaluation(embed_folder, network, people_folder):
    table = embed_folder()
    files = sorted(people_folder.glob("*/*.jpg"))
    assert table.names == [str(file.relative_to(people_folder)) for file in files] and len(files) == 7
    module = read_public_network(network).network.eval()
    crops = eval_crop(np.stack([cv2.imread(str(file))[:, :, ::-1] for file in files]))
    np.testing.assert_allclose(table.embeddings, embed(module, crops).numpy(), atol=1e-4)
    with torch.inference_mode():
        images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
        lengths = (module(images) + module(images.flip(3))).norm(dim=1) / 2
    np.testing.assert_allclose(table.quality, lengths.numpy(), rtol=1e-4)
    assert table.metadata["sha256"] == sha256(network) and table.metadata["crop"] == "128"


def test_parquet_and_npz_hold_the_same(embed_folder, tmp_path):
    first, second = embed_folder("e.npz"), embed_folder("e.parquet")
    assert first.names == second.names and first.metadata == second.metadata
    np.testing.assert_array_equal(first.embeddings, second.embeddings)
    np.testing.assert_array_equal(first.quality, second.quality)
    columns = pyarrow.parquet.read_table(tmp_path / "e.parquet").to_pydict()
    assert list(columns) == ["name", "embedding", "quality"]
    np.testing.assert_array_equal(columns["embedding"], first.embeddings)
    with np.load(tmp_path / "e.npz") as arrays:  # without pickle
        assert arrays["names"].tolist() == first.names


def test_interrupted_run_continues(embed_folder, people_folder, tmp_path, monkeypatch, capsys):
    complete = embed_folder("complete.npz")
    monkeypatch.setattr("applications.embed.__main__.IMAGES_IN_A_PART", 3)
    write = EmbeddingTable.write
    written: list[Path] = []

    def stop_at_the_third(self: EmbeddingTable, path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, path)
        written.append(path)

    monkeypatch.setattr(EmbeddingTable, "write", stop_at_the_third)
    with pytest.raises(Interrupted) as stop:
        embed_folder()
    assert "The same command continues from here." in stop.value.message
    assert not (tmp_path / "e.npz").exists() and len(list((tmp_path / "e.npz.parts").glob("*.npz"))) == 2
    monkeypatch.setattr(EmbeddingTable, "write", write)
    shutil.copy(people_folder / "Cid/Cid_0000.jpg", people_folder / "Cid/new.jpg")
    (people_folder / "Ann/Ann_0000.jpg").unlink()
    capsys.readouterr()
    table = embed_folder()
    assert "continuing: 4 of 7 images are embedded already" in capsys.readouterr().out
    assert not (tmp_path / "e.npz.parts").exists()
    assert table.names == sorted({*complete.names, "Cid/new.jpg"} - {"Ann/Ann_0000.jpg"})
    rows = [complete.names.index(name) for name in table.names if name != "Cid/new.jpg"]
    np.testing.assert_allclose(table.embeddings[:-1], complete.embeddings[rows], atol=1e-5)


def test_parts_of_another_network_are_not_mixed(embed_folder, network, people_folder, tmp_path, end_of):
    parts = tmp_path / "e.npz.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"sha256": "other"}))
    arguments = [f"--network={network}", f"--data={people_folder}", f"--out={tmp_path}/e.npz", "--gpu_num=cpu"]
    code, text = end_of(embed_main, arguments)
    assert code == 2 and "made with other settings" in text and f"Remove {parts} to start again." in text


def test_unreadable_images_are_named_and_left_out(embed_folder, people_folder, capsys):
    odd = os.fsdecode(b"\xfc.jpg")
    shutil.copy(people_folder / "Cid/Cid_0000.jpg", people_folder / "Cid" / odd)
    (people_folder / "Ann/cut.jpg").write_bytes((people_folder / "Ann/Ann_0000.jpg").read_bytes()[:300])
    table = embed_folder()
    text = capsys.readouterr().out
    assert "8 embeddings of 8 numbers, 1 images unreadable" in text and "Ann/cut.jpg" in text
    assert "Cid/\\udcfc.jpg" in table.names and "Ann/cut.jpg" not in table.names


def test_photographs_that_are_not_aligned_are_noticed(embed_folder, people_folder, capsys):
    embed_folder()
    assert "warning" not in capsys.readouterr().out
    image = cv2.resize(cv2.imread(str(people_folder / "Ann/Ann_0000.jpg")), (250, 250))
    cv2.imwrite(str(people_folder / "Ann/Ann_0000.jpg"), image)
    embed_folder()
    assert "warning: the first image has 250x250 pixels. Images are taken for aligned faces" in capsys.readouterr().out


def test_mistakes_end_in_one_line(network, people_folder, tmp_path, end_of):
    (tmp_path / "empty").mkdir()
    base = [f"--network={network}", "--gpu_num=cpu"]
    for arguments, code, message in (
        ([f"--data={people_folder}", f"--out={tmp_path}/e.csv"], 2, "must end in .npz or .parquet"),
        ([f"--data={tmp_path}/gone", f"--out={tmp_path}/e.npz"], 2, "gone: no such folder"),
        ([f"--data={tmp_path}/empty", f"--out={tmp_path}/e.npz"], 3, "empty: no image in it"),
        ([f"--data={people_folder}", "--out=/proc/e.npz"], 2, "--out=/proc: cannot be written to"),
    ):
        found, text = end_of(embed_main, [*base, *arguments])
        assert found == code and message in text and text.count("\n") == 1, text


@pytest.mark.parametrize("name", ["e.npz", "e.parquet"])
def test_damaged_files_are_refused(tmp_path, name):
    table = EmbeddingTable(["a/1.jpg"], np.ones((1, 4), np.float32), quality=np.ones(1, np.float32), metadata={})
    table.write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    wrong = EmbeddingTable(["a"], np.full((1, 4), np.nan, np.float32), quality=np.ones(1, np.float32), metadata={})
    wrong.write(tmp_path / f"nan{Path(name).suffix}")
    for content in (b"", whole[: len(whole) // 2], b"text" * 100):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: not embeddings that can be read \(.*Make them with python -m"):
            read_table(tmp_path / name)
    with pytest.raises(DataError, match="do not fit together"):
        read_table(tmp_path / f"nan{Path(name).suffix}")
    np.savez(tmp_path / "objects.npz", names=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"objects.npz: not embeddings"):
        read_table(tmp_path / "objects.npz")


def test_calibrate_gives_the_same_from_images_and_embeddings(embed_folder, network, people_folder, tmp_path, capsys):
    table = embed_folder()
    for data, out in ((people_folder, "images.json"), (tmp_path / "e.npz", "table.json")):
        calibrate_main([f"--network={network}", f"--data={data}", f"--out={tmp_path}/{out}", "--gpu_num=cpu"])
    text = capsys.readouterr().out
    first, second = (read_calibration(tmp_path / name) for name in ("images.json", "table.json"))
    assert (first.cosines, first.counts) == (second.cosines, second.counts)
    assert first.pairs == 2 * 4 + 2 * 1 + 4 * 1 and first.network == sha256(network)
    people = [name.partition("/")[0] for name in table.names]
    strangers = np.not_equal.outer(people, people)
    highest = (table.embeddings @ table.embeddings.T)[strangers].max()
    assert f"most alike (cosine {highest:.4f}; are they different people?)" in text
    assert first.far(highest + 0.001) == 0 < first.far(highest - 0.001)


def test_calibrate_takes_a_part_of_many_images(embed_folder, network, tmp_path, capsys, end_of):
    embed_folder()
    arguments = [f"--network={network}", f"--data={tmp_path}/e.npz", f"--out={tmp_path}/c.json", "--gpu_num=cpu"]
    calibrate_main([*arguments, "--max_images=3"])
    assert "3 of 7 images are compared" in capsys.readouterr().out
    assert read_calibration(tmp_path / "c.json").pairs == 3  # images 0, 3 and 6 are of three people
    other = tmp_path / "other.pth"
    torch.save(build_backbone("MobileFaceNet_025", embedding_size=8).state_dict(), other)
    code, text = end_of(calibrate_main, [f"--network={other}", *arguments[1:]])
    assert code == 3 and "e.npz: was made with another network" in text
