"""The seven commands of docs/own_data.md, as they stand there, turn drawn photographs into names."""

import csv
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from applications.demo.data_set import Face, render
from applications.demo.drawn.photograph import photograph
from util.image_io import write_image
from util.public_networks import read_public_network

ROOT = Path(__file__).parents[1]
# What makes the commands fast, and independent of the machine.
SMALL = {
    "applications.align.face_align": ["--processes=0"],
    "train": ["--backbone=MobileFaceNet_025", "--epochs=1", "--batch_size=8", "--num_workers=0", "--embedding_size=32"],
}


def commands() -> list[tuple[str, list[str]]]:
    """Return (module, arguments) of the commands in the section of the page."""
    section = (ROOT / "docs/own_data.md").read_text().partition("## The seven commands")[2].partition("\n## ")[0]
    found = re.findall(r"^    python (?:-m )?(\S+) (.*)$", section, re.M)
    return [(program.removesuffix(".py").replace("/", "."), words.split()) for program, words in found]


def draw(folder: Path, people: range, images: int, seed: int) -> None:
    """Draw photographs of people, FOLDER/drawn_N/I.jpg."""
    for person in people:
        for image in range(images):
            face = render(Face(seed, person, image, "frontal"))
            picture = photograph([face], np.random.default_rng((seed, person, image)))
            write_image(folder / f"drawn_{person}" / f"{image}.jpg", picture)


@pytest.mark.slow
def test_seven_commands_lead_from_photographs_to_names(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "photos", range(1, 7), images=3, seed=1)
    draw(tmp_path / "photos_test", range(7, 21), images=2, seed=1)
    draw(tmp_path / "people", range(1, 4), images=1, seed=1)
    draw(tmp_path / "new_photos", range(2, 4), images=1, seed=2)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    given = commands()
    assert len(given) == 7
    for program, words in given:
        if "RUN" in words:
            (run,) = Path("checkpoints").iterdir()
            words[words.index("RUN")] = str(run)
        module = program if program in ("train", "applications.align.face_align") else f"{program}.__main__"
        import_module(module).main([*words, *SMALL.get(program, []), "--gpu_num=cpu"])

    metadata = read_public_network(tmp_path / "net.onnx").metadata
    assert run.name in metadata["training_run"] and metadata["embedding_size"] == "32"
    text = capsys.readouterr().out
    assert "14 people in test: 364 pairs of different people" in text  # 28 images: 28 * 27 / 2 - 14
    with (tmp_path / "named/faces.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(row["nearest"] in ("drawn_1", "drawn_2", "drawn_3") for row in rows)
    assert len(list((tmp_path / "named").glob("drawn_*/*.jpg"))) == 2
