"""Who may import whom. The arrows: scripts -> config, util, model; applications -> util, model; model -> torch."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train", "validation"}
NOT_OURS = {"data", "checkpoints", "checkpoints_best", "log", "build"}


def sources(*tops: str) -> list[Path]:
    """The project's Python files below `tops` (all of them by default), relative to the root."""
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    ours = [
        file for file in files if file.parts[0] not in NOT_OURS and not any(part.startswith(".") for part in file.parts)
    ]
    return sorted(file for file in ours if not tops or file.parts[0] in tops)


def imports(tree: ast.AST, package: tuple[str, ...], typing: bool) -> Iterator[str]:
    """Dotted names of the modules imported anywhere below `tree`; those for type checkers only if `typing`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            yield ".".join([*base, *([node.module] if node.module else [])])
        yield from imports(node, package, typing)


def imported_tops(file: Path, typing: bool = True) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {name.split(".")[0] for name in imports(tree, file.parts[:-1], typing)}


def offenders(files: list[Path], forbidden: set[str], typing: bool = True) -> dict[str, set[str]]:
    assert files
    found = {str(file): imported_tops(file, typing) & forbidden for file in files}
    return {file: names for file, names in found.items() if names}


def test_the_walk_sees_every_kind_of_import():
    code = (
        "import a.b, c\nfrom d.e import f\nfrom . import g\nfrom ..up import h\nif TYPE_CHECKING:\n    import i\n"
        "def function():\n    try:\n        import j\n    finally:\n        pass\n"
    )
    found = list(imports(ast.parse(code), ("model", "head"), typing=True))
    assert found == ["a.b", "c", "d.e", "model.head", "model.up", "i", "j"]
    assert "i" not in list(imports(ast.parse(code), ("model", "head"), typing=False))
    names = {str(file) for file in sources()}
    assert {"train.py", "config.py", "model/backbone/irse.py", "util/data/loader.py", "tests/test_imports.py"} <= names
    assert not any(name.startswith((".venv", "data")) for name in names)


def test_model_imports_torch_and_itself():
    allowed = {"torch", "model"} | sys.stdlib_module_names
    for file in sources("model"):
        assert imported_tops(file) <= allowed, file


def test_util_imports_neither_settings_nor_programs_and_model_for_types_alone():
    assert offenders(sources("util"), SCRIPTS | {"config", "applications", "benchmarks", "tests"}) == {}
    assert offenders(sources("util"), {"model"}, typing=False) == {}


def test_applications_import_neither_settings_nor_scripts():
    assert offenders(sources("applications"), SCRIPTS | {"config", "benchmarks", "tests"}) == {}


def test_settings_import_no_networks_and_no_programs():
    assert offenders([Path("config.py")], SCRIPTS | {"applications", "benchmarks", "tests", "torch"}) == {}


def test_scripts_import_no_applications():
    files = [Path(f"{script}.py") for script in sorted(SCRIPTS)]
    assert offenders(files, SCRIPTS | {"applications", "benchmarks", "tests"}) == {}


def test_nothing_but_tests_imports_a_script():
    assert offenders([file for file in sources() if file.parts[0] != "tests"], SCRIPTS) == {}


@pytest.mark.parametrize("name", ["train", "validation"])
def test_scripts_do_not_import_torch_before_the_command_line_is_read(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    outer = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = set(imports(ast.Module(body=outer, type_ignores=[]), (), typing=True))
    assert modules
    heavy = {
        "torch",
        "numpy",
        "cv2",
        "matplotlib",
        "util.checkpoint.io",
        "util.checkpoint.run_dir",
        "util.data.loader",
        "util.training.log",
        "util.evaluate",
    }
    assert modules & heavy == set()


def test_bcolz_is_imported_in_one_function():
    places = []
    for file in [file for file in sources() if file.parts[0] != "tests"]:
        tree = ast.parse((ROOT / file).read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        places += [f"{file}:{function.name}" for function in functions if "bcolz" in imports(function, (), True)]
        if "bcolz" in imported_tops(file):
            assert any(place.startswith(f"{file}:") for place in places), f"{file} imports bcolz at its top"
    assert places == ["util/pairs/bcolz.py:import_bcolz"]


def test_pillow_reads_photographs_and_nothing_else():
    """All other images are decoded by OpenCV, which is faster, and says less about a broken one."""
    assert offenders(sources("applications"), {"PIL"}) == {"util/image_io.py": {"PIL"}}
    assert offenders(sources("model", "util"), {"PIL"}) == {}
