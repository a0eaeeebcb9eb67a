"""What has to agree across files: versions, and settings with what reads them. Documents: test_documents.py."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from config import TrainConfig, ValidationConfig

ROOT = Path(__file__).parents[1]


def pins(lines: list[str]) -> set[str]:
    return {line.split(";")[0].strip() for line in lines if "==" in line}


def test_conda_environment_has_the_versions_of_requirements():
    environment = yaml.safe_load((ROOT / "FaceRecog.yml").read_text())
    conda = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    required = pins((ROOT / "requirements.txt").read_text().splitlines())
    assert pins(conda) == required and len(required) >= 10


def test_every_required_package_is_pinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-"]
        assert all(re.match(r"[\w.-]+==[\d.]+", line) for line in lines)


@pytest.mark.parametrize(
    ("kind", "readers"),
    [
        (TrainConfig, ["train.py", "util/training/loop.py", "util/training/trainer.py"]),
        (ValidationConfig, ["validation.py"]),
    ],
)
def test_every_setting_is_read(kind, readers):
    """Look for `config.NAME` and `self.config.NAME` in the syntax trees of the files that use the settings."""
    derived = {
        "views": ["LR_eval"],
        "pair_set_paths": ["val_data"],
        "sr_scales": ["SR_eval"],
        "sr_path": ["sr_checkpoint_dir"],
        "head_settings": ["s", "m", "head_options"],
    }
    read = set()
    for file in readers:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config"):
                read.update(derived.get(node.attr, [node.attr]))
    assert {field.name for field in fields(kind)} <= read


@pytest.mark.parametrize("folder", ["data", "checkpoints", "checkpoints_best", "log"])
def test_what_users_put_in_and_get_out_stays_out_of_git(folder):
    lines = (ROOT / folder / ".gitignore").read_text().splitlines()
    assert lines[0] == "*" and "!.gitignore" in lines
