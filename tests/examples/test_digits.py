"""examples/digits.py: its parts, and short runs of it under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import digits  # noqa: E402


@pytest.mark.parametrize("ratio", ["0.001", "1"])
def test_it_learns(ratio: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    finished = subprocess.run(
        [*torchrun, EXAMPLES / "digits.py", f"--ratio={ratio}", "--steps=200"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr
    accuracy = re.fullmatch(r"test accuracy ([\d.]+) % after 200 steps\n", finished.stdout)
    # Better than telling the digits by the nearest of the ten mean images, which is right in 90 %.
    training, _, test = digits.load()
    means = torch.stack([training.images[training.labels == label].mean(0).flatten() for label in range(10)])
    nearest = torch.cdist(test.images.flatten(1), means).argmin(dim=1)
    assert accuracy is not None
    assert float(accuracy[1]) > 100 * (nearest == test.labels).sum().item() / len(test)


def test_the_split_is_fixed_and_into_parts() -> None:
    parts, again = digits.load(), digits.load()
    assert [len(part) for part in parts] == [998, 200, 599]
    for part, same in zip(parts, again, strict=True):
        assert torch.equal(part.images, same.images) and torch.equal(part.labels, same.labels)
        assert part.images.shape == (len(part), 1, 8, 8) and part.images.dtype == torch.float32
        assert part.images.min() == -1 and part.images.max() == 1
        assert part.labels.dtype == torch.int64 and set(part.labels.tolist()) == set(range(10))


def test_ranks_divide_an_epoch() -> None:
    data = digits.Digits(torch.arange(26.0).view(26, 1, 1, 1), torch.arange(26))
    of_ranks = [
        list(
            islice(
                digits.batches(data, batch=4, rank=rank, world_size=3, generator=torch.Generator().manual_seed(5)), 4
            )
        )
        for rank in range(3)
    ]
    for images, labels in (batch for of_rank in of_ranks for batch in of_rank):
        assert torch.equal(images.flatten(), labels.float()) and len(labels) == 4
    for epoch in range(2):  # of two steps, which leave out two images
        seen = [labels for of_rank in of_ranks for _, labels in of_rank[2 * epoch : 2 * epoch + 2]]
        assert len(torch.cat(seen).unique()) == 24
    with pytest.raises(ValueError, match="3 ranks with 9 images each need more than 26 images"):
        next(digits.batches(data, batch=9, rank=0, world_size=3, generator=torch.Generator()))


def test_all_parameters_are_of_the_kind_that_compresses() -> None:
    parameters = list(digits.DigitsNet().parameters())
    assert all(parameter.dim() > 1 for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) == 226_080


def test_evaluation_gives_loss_and_accuracy() -> None:
    _, _, test = digits.load()
    model = digits.DigitsNet()
    loss, accuracy = digits.evaluate(model, test)
    with torch.no_grad():
        assert loss == model(test.images, test.labels).item()
        torch.nn.init.zeros_(model.layers[-1].weight)
    # All scores are equal then, and the first class is as good as any.
    assert digits.evaluate(model, test)[1] == (test.labels == 0).sum().item() / len(test)
    assert 0 <= accuracy <= 1
