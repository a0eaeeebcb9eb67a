"""Who may import whom: scripts -> config, util, model; applications -> util, model; util -> model; model -> torch."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_OURS = {"data", "checkpoints", "checkpoints_best", "log", "build"}
SCRIPTS = {"train", "validation"}

# What each part may import from the project.
ALLOWED = {
    "model": {"model"},
    "util": {"util", "model"},
    "config": {"util", "model"},
    "train": {"config", "util", "model"},
    "validation": {"config", "util", "model"},
    "applications": {"applications", "util", "model"},
    "benchmarks": {"benchmarks", "applications", "config", "util", "model"},
}
# Pairs of photographs and IJB's loose crops are aligned by the alignment program itself, which is no part of util.
ACROSS_APPLICATIONS = {
    ("applications.prepare", "applications.align"),
    ("applications.evaluate_identities", "applications.align"),
    # The Python interface finds and aligns faces too, and these two programs are command lines for it.
    ("applications.recognizer", "applications.align"),
    ("applications.verify", "applications.recognizer"),
    ("applications.identify", "applications.recognizer"),
}
# Their __init__.py exports names that other code relies on. All others are empty.
CONTRACTS = {"model.backbone", "model.head", "model.loss", "model.super_resolution", "util.pairs", "applications.align"}

# Modules that a command line needs before it has answered: they import neither torch nor numpy nor OpenCV.
LIGHT = (
    "config",
    "train",
    "validation",
    "model.names",
    "util.cli.*",
    "util.console",
    "util.distributed",
    "util.errors",
    "util.face",
    "util.files",
)
# Modules that import no torch.
TORCH_FREE = (
    *LIGHT,
    "util.analysis",
    "util.html_page",
    "util.annotate",
    "util.calibration",
    "util.embedding_table",
    "util.gallery",
    "util.image_*",
    "util.pairs*",
    "util.parallel",
    "util.plot",
    "util.progress",
    "util.verification",
    "util.data.decode",
    "util.data.folder_index",
    "util.data.image_folder",
    "util.data.record*",
)


def module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, Path]:
    """Return the project's Python files, relative to its root, by the names of their modules."""
    found = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    hidden = [file for file in found if file.parts[0] in NOT_OURS or any(part.startswith(".") for part in file.parts)]
    return {module_name(file): file for file in found if file not in hidden}


