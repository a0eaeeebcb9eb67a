"""The files in recipes/: each is read, builds what it names, and says where its settings and figures come from."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from config import parse_train
from model.backbone import build_backbone
from model.head import build_head
from model.loss import build_loss

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SOURCES = ("arXiv:", "/README.md", ", README.md", "arcface_torch, configs/", "face.evoLVe, config.py", "benchmarks/")

recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def comment(path: Path) -> str:
    """Return the comment that a recipe begins with, without its line breaks."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(lines)


def command(path: Path) -> list[str]:
    """Return the arguments of the one command in a recipe's comment."""
    commands = re.findall(r"^#     (?:python|torchrun --nproc_per_node=8 --) train\.py (.*)$", path.read_text(), re.M)
    assert len(commands) == 1 and f"--config=recipes/{path.name}" in commands[0]
    return shlex.split(commands[0])


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_recipes_cover_sets_and_networks():
    names = {path.stem for path in RECIPES}
    sets = ("casia", "ms1mv2", "ms1mv3", "glint360k", "webface4m", "webface12m")
    assert {f"{name}_{network}" for name in sets for network in ("irse50", "iresnet50", "mobilefacenet")} <= names
    assert {
        "small_set",
        "fine_tuning",
        "low_resolution_irse50",
        "ms1mv3_iresnet50_one_gpu",
        "webface12m_vit_b",
    } <= names


@recipe
def test_recipe_builds_what_it_names(path):
    config = parse_train(command(path))
    with torch.device("meta"):
        backbone = build_backbone(config.backbone, embedding_size=config.embedding_size).eval()
        head = build_head(config.head, config.embedding_size, 10, **config.head_settings)
        embeddings = backbone(torch.empty(2, 3, 112, 112))
    assert embeddings.shape == (2, head.weight.shape[1])
    assert build_loss(config.loss) is not None
    assert config.warmup_epochs < config.epochs
    assert all(stage < config.epochs for stage in config.stages) or config.schedule != "step"


@recipe
def test_recipe_names_figures_and_their_sources(path):
    text = comment(path)
    aims, settings = text.split("Aims at ", 1)[1].split(" Settings: ", 1)
    assert "ot measured " in aims
    if aims.startswith("no published figure: "):
        return
    assert any(source in aims for source in SOURCES)
    assert any(source in settings for source in SOURCES)


@recipe
def test_recipe_follows_the_rule_that_it_states(path):
    config = parse_train(command(path))
    rule = re.search(r"the source has lr ([\d.]+) for batches of ([\d,]+), so lr is ([\d.]+) for (\d+)", comment(path))
    assert config.scale_lr == bool(rule)
    if rule:
        lr, batch, ours, images = (float(number.replace(",", "")) for number in rule.groups())
        assert (config.lr, config.batch_size) == (ours, images)
        assert config.lr == pytest.approx(lr * images / batch)


@recipe
def test_recipe_has_no_setting_of_a_machine(path):
    machine = {"gpu_num", "num_workers", "data_dir", "checkpoint_dir", "best_checkpoint_dir", "log_dir", "resume_dir"}
    assert not machine & yaml.safe_load(path.read_text()).keys()
