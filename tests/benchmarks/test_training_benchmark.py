"""training.py: every method trains, ranks stay equal, and bytes are those of the gradients."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from programs import comparison, training

from ranks import run
from smallreduce import metrics

BACKEND = metrics.register_counting_backend()
METHODS = ("ddp", "fp16", "powersgd-1", "int4", "sign", "dgc")
ARGUMENTS = argparse.Namespace(
    steps=6, warmup_steps=4, uncompressed_steps=3, compute_steps=2, eval_every=3,
    width=32, layers=1, batch=1, context=16, lr=1e-3, seeds=[0, 1], methods=["ddp", "int4"], json=None, at_most=None,
)  # fmt: skip


def train_all(rank: int, world_size: int) -> list[comparison.Run]:
    corpus = comparison.load_corpus()
    return [comparison.train(method, 0, ARGUMENTS, corpus, training.prepare) for method in METHODS]


def test_every_method_trains() -> None:
    runs = {result.method: result for result in run(train_all, 2, backend=BACKEND, timeout=120)[0]}
    plain = runs["ddp"]
    assert plain.sent_nbytes_per_step == 4 * plain.parameters
    assert runs["fp16"].sent_nbytes_per_step == 2 * plain.parameters
    for result in runs.values():
        assert result.wrong == 0
        assert [step for step, _ in result.validation_losses] == [3, 6]
        assert result.validation_losses[1][1] < result.validation_losses[0][1]
        assert result.exposed_seconds == result.step_seconds.median - result.compute_seconds.median
        if result.method not in ("ddp", "fp16"):
            assert result.sent_nbytes_per_step < plain.sent_nbytes_per_step / 2
    table = comparison.format_runs(list(runs.values()))
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(METHODS)


def row(method: str, seed: int) -> comparison.Run:
    spread = comparison.Spread(0.5, 0.25, 0.75, 3)
    return comparison.Run(method, seed, 6, 2, 1000, spread, spread, 0.0, 4000.0, None, [(3, 2.5), (6, 2.0)], 2.0, 0)


def test_a_comparison_is_made_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that the file has are not made again, at most so many are added, and the result is the same."""
    trained: list[tuple[str, int]] = []

    def train(method: str, seed: int, *others: object) -> comparison.Run:
        trained.append((method, seed))
        return row(method, seed)

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(sys, "argv", [training.__file__, "--at-most", "1", "--steps", "6", "--json", "x"])
    for name in ("init_process_group", "get_rank", "get_world_size", "barrier", "destroy_process_group"):
        monkeypatch.setattr(comparison.dist, name, lambda *_: 0)
    arguments = argparse.Namespace(**{**vars(ARGUMENTS), "json": tmp_path / "result.json"})

    def piece(runs: int | None, **others: object) -> list[comparison.Run]:
        pieces = argparse.Namespace(**{**vars(arguments), "at_most": runs, **others})
        comparison.run_all("training", pieces, training.prepare, comparison.format_runs)
        return [comparison.Run.of(written) for written in json.loads(arguments.json.read_text())["rows"]]

    expected = [row(method, seed) for seed in (0, 1) for method in ("ddp", "int4")]
    assert piece(1) == expected[:1]
    assert piece(2) == expected[:3]
    assert piece(2) == expected
    assert piece(2) == expected
    assert trained == [(run.method, run.seed) for run in expected]
    with pytest.raises(ValueError, match="made with other settings"):
        piece(1, lr=2e-3)
    assert piece(None) == expected
    assert len(trained) == 8
    assert json.loads(arguments.json.read_text())["command"] == "benchmarks/training.py --steps 6"


def test_the_link_is_shown_where_it_was_counted() -> None:
    lines = comparison.format_runs([replace(row("ddp", 0), link_nbytes_per_step=2_500_000.0)]).splitlines()
    assert "2.500" in lines[2].split()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "5"], "more than --warmup-steps"),
        (["--compute-steps", "0"], "at least 1"),
        (["--at-most", "1"], "needs --json"),
        (["--methods", "powersgd-1", "--warmup-steps", "1"], "at least 2"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.parse_arguments(arguments)
    assert message in capsys.readouterr().err
