"""examples/digits_cser.py: its settings, and short runs of it under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks import run

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import digits  # noqa: E402
import digits_cser  # noqa: E402


@pytest.mark.parametrize("method, lr", [("cser", 0.05), ("qsparse-local-sgd", 0.02)])
def test_it_learns(method: str, lr: float, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    finished = subprocess.run(
        [*torchrun, EXAMPLES / "digits_cser.py", f"--method={method}", f"--lr={lr}", "--steps=200"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr
    accuracy = re.search(r"^test accuracy ([\d.]+) %, loss [\d.]+ after 200 steps$", finished.stdout, re.MULTILINE)
    # Better than telling the digits by the nearest of the ten mean images, which is right in 90 %.
    training, _, test = digits.load()
    means = torch.stack([training.images[training.labels == label].mean(0).flatten() for label in range(10)])
    nearest = torch.cdist(test.images.flatten(1), means).argmin(dim=1)
    assert accuracy is not None
    assert float(accuracy[1]) > 100 * (nearest == test.labels).sum().item() / len(test)


def _ratios(rank: int, world: int) -> None:
    for method in digits_cser.METHODS:
        for ratio in (16, 32, 256):
            optimizer = digits_cser.make(method, digits.DigitsNet(), 0.1, 0.9, ratio)
            assert optimizer.compression_ratio == ratio
            assert optimizer.param_groups[0]["momentum"] == 0.9
    with pytest.raises(ValueError, match=r"one of cser, .*got sgd"):
        digits_cser.make("sgd", digits.DigitsNet(), 0.1, 0.9, 32)


def test_every_method_has_the_ratio_asked_for() -> None:
    run(_ratios, 1)
