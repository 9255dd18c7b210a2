"""memory.py: what is computed is what a model holds, and what is measured contains it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import memory

PROGRAM = Path(memory.__file__)
SMALL = ["--width=256", "--layers=2", "--ranks=2"]


def test_a_rank_holds_what_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    finished = subprocess.run(
        [sys.executable, PROGRAM, "--methods", "fsdp2", *SMALL, "--json", path],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr
    document = json.loads(path.read_text())
    assert document["command"] == "benchmarks/memory.py --methods fsdp2 --width=256 --layers=2 --ranks=2"
    (row,) = document["rows"]
    assert (row["method"], row["world_size"]) == ("fsdp2", 2)
    # The most that a step needs beside it is less than what DDP would hold of the model.
    assert row["computed_nbytes"] < row["measured_nbytes"] < memory.lasting("ddp", row["parameters"], 2).total
    assert finished.stdout.splitlines()[3].split()[0] == "fsdp2"


@pytest.mark.parametrize(
    "method, of_a_parameter",
    [
        # In bytes: weights, gradients and the buckets that they are sent from, two moments, residuals, and what else is
        # kept; on 2 nodes of 2 ranks.
        ("ddp", 4 + (4 + 4) + 8 + 0),
        ("zero", 4 + (4 + 4) + 2 + 0),
        ("fsdp2", 1 + 1 + 2 + 0),
        ("fsdp2-two-level-keep", 1 + 1 + 2 + 0),
        ("fsdp2-int4-loco", 1 + 1 + 2 + (8 + 16 / 128) / 8),
        ("ragged-int4-keep", 1 + 1 + 2 + 0),
        ("ragged-adam8bit", 1 + 1 + (2 + 8 / 1024) / 4 + 0),
        ("sdp4bit-exact", 4 + 4 + 2 + 0),
        ("sdp4bit", (4 + 1) + 1 + 2 + 0 + (8 + 16 / 128) / 8 * 9 / 4 + (4 + 16 / 2048) / 8),
        ("fsdp2-differences", 1 + 1 + 2 + 0 + (4 + 1)),
        ("ddp-int4", 4 + (4 + 4) + 8 + (4 + 1) + 2 * (4 + 16 / 128) / 8),
    ],
)
def test_what_lasts(method: str, of_a_parameter: float) -> None:
    assert memory.lasting(method, 1 << 17, 4, nodes=2).total == (1 << 17) * of_a_parameter
