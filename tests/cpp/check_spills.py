"""Compiles the CUDA kernels for each architecture and fails if one spills registers to memory; needs nvcc, but no GPU.

Prints for each architecture the largest number of registers that a kernel takes, or with ``--all`` every kernel's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

CSRC = Path(__file__).parent.parent.parent / "csrc"
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
# Those of csrc/cuda/CMakeLists.txt that change what is compiled.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-DSR_TARGET=cuda", f"-I{CSRC}"]

REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '\w+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int
    spilled_bytes: int


def compile_kernels(source: Path, architecture: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as scratch:
        command = ["nvcc", *FLAGS, f"-arch={architecture}", "-Xptxas=-v", "-cubin", str(source)]
        done = subprocess.run([*command, "-o", f"{scratch}/kernels.cubin"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return [
        Kernel(found["name"], architecture, int(found["registers"]), int(found["stack"]) + int(found["stores"]))
        for found in REPORT.finditer(done.stdout + done.stderr)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="print every kernel")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()

    sources = sorted((CSRC / "cuda").glob("*.cu"))
    jobs = list(product(sources, arguments.architectures))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [k for found in pool.map(lambda job: compile_kernels(*job), jobs) for k in found]
    if not kernels:
        raise RuntimeError("nvcc reported no kernels")

    spilling = [k for k in kernels if k.spilled_bytes]
    for k in kernels if arguments.all else spilling:
        print(f"{k.architecture:7} {k.registers:4} registers {k.spilled_bytes:4} bytes spilled  {k.name}")
    for architecture in arguments.architectures:
        registers = [k.registers for k in kernels if k.architecture == architecture]
        print(f"{architecture}: {len(registers)} kernels, at most {max(registers)} registers")
    print(f"{len(spilling)} kernels spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
