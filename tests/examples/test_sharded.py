"""The examples of sharded training: short runs under torchrun, and a checkpoint on another number of ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--width=64", "--layers=2", "--batch=4", "--context=32", "--steps=20", "--lr=3e-3"]


def launch(program: str, folder: Path, ranks: int, *arguments: str) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    finished = subprocess.run(
        [*torchrun, EXAMPLES / program, *SMALL, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def loss_in(output: str, step: int) -> float:
    loss = re.search(rf"validation loss ([\d.]+) after {step} steps", output)
    assert loss is not None, output
    return float(loss[1])


@pytest.mark.parametrize(
    "program, arguments, said",
    [
        ("train_gpt_fsdp.py", ["--feedback=int8"], "gradients: int4-hadamard"),
        ("train_gpt_fsdp.py", ["--weights=int4", "--differences"], "weights: int4"),
        ("train_gpt_ragged.py", ["--feedback=int8", "--plan"], "on 2 ranks: shards of"),
        ("train_gpt_ragged.py", ["--optimizer=muon"], "matrices moved"),
        ("train_gpt_ragged.py", ["--optimizer=adam8bit", "--weights=none"], "gradients: int4-hadamard"),
        ("train_gpt_sdp4bit.py", [], "10 steps on 2 ranks"),
    ],
)
def test_it_learns_and_another_number_of_ranks_continues(
    program: str, arguments: list[str], said: str, tmp_path: Path
) -> None:
    half = launch(program, tmp_path, 2, *arguments, "--checkpoint=half", "--checkpoint-at=10")
    assert said in half
    assert re.search(r"rank 0 has sent [\d.]+ MB", half)
    # A model that knows nothing has a loss of ln 256 = 5.55, and begins a little above.
    assert loss_in(half, 10) < 5.5
    continued = launch(program, tmp_path, 1, *arguments, "--resume=half")
    assert loss_in(continued, 20) < min(5.0, loss_in(half, 10))
