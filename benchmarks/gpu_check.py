"""`make gpu-check`: all that needs a GPU in one go, offline, against the packages of the Python that runs it.

    python benchmarks/gpu_check.py [--report FOLDER]

Builds the native module in place for the GPU at hand, runs the tests on CUDA, measures the kernels, and runs the kernel
tests again under each tool of compute-sanitizer where there is one. Needs nvcc, CMake, and of Python packages torch,
pybind11, numpy, pytest, pytest-timeout and what else the tests import; with pytest-xdist the tests take less time. What
it found goes into one folder (``gpu-check-report``, or the one that $OUT names): ``report.md``, ``report.json``,
``kernels.json`` and ``log.txt``.
Exits with 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 570
SANITIZER_TOOLS = ("synccheck", "memcheck", "racecheck", "initcheck")  # the fastest first: they share the time


@dataclass(frozen=True)
class Stage:
    """One command: what it was, how it ended and the last line that it printed."""

    name: str
    command: str
    outcome: str  # "passed", "failed", "timed out" or "skipped: ..."
    seconds: float
    last_line: str

    @property
    def is_failure(self) -> bool:
        return self.outcome in ("failed", "timed out")


def run(name: str, command: Sequence[str], limit_s: float, report: Path, **environment: str) -> Stage:
    """Run one stage from the root of the repository, at most ``limit_s`` seconds; its output goes into ``log.txt``.

    A run of pytest in which no test passed has failed: all of them were skipped.
    """
    print(f"== {name}: {' '.join(command)}", flush=True)
    log = report / "log.txt"
    start = time.perf_counter()
    with log.open("a") as output:
        output.write(f"\n== {name}: {' '.join(command)}\n")
        output.flush()
        start_of_output = output.tell()
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it has started ends with it
        )
        try:
            outcome = "passed" if process.wait(max(1.0, limit_s)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = "timed out"
    text = log.read_bytes()[start_of_output:].decode(errors="replace")
    last_line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    # Sanitizers write a line after pytest's last.
    if "pytest" in command and outcome == "passed" and not re.search(r"\b[1-9]\d* passed\b", text):
        outcome = "failed"
    stage = Stage(name, " ".join(command), outcome, time.perf_counter() - start, last_line)
    print(f"   {outcome} after {stage.seconds:.0f} s: {last_line}", flush=True)
    return stage


def first_line(*command: str, containing: str = "") -> str:
    """The first line of a command's output that contains a text, or why there is none."""
    if shutil.which(command[0]) is None:
        return "not found"
    finished = subprocess.run(command, capture_output=True, text=True)
    lines = (finished.stdout + finished.stderr).splitlines()
    return next((line.strip() for line in lines if containing in line), "no output")


def environment() -> dict[str, str]:
    return {
        "gpu": first_line("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "nvcc": first_line("nvcc", "--version", containing="release"),
        "python": platform.python_version(),
        "commit": first_line(
            "git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
        ),
    }


def stages(report: Path) -> list[Stage]:
    """Run them all; what depends on the build is left out when the build failed."""
    deadline = time.perf_counter() + TIME_LIMIT_S
    capability = "".join(str(number) for number in torch.cuda.get_device_capability())
    cmake_arguments = f"-DSMALLREDUCE_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={capability}-real"
    build = ["make", "build", f"PYTHON={sys.executable}", f"CMAKE_ARGS={cmake_arguments}"]
    done = [run("build", build, 240, report)]
    if done[0].is_failure:
        return done

    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "cuda"]
    path = os.pathsep.join(filter(None, [str(REPOSITORY / "python"), os.environ.get("PYTHONPATH")]))
    # A single process leaves the GPU idle most of the time.
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    done.append(run("tests", [*pytest, *parallel], 240, report, PYTHONPATH=path))
    kernels = [sys.executable, "benchmarks/kernels.py", "--device", "cuda", "--json", str(report / "kernels.json")]
    done.append(run("kernels", kernels, 180, report, PYTHONPATH=path))

    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for place, tool in enumerate(SANITIZER_TOOLS):
        if sanitizer is None:
            done.append(Stage(f"sanitizer-{tool}", "", "skipped: no compute-sanitizer", 0, ""))
            continue
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "1",
            *pytest,
            "tests/kernels",
            "-x",
            "-k",
            "test_sizes or refused or topk_of_many",
        ]
        # torch's allocator hands out pieces of large blocks, in which an access out of bounds goes unseen.
        exact = {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        share_s = (deadline - time.perf_counter()) / (len(SANITIZER_TOOLS) - place)
        done.append(run(f"sanitizer-{tool}", command, share_s, report, **exact))
    return done


def markdown(machine: dict[str, str], done: list[Stage]) -> str:
    lines = ["# gpu-check", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["| stage | outcome | seconds | last line |", "|---|---|---|---|"]
    lines += [f"| {stage.name} | {stage.outcome} | {stage.seconds:.0f} | `{stage.last_line[:160]}` |" for stage in done]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT") or REPOSITORY / "gpu-check-report")
    parser.add_argument("--report", type=Path, default=default, help="folder for the report (default: %(default)s)")
    report: Path = parser.parse_args().report.resolve()
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device that torch can use; there is none here", file=sys.stderr)
        return 1
    report.mkdir(parents=True, exist_ok=True)
    (report / "log.txt").unlink(missing_ok=True)
    machine = environment()
    done = stages(report)
    (report / "report.md").write_text(markdown(machine, done))
    found = {"environment": machine, "stages": [asdict(stage) for stage in done]}
    (report / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    failures = sum(stage.is_failure for stage in done)
    print(f"report: {report}\n{sum(stage.outcome == 'passed' for stage in done)} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
