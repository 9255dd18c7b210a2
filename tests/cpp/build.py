"""Compiles csrc/cuda and its bindings for the CPU, over the header in ``emulation/``, into a Python module.

``python tests/cpp/build.py [--sanitize]`` prints the module's path. A build is kept under ``build/`` of the checkout,
named by a hash of everything that went into it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

NAME = "emulated_cuda"
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"

FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DSR_TARGET=cuda",
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def sources() -> list[Path]:
    """What is compiled. The order of the list is the order of the link."""
    return [
        *sorted((CSRC / "cuda").glob("*.cu")),
        CSRC / "bindings" / "cuda.cpp",
        HERE / f"{NAME}.cpp",
        *sorted((HERE / "emulation").glob("*.cpp")),
    ]


def build(sanitize: bool = False) -> Path:
    """Compiles what has changed since it was last compiled; returns the path of the module."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = FLAGS + (SANITIZE if sanitize else [])
    includes = [HERE / "emulation", CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [*compiler, *flags, *(f"-I{folder}" for folder in includes)]
    folder = ROOT / "build" / "emulation" / _digest(command)
    module = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [str(Path(scratch) / f"{source.name}.o") for source in sources()]
        jobs = [
            [*command, "-x", "c++", "-c", str(source), "-o", target]
            for source, target in zip(sources(), objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, jobs))
        linked = Path(scratch) / module.name
        _run([*compiler, *flags, "-shared", *objects, "-o", str(linked)])
        linked.replace(module)  # whole or not at all, also where two test runs build at once
    return module


def load() -> ModuleType:
    """Builds if need be and imports; sanitized where ``run_sanitized`` asks for it."""
    path = build(sanitize=os.environ.get("SMALLREDUCE_EMULATION_SANITIZE") == "1")
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    inputs = [p for root in (CSRC, HERE) for p in root.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"}]
    for path in sorted(inputs):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    print(build(parser.parse_args().sanitize))