FILES = source_files()


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Yield dotted names of the modules imported anywhere below `tree`, except those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from util import device` imports a module, `from util.errors import X` does not
                submodule = f"{module}.{alias.name}"
                yield submodule if submodule in FILES else module
        yield from imports(node, package)


def imported_by(module: str) -> set[str]:
    file = FILES[module]
    return set(imports(ast.parse((ROOT / file).read_text()), file.parts[:-1]))


IMPORTED = {module: imported_by(module) for module in FILES}


def top(module: str) -> str:
    return module.split(".")[0]


def package(module: str) -> str:
    """Return the first two parts of a name: util.data.loader belongs to util.data."""
    return ".".join(module.split(".")[:2])


def matching(patterns: tuple[str, ...]) -> list[str]:
    return [module for module in FILES if any(fnmatch(module, pattern) for pattern in patterns)]


def programs() -> list[str]:
    """Return the modules that users run, except benchmarks."""
    scripts = [module for module in FILES if top(module) in ("applications", *SCRIPTS)]
    return [module for module in scripts if "\n    run_script(main)" in (ROOT / FILES[module]).read_text()]


def test_imports_finds_every_kind_of_import():
    code = (
        "import a.b, c\nfrom d.e import f\nfrom . import g\nfrom ..up import h\nif TYPE_CHECKING:\n    import i\n"
        "from util import device, nothing\n"
        "def function():\n    try:\n        import j\n    finally:\n        pass\n"
    )
    found = list(imports(ast.parse(code), ("model", "head")))
    assert found == ["a.b", "c", "d.e", "model.head", "model.up", "util.device", "util", "j"]
    assert {"train", "config", "model.backbone.irse", "util.data.loader", "util.pairs", "tests.test_imports"} <= set(
        FILES
    )


@pytest.mark.parametrize("part", ALLOWED)
def test_part_imports_only_what_it_may(part):
    ours = {top(module) for module in FILES}
    found = {
        (module, name)
        for module, names in IMPORTED.items()
        for name in names
        if top(module) == part and top(name) in ours - ALLOWED[part]
    }
    assert found == set()


def test_model_imports_torch_and_nothing_else():
    allowed = {"torch", "model"} | sys.stdlib_module_names
    for module, names in IMPORTED.items():
        assert top(module) != "model" or {top(name) for name in names} <= allowed, module


def test_config_imports_only_the_names_of_model():
    assert {name for name in IMPORTED["config"] if top(name) == "model"} <= {"model.names"}


def test_applications_do_not_import_each_other():
    found = {
        (module, name)
        for module, names in IMPORTED.items()
        for name in names
        if top(module) == top(name) == "applications" and package(module) != package(name)
    }
    assert {pair for pair in found if (package(pair[0]), package(pair[1])) not in ACROSS_APPLICATIONS} == set()


def test_packages_import_each_other_in_no_circle():
    graph: dict[str, set[str]] = {}
    for module, names in IMPORTED.items():
        needed = {package(name) for name in names if name in FILES}
        graph.setdefault(package(module), set()).update(needed - {package(module)})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(("modules", "absent"), [(LIGHT, "torch numpy cv2"), (TORCH_FREE, "torch")])
def test_modules_import_no_heavy_library(modules, absent):
    code = (
        "import runpy, sys\n"
        "*files, absent = sys.argv[1:]\n"
        "for file in files:\n"
        "    runpy.run_path(file, run_name='imported')\n"
        "    found = [name for name in absent.split() if name in sys.modules]\n"
        "    assert not found, f'{file} imports {found}'\n"
    )
    files = [str(FILES[module]) for module in matching(modules)]
    ended = subprocess.run([sys.executable, "-c", code, *files, absent], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_help_of_a_program_imports_no_heavy_library():
    """A command line answers at once; so does a mistake in it, which is found at the same place."""
    code = (
        "import contextlib, io, runpy, sys\n"
        "from unittest.mock import patch\n"
        "for program in sys.argv[1:]:\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):\n"
        "        with patch.object(sys, 'argv', [program, '--help']):\n"
        "            runpy.run_module(program, run_name='__main__', alter_sys=True)\n"
        "    assert text.getvalue().startswith('usage: python '), program\n"
        "    found = [name for name in ('torch', 'numpy', 'cv2', 'PIL', 'matplotlib') if name in sys.modules]\n"
        "    assert not found, f'{program} --help imports {found}'\n"
    )
    found = programs()
    assert {"train", "validation", "applications.demo.__main__", "applications.align.face_align"} <= set(found)
    assert len(found) >= 13
    ended = subprocess.run([sys.executable, "-c", code, *found], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_init_files_are_empty_except_contracts():
    for module, file in FILES.items():
        if file.name == "__init__.py" and module not in CONTRACTS:
            body = ast.parse((ROOT / file).read_text()).body
            assert all(isinstance(node, ast.Expr) for node in body), f"{file}: more than a docstring"


def test_bcolz_is_imported_in_one_function():
    places = set()
    for module, names in IMPORTED.items():
        if top(module) == "tests" or "bcolz" not in names:
            continue
        tree = ast.parse((ROOT / FILES[module]).read_text())
        outside = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "bcolz" not in imports(ast.Module(body=outside, type_ignores=[]), ()), f"{module} imports it at its top"
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        places |= {f"{module}.{function.name}" for function in functions if "bcolz" in imports(function, ())}
    assert len(places) <= 1 and all(place.startswith("util.pairs.bcolz.") for place in places)


def test_pillow_reads_photographs_and_nothing_else():
    """OpenCV decodes all other images: it is faster, but accepts a damaged photograph without an error."""
    users = {module for module, names in IMPORTED.items() if any(top(name) == "PIL" for name in names)}
    assert {module for module in users if top(module) not in ("tests", "benchmarks")} == {"util.image_io"}
