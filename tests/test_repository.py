"""What has to agree across files: versions, the two READMEs, and settings with what reads them."""

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


def indented_blocks(text: str) -> list[str]:
    """The commands of a README: all indented lines, without their comments, which are in its language."""
    return [line.split(" #")[0].split("  ")[0].strip() for line in re.findall(r"^    (\S.*)$", text, re.M)]


def test_both_readmes_give_the_same_commands_links_and_flags():
    english, korean = ((ROOT / name).read_text() for name in ("README.md", "README.ko.md"))
    assert indented_blocks(english) == indented_blocks(korean)
    assert re.findall(r"^#+ ", english, re.M) == re.findall(r"^#+ ", korean, re.M)
    for pattern in (r"`(--\w+)", r"\]\(((?!README)[^)]+)\)", r"\d+\.\d+"):
        assert sorted(re.findall(pattern, english)) == sorted(re.findall(pattern, korean))


def test_no_document_has_a_gap_left_to_fill():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")]:
        assert not re.findall(r"\b[A-Z]+_(?:OUTPUT|TEXT|TABLE|SENTENCE)\b", path.read_text()), path


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target


@pytest.mark.parametrize(("kind", "script"), [(TrainConfig, "train.py"), (ValidationConfig, "validation.py")])
def test_every_setting_is_read(kind, script):
    text = (ROOT / script).read_text()
    for derived, names in {
        "views": "LR_eval",
        "named_pair_sets": "val_data",
        "sr_scales": "SR_eval",
        "sr_path": "sr_checkpoint_dir",
    }.items():
        text = text.replace(f"config.{derived}", f"config.{names}")
    unread = {field.name for field in fields(kind) if not re.search(rf"config\.{field.name}\b", text)}
    assert not unread


@pytest.mark.parametrize("folder", ["data", "checkpoints", "checkpoints_best", "log"])
def test_what_users_put_in_and_get_out_stays_out_of_git(folder):
    lines = (ROOT / folder / ".gitignore").read_text().splitlines()
    assert lines[0] == "*" and "!.gitignore" in lines
