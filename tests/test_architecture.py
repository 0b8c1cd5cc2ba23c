"""Imports go down only, and the library has no side effects that its users would notice."""

import ast
from pathlib import Path

import pytest

import skivfpq

PACKAGE = Path(skivfpq.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
RUN_TIME_PACKAGES = {"numpy", "scipy", "sklearn", "joblib"}  # joblib comes with scikit-learn


def _imports(path):
    """Full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _layer(name):
    """0 for kernels, 1 for algorithms, 2 for what is above."""
    if name.startswith("skivfpq._kernels"):
        return 0
    return 1 if name.startswith("skivfpq._algorithms") else 2


def _module(path):
    return ".".join(("skivfpq", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_the_package_is_found():
    names = {_module(path) for path in SOURCES}
    assert {"skivfpq", "skivfpq._kmeans", "skivfpq._algorithms.lloyd", "skivfpq._kernels.reference"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_go_down_only(path):
    for name in _imports(path):
        if name.startswith("skivfpq"):
            assert _layer(name) <= _layer(_module(path)) or name == "skivfpq", name
        if _layer(_module(path)) < 2:
            assert not name.startswith("sklearn"), f"{name}: algorithms know no estimator"


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_only_the_run_time_packages_are_imported(path):
    import sys

    allowed = RUN_TIME_PACKAGES | set(sys.stdlib_module_names) | {"skivfpq"}
    assert {name.split(".")[0] for name in _imports(path)} <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_private_scikit_learn_is_in_one_file(path):
    if path.name != "_sklearn_private.py":
        private = [name for name in _imports(path) if name.startswith("sklearn") and "._" in name]
        assert private == []


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_no_side_effects_and_no_asserts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), "python -O removes asserts"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("np.random.seed", "warnings.simplefilter"), ast.unparse(node)


def test_functions_are_short_and_files_too():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 45, f"{path.name}: {node.name} has {length} lines"
