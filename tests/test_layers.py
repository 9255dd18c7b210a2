"""A file imports only from the layers below its own, and csrc/ knows nothing of torch (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "smallreduce"
CSRC = ROOT / "csrc"

# Python, from the bottom up. A name is a module of the package or a package in it; those of one row do not import from
# each other. `metrics` and `advise` stand beside the others and import from none.
LAYERS = [
    ["_C"],
    ["_native", "_blocks", "metrics", "advise"],
    ["_layout"],
    ["_operators"],
    ["ops"],
    ["codecs"],
    ["feedback", "_flat_shard"],
    ["collectives"],
    ["ddp", "fsdp"],
    ["ragged"],
    ["optim"],
    ["__init__"],
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

# C++: what a file in a folder may include from the others.
INCLUDES = {
    "formats": {"formats"},
    "cpu": {"formats", "cpu"},
    "cuda": {"formats", "cuda"},
    "bindings": {"formats", "cpu", "cuda", "bindings"},
}


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").removesuffix(".pyi").split(".")[0]


def _imported_units(source: str, path: Path) -> set[str]:
    """The modules or packages right under smallreduce that a file imports from."""
    package = ["smallreduce", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            if module == ["smallreduce"]:
                names |= {f"smallreduce.{alias.name}" for alias in node.names}
            else:
                names.add(".".join(module))
    return {name.split(".")[1] for name in names if name.startswith("smallreduce.")} | {
        "__init__" for name in names if name == "smallreduce"
    }


def _violations(unit: str, imported: set[str]) -> list[str]:
    return sorted(name for name in imported if name != unit and LEVELS[name] >= LEVELS[unit])


PYTHON = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_point_down(path: Path) -> None:
    unit = _unit(path)
    assert unit in LEVELS, f"{unit} has no layer yet; give it one in LAYERS"
    assert _violations(unit, _imported_units(path.read_text(), path)) == []


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_down(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    text = path.read_text()
    for name in re.findall(r'#\s*include\s*"([^"]+)"', text):
        assert (CSRC / name).exists(), f"{name}: includes are written from csrc/"
        assert name.split("/")[0] in INCLUDES[folder], name
    for name in re.findall(r"#\s*include\s*<([^>]+)>", text):
        assert not re.match(r"(torch|ATen|c10|caffe2)/", name), name
        if folder == "formats":
            assert not re.match(r"cuda|cub/|thrust/", name), f"{name}: formats/ is free of the CUDA runtime"
        if folder != "bindings":
            assert not name.startswith(("pybind11/", "Python.h")), name


def test_the_walk_sees_files() -> None:
    assert {"ops", "codecs", "collectives"} <= {_unit(path) for path in PYTHON}
    assert {"formats", "cpu", "bindings"} <= {path.relative_to(CSRC).parts[0] for path in NATIVE}


def test_an_upward_arrow_is_found() -> None:
    for source in (
        "from smallreduce.collectives import all_reduce",
        "import smallreduce.ddp",
        "def f():\n    from smallreduce import feedback",
        "import smallreduce",
    ):
        assert _violations("codecs", _imported_units(source, PACKAGE / "codecs.py"))
    inside = _imported_units("from .. import codecs\nfrom . import _work", PACKAGE / "collectives" / "_call.py")
    assert inside == {"codecs", "collectives"}
    assert _violations("collectives", inside) == []
    assert _violations("ddp", {"fsdp"}) == ["fsdp"]
