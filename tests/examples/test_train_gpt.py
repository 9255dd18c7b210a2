"""examples/train_gpt.py: its parts, and short runs of it under torchrun."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import train_gpt  # noqa: E402

SMALL = ["--width=64", "--layers=2", "--batch=4", "--context=64"]


def launch(folder: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*torchrun, EXAMPLES / "train_gpt.py", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )


def train(folder: Path, *arguments: str) -> dict[str, Any]:
    finished = launch(folder, *arguments, "--json=result.json")
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The demonstration at a third of its length."""
    return {
        codec: train(tmp_path_factory.mktemp(codec), f"--codec={codec}", "--steps=100") for codec in ("none", "int4")
    }


def test_it_learns(runs: dict[str, dict[str, Any]]) -> None:
    # Better than the best that can be had from frequencies of single bytes, their entropy.
    training, _ = train_gpt.load_corpus()
    frequencies = torch.bincount(training.int()).double() / len(training)
    entropy = torch.special.entr(frequencies).sum().item()
    assert runs["none"]["validations"][0]["loss"] > entropy
    assert runs["none"]["validation_loss"] < entropy


def test_compressed_run_reaches_the_loss_of_the_plain_one(runs: dict[str, dict[str, Any]]) -> None:
    assert abs(runs["int4"]["validation_loss"] / runs["none"]["validation_loss"] - 1) < 0.01


def test_compressed_steps_send_a_seventh(runs: dict[str, dict[str, Any]]) -> None:
    """After the first steps, in which the first weights and, as DDP rebuilds its buckets, server residuals travel."""

    def sent(codec: str) -> int:
        points = {point["step"]: point["bytes_sent"] for point in runs[codec]["validations"]}
        return int(points[100] - points[25])

    assert 0 < sent("int4") < sent("none") / 7


def test_plain_run_sends_what_a_ring_would(runs: dict[str, dict[str, Any]]) -> None:
    # With two ranks, every fp32 gradient once. Beside them there are only DDP's set-up and the first weights.
    gradients = 4 * runs["none"]["parameters"] * 100
    assert 0 <= runs["none"]["bytes_sent"] - gradients < 1.1 * 4 * runs["none"]["parameters"]


def test_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    # Nearest rounding: a resumed run begins with DDP's first buckets again: other random bits, but the same groups.
    arguments = ["--codec=int4:rounding=nearest", *SMALL]
    straight = train(tmp_path, *arguments, "--steps=12", "--checkpoint=checkpoint.pt", "--checkpoint-every=7")
    resumed = train(tmp_path, *arguments, "--steps=12", "--resume=checkpoint.pt")
    assert resumed["training_losses"] == straight["training_losses"][7:]
    assert resumed["validation_loss"] == straight["validation_loss"]

    refused = launch(tmp_path, *arguments, "--steps=12", "--resume=checkpoint.pt", ranks=1)
    assert refused.returncode != 0
    assert "holds 2 ranks, this run has 1" in refused.stderr


def test_corpus_is_split_into_files() -> None:
    training, validation = train_gpt.load_corpus()
    again = train_gpt.load_corpus()
    assert torch.equal(training, again[0])
    assert torch.equal(validation, again[1])
    assert training.dtype == validation.dtype == torch.uint8
    assert len(training) > 4 * len(validation) > 0


def test_generator_holds_the_state_of_the_sampler() -> None:
    data = torch.arange(200, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    sampler = train_gpt.batches(data, batch=3, context=8, generator=generator)
    next(sampler)
    state = generator.get_state()
    expected = list(islice(sampler, 4))

    restored = torch.Generator()
    restored.set_state(state)
    for (tokens, targets), (expected_tokens, expected_targets) in zip(
        train_gpt.batches(data, batch=3, context=8, generator=restored), expected, strict=False
    ):
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(targets, expected_targets)
        assert torch.equal(tokens + 1, targets)


def test_evaluation_is_fixed_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = train_gpt.GPT(train_gpt.GPTConfig(width=32, layers=1, heads=1, context=16))
    _, validation = train_gpt.load_corpus()
    first = train_gpt.evaluate(model, validation, context=16)
    assert model.training
    assert train_gpt.evaluate(model, validation, context=16) == first
    # An untrained model knows nothing. The standard deviation of its logits is 0.02 √32 = 0.113, and so is that of the
    # loss for any one byte about log 256 (but for half the variance, 0.006); that of the mean over bytes is less.
    assert first == pytest.approx(math.log(256), abs=0.113)


def test_learning_rate_rises_to_its_peak_and_falls() -> None:
    rates = [train_gpt.learning_rate(step, 40, 1.0, warmup=10) for step in range(40)]
    assert rates[9] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_demo_draws_and_compares(tmp_path: Path) -> None:
    def run(codec: str, loss: float, sent: int | None, seconds: float) -> dict[str, Any]:
        points = [{"step": step, "loss": 5 - step, "bytes_sent": sent and step * sent} for step in (0, 1)]
        return {
            "codec": codec,
            "validation_loss": loss,
            "bytes_sent": sent,
            "training_seconds": seconds,
            "validations": points,
        }

    counted = [run("none", 2.0, 8_000_000, 10.0), run("int4", 2.01, 1_000_000, 5.0)]
    assert demo.table(*counted).splitlines()[-1].split() == ["compared", "+0.50%", "1/8.00", "x", "0.50"]
    uncounted = [run("none", 2.0, None, 10.0), run("int4", 1.99, None, 5.0)]
    assert demo.table(*uncounted).splitlines()[-1].split() == ["compared", "-0.50%", "-", "x", "0.50"]
    for name, pair in (("counted.png", counted), ("uncounted.png", uncounted)):
        demo.picture(pair, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
