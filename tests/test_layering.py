"""Each package imports only what its layer may; read from the syntax tree, so lazy imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = ["minipaged.errors", "minipaged.checks", "minipaged.config", "minipaged.outputs"]
ANY = None  # any package from outside
NO_CODE = ("__pycache__", "clib")  # clib: the built C library

# layer: (what of our own it may import besides itself, what from outside the standard library)
LAYERS = {
    "minipaged/errors.py": ([], []),
    "minipaged/checks.py": (["minipaged.errors"], []),
    "minipaged/config.py": (["minipaged.errors", "minipaged.checks"], []),
    "minipaged/outputs.py": (["minipaged.errors"], []),
    "minipaged/home.py": (["minipaged.errors"], []),
    "minipaged/core": (BASE, []),
    "cuda_kernels": ([], ["numba", "numpy", "llvmlite", "cuda", "matplotlib", "greenlet"]),
    "minipaged/ops": (
        [*BASE, "minipaged.home", "cuda_kernels"],
        ["numpy", "numba", "llvmlite", "cffi", "threadpoolctl", "cuda"],
    ),
    "minipaged/kv_cache.py": ([*BASE, "minipaged.ops"], ["numpy"]),
    "minipaged/model": ([*BASE, "minipaged.home", "minipaged.ops", "minipaged.kv_cache"], ANY),
    "minipaged/sampling": ([*BASE, "minipaged.core", "minipaged.ops"], ["numpy", "numba", "llguidance"]),
}


def python_files(layer):
    path = ROOT / layer
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def imports(path):
    """``(line, module)`` of every import in a file; a relative one is resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parts, *filter(None, [node.module])])
            if module == "minipaged":  # `from minipaged import engine` names a module of the package
                for alias in node.names:
                    yield node.lineno, f"minipaged.{alias.name}"
            else:
                yield node.lineno, module


def inside(module, package):
    return module == package or module.startswith(package + ".")


def violations(layer, files=None):
    own, outside = LAYERS[layer]
    itself = layer.removesuffix(".py").replace("/", ".")
    for path in files or python_files(layer):
        for line, module in imports(path):
            top = module.partition(".")[0]
            if top in ("minipaged", "cuda_kernels"):
                allowed = any(inside(module, package) for package in [itself, *own])
            else:
                allowed = top in sys.stdlib_module_names or outside is ANY or top in outside
            if not allowed:
                yield f"{path.name}:{line} imports {module}, which layer {layer} may not"


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_stay_within_the_layer(layer):
    assert python_files(layer) or layer == "cuda_kernels", f"{layer} is gone; has the layer table moved?"
    assert list(violations(layer)) == []


def test_nothing_imports_torch_the_tests_or_the_tutorials():
    # Runners of other engines are scripts for other Pythons; minipaged never imports them.
    files = [path for path in python_files("minipaged") if path.parent != ROOT / "minipaged/bench/compare/runners"]
    for path in [*files, *python_files("cuda_kernels")]:
        for line, module in imports(path):
            assert module.partition(".")[0] not in ("torch", "transformers", "tests", "tutorials"), f"{path}:{line}"


def test_the_tutorials_stand_on_what_a_learner_installs():
    """They may import all of minipaged; neither torch nor what only the tests have."""
    for path in python_files("tutorials"):
        for line, module in imports(path):
            assert module.partition(".")[0] not in ("torch", "transformers", "tests", "pytest"), f"{path}:{line}"


def test_every_package_of_minipaged_has_a_layer_or_is_a_face():
    """A new package must be given its place; the faces at the end of the table may import anything."""
    packages = {path.name for path in (ROOT / "minipaged").iterdir() if path.is_dir() and path.name not in NO_CODE}
    assert packages - {"core", "ops", "model", "sampling"} <= {"cli", "bench", "view"}


@pytest.mark.parametrize(
    "text",
    [
        "import numpy",
        "from numpy import array",
        "def f():\n    import numpy.linalg",
        "from minipaged import engine",
        "from ..model import decoder",
        "import minipaged.ops.interface",
        "from minipaged.configuration import x",
    ],
)
def test_a_violation_is_seen(tmp_path, monkeypatch, text):
    path = tmp_path / "minipaged" / "core" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(list(violations("minipaged/core", [path]))) == 1


@pytest.mark.parametrize("module", ["minipaged", "minipaged.core.factory"])
def test_importing_loads_no_array_library(module):
    code = (
        f"import sys, {module}; heavy = ['numpy', 'numba', 'llvmlite', 'tokenizers', 'gguf', 'jinja2', 'tqdm', 'cffi'];"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
