"""python/smallreduce/_C.pyi is written by hand; here it is compared with the module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from smallreduce import _native

STUB = Path(_native.__file__).with_name("_C.pyi")


def _declared() -> dict[str, int]:
    functions = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {node.name: len(node.args.posonlyargs) + len(node.args.args) for node in functions}


def _defined() -> dict[str, int]:
    # pybind11 writes the signature on the first line of the docstring: name(arg0: int, arg1: bool) -> int
    names = [name for name in dir(_native.native) if not name.startswith("_")]
    return {name: len(re.findall(r"\barg\d+: ", getattr(_native.native, name).__doc__)) for name in names}


def test_the_stub_declares_what_the_module_defines() -> None:
    declared, defined = _declared(), _defined()
    if _native.native.cuda_runtime_version() == 0:
        declared = {
            name: count for name, count in declared.items() if name == "cuda_runtime_version" or "cuda" not in name
        }
    assert declared == defined
