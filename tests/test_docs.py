"""What the documentation shows is what happens."""

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import skivfpq

ROOT = Path(__file__).parents[1]
MODULES = ["skivfpq", "_kmeans", "_product_quantizer", "_ivf_index", "_metrics", "_versions"]


def run(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_readme_example_prints_what_it_shows(tmp_path):
    readme = (ROOT / "README.md").read_text()
    code, output = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", readme, re.DOTALL).groups()
    script = tmp_path / "example.py"
    script.write_text(code)
    assert run("-W", "error", script) == output
    assert len(code.splitlines()) == 15


def test_readme_has_the_two_commands():
    commands = re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert commands == ["pip install . && python examples/quickstart.py", 'pip install ".[test]" && pytest']


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    module = importlib.import_module(module if module == "skivfpq" else f"skivfpq.{module}")
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0 or module is skivfpq


def public_callables():
    for name in skivfpq.__all__:
        thing = getattr(skivfpq, name)
        if inspect.isclass(thing):
            yield name, thing
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                if not method.startswith("_") and function.__module__.startswith("skivfpq"):
                    yield f"{name}.{method}", function
        elif callable(thing):
            yield name, thing


@pytest.mark.parametrize(("name", "thing"), list(public_callables()), ids=lambda value: str(value)[:40])
def test_docstrings_name_every_parameter(name, thing):
    doc = inspect.getdoc(thing)
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name not in ("self", "kwargs"):
            assert re.search(rf"^[\w, ]*\b{parameter.name}\b[\w, ]* : ", doc, re.MULTILINE), parameter.name
    if not inspect.isclass(thing) and name != "show_versions":
        assert re.search(r"^Returns\n-------$", doc, re.MULTILINE)
    if "." not in name:
        assert re.search(r"^Examples\n--------$", doc, re.MULTILINE)


@pytest.mark.parametrize("estimator", [skivfpq.LloydKMeans, skivfpq.ProductQuantizer, skivfpq.IVFIndex])
def test_fitted_attributes_are_documented(estimator):
    params = {"n_lists": 2, "n_probes": 1} if estimator is skivfpq.IVFIndex else {"random_state": 0}
    params |= {"n_bits": 2} if estimator is skivfpq.ProductQuantizer else {}
    fitted = estimator(**params).fit(np.random.default_rng(0).normal(size=(20, 3)))
    attributes = {
        name
        for name in dir(fitted)
        if name.endswith("_") and not name.startswith("_") and hasattr(fitted, name)
    }
    documented = set(
        re.findall(r"^    (\w+_) : ", inspect.getdoc(estimator).replace("\n", "\n    "), re.MULTILINE)
    )
    assert attributes <= documented
    assert documented - attributes <= {"feature_names_in_"}


def test_all_names_are_there():
    assert sorted(skivfpq.__all__) == skivfpq.__all__
    for name in skivfpq.__all__:
        assert getattr(skivfpq, name) is not None


def test_quickstart():
    output = run("-W", "error", ROOT / "examples" / "quickstart.py")
    n_patches = int(output.split()[0].replace(",", ""))
    assert n_patches >= 100_000
    assert float(re.search(r"recall@10 +([\d.]+)", output)[1]) >= 0.95
    for line in ("build time", "queries per second", "bytes per vector"):
        assert float(re.search(rf"{line} +([\d,.]+)", output)[1].replace(",", "")) > 0


def test_digits_example():
    output = run(ROOT / "examples" / "digits.py")
    accuracies = [float(number) for number in re.findall(r"accuracy ([\d.]+)", output)]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.9


def test_photographs_without_pillow():
    sklearn_images = pytest.importorskip("PIL") and __import__("sklearn.datasets").datasets.load_sample_images
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        photographs = importlib.import_module("photographs")
    finally:
        sys.path.pop(0)
    folder = importlib.resources.files("sklearn.datasets.images")
    for name, image in zip(("china.jpg", "flower.jpg"), sklearn_images().images):
        decoded = photographs.decode_jpeg((folder / name).read_bytes())
        difference = np.abs(decoded.astype(int) - image)
        assert difference.max() <= 3  # decoders round differently
        assert difference.mean() < 0.1


def test_examples_need_run_time_packages_only():
    allowed = {"numpy", "scipy", "sklearn", "skivfpq", "photographs"} | set(sys.stdlib_module_names)
    for path in (ROOT / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
