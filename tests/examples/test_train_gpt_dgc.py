"""examples/train_gpt_dgc.py: a short run of it under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples" / "train_gpt_dgc.py"
SMALL = ["--width=64", "--layers=2", "--batch=4", "--context=64", "--steps=30", "--warmup=5"]


def test_it_learns_from_what_it_sends(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROGRAM, *SMALL],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr
    # A model that knows nothing has a loss of ln 256.
    loss = re.search(r"validation loss ([\d.]+) after 30 steps", finished.stdout)
    assert loss is not None and float(loss[1]) < 5.0
    assert "in topk:0.001; wire ratio" in finished.stdout
    assert re.search(r"rank 0 has sent [\d.]+ MB", finished.stdout)
