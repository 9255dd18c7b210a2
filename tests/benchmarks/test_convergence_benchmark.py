"""convergence.py: every method trains, ranks stay equal, bytes are counted, and the tables say what was reached."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from programs import convergence, tables

from ranks import run
from smallreduce import metrics

BACKEND = metrics.register_counting_backend()
COMMON = ["--steps=36", "--sparsity-warmup=4", "--lr-warmup=4", "--seeds", "7", "--batch=2", "--learning-rates"]
DIGITS = convergence.parse_arguments(["--task=digits", *COMMON, "0.002"])  # at ten times that EF-SGD diverges
TEXT = convergence.parse_arguments(["--task=gpt", *COMMON, "0.05", "--width=32", "--layers=1", "--context=16"])


def train_all(rank: int, world_size: int, args: argparse.Namespace, methods: tuple[str, ...]) -> list[convergence.Run]:
    task = convergence.TASKS[args.task](args)
    return [run for method in methods for run in convergence.train_all(method, args, task)]


def initial_loss(args: argparse.Namespace) -> float:
    task = convergence.TASKS[args.task](args)
    torch.manual_seed(7)
    return task.evaluate(task.model())[0]


@pytest.fixture(scope="module")
def runs() -> dict[str, convergence.Run]:
    results = run(train_all, 4, DIGITS, convergence.METHODS, backend=BACKEND, timeout=240)
    assert [[replace(row, seconds=0) for row in rows] for rows in results[1:]] == 3 * [
        [replace(row, seconds=0) for row in results[0]]
    ]
    return {row.method: row for row in results[0]}


def test_every_method_learns(runs: dict[str, convergence.Run]) -> None:
    before = initial_loss(DIGITS)
    for row in runs.values():
        assert row.loss < before, row.method
        assert row.accuracy is not None and 0 <= row.accuracy <= 100
        assert row.wrong == 0, row.method


def test_bytes_are_those_of_the_method(runs: dict[str, convergence.Run]) -> None:
    dense_nbytes = 2 * 3 / 4 * 4 * runs["sgd"].parameters  # of an fp32 all-reduce on 4 ranks, in a step
    assert runs["sgd"].sent_nbytes_after_warmup == (36 - 4) * dense_nbytes
    # A gathered packet has six bytes for each kept element and some of its own; in a ring all-reduce ranks send less.
    assert 32 * dense_nbytes / runs["dgc"].sent_nbytes_after_warmup > 200
    assert runs["dgc-fp16"].sent_nbytes_after_warmup < runs["dgc"].sent_nbytes_after_warmup
    assert runs["dgc"].sent_nbytes > 10 * runs["dgc"].sent_nbytes_after_warmup
    for method, row in runs.items():
        if method not in ("sgd", "dgc", "dgc-fp16"):
            assert row.compression_ratio == pytest.approx(int(method.rpartition("-")[2]), rel=1e-12)


def test_ranks_differ_where_the_method_lets_them(runs: dict[str, convergence.Run]) -> None:
    for method, row in runs.items():
        bifurcated = method.startswith(("cser", "csea", "qsparse"))  # 36 steps end between two of QSparse's exchanges
        assert (row.apart > 0) == bifurcated, method


def test_the_text_is_learnt() -> None:
    rows = run(train_all, 2, TEXT, ("sgd", "dgc", "cser-32"), backend=BACKEND, timeout=120)[0]
    before = initial_loss(TEXT)
    for row in rows:
        assert row.loss < before and row.accuracy is None and row.wrong == 0


def test_the_learning_rate_is_chosen_by_validation() -> None:
    # What is learnt at 1e-9 in 36 steps is nothing, and at 1e6 everything becomes NaN.
    args = argparse.Namespace(**{**vars(DIGITS), "learning_rates": [1e6, 1e-9, 0.02]})
    rows = run(train_all, 2, args, ("sgd",), backend=BACKEND, timeout=120)[0]
    assert [(row.tuning, row.seed, row.lr) for row in rows] == [
        (True, 1000, 1e6), (True, 1000, 1e-9), (True, 1000, 0.02), (False, 7, 0.02)
    ]  # fmt: skip
    assert math.isnan(rows[0].validation_loss)
    assert rows[2].validation_loss < rows[1].validation_loss


def row(method: str, seed: int, *, tuning: bool = False, **figures: Any) -> convergence.Run:
    values: dict[str, Any] = dict(
        lr=0.1, steps=40, world_size=4, parameters=2_000_000, compression_ratio=1.0, sent_nbytes=4_000_000,
        sent_nbytes_after_warmup=3_000_000, loss=2.0, accuracy=None, validation_loss=2.0,
        apart=0.0, wrong=0, seconds=1.0,
    )  # fmt: skip
    return convergence.Run(method, seed, tuning, **{**values, **figures})


SENT = dict(sent_nbytes=400_000, sent_nbytes_after_warmup=10_000, compression_ratio=640.0)
OF_TEXT = [
    row("sgd", 1000, tuning=True, loss=9.0),
    row("sgd", 0, loss=2.0),
    row("sgd", 1, loss=2.5),
    row("dgc", 0, loss=2.25, **SENT),
    row("dgc", 1, loss=2.277, **SENT),
]
OF_DIGITS = [
    row("sgd", 0, accuracy=99.0),
    row("sgd", 1, accuracy=98.0),
    row("dgc", 0, accuracy=98.5, **{**SENT, "sent_nbytes_after_warmup": 100_000}),
    row("dgc", 1, accuracy=97.25, apart=0.125, **{**SENT, "sent_nbytes_after_warmup": 100_000}),
]


def document(task: str, rows: list[convergence.Run]) -> dict[str, Any]:
    settings = dict(
        task=task, batch=16, learning_rates=[0.1, 0.2], momentum=0.9, nesterov=True, sparsity_warmup=10, clip_norm=0.25
    )
    made: dict[str, Any] = json.loads(json.dumps(dict(rows=[asdict(row) for row in rows], settings=settings)))
    return made


def test_the_table_of_the_program() -> None:
    lines = [line.split() for line in convergence.format_runs(OF_TEXT, 10).splitlines()]
    assert lines[2] == ["sgd", "0.1", "2.2500", "2.0000-2.5000", "+0.00%", "100.00", "100.00", "1.0", "1.0", "1.0",
                        "0.0e+00", "0"]  # fmt: skip
    assert lines[3] == ["dgc", "0.1", "2.2635", "2.2500-2.2770", "+0.60%", "10.00", "0.33", "10.0", "300.0", "640.0",
                        "0.0e+00", "0"]  # fmt: skip
    lines = [line.split() for line in convergence.format_runs(OF_DIGITS, 10).splitlines()]
    assert lines[3][5:8] == ["97.88", "97.25-98.50", "-0.62"]


def test_the_table_of_the_text() -> None:
    text = tables.convergence_section(document("gpt", OF_TEXT))
    assert text.startswith(
        "`gpt`: 2.00 M parameters, 40 steps, 4 ranks with batches of 16, 2 seed(s); Nesterov momentum 0.9; sparsity "
        "warm-up of 10 steps; gradients clipped to 0.25 each; learning rate out of 0.1, 0.2, by another seed.\n"
    )
    assert (
        "| `dgc` | 0.1 | 2.2635 (2.2500-2.2770) | +0.60% | 10.00 | 0.33 | 10.0 | 300.0 | 640.0 | 0.0e+00 | 0 |" in text
    )
    assert text.endswith(
        "`dgc`: +0.60% of the loss of `sgd`, target +1 % (met); 300 times fewer bytes after the warm-up, target 200 "
        "(met)."
    )


def test_the_table_of_the_digits() -> None:
    text = tables.convergence_section(document("digits", OF_DIGITS))
    assert "| `dgc` | 0.1 | 2.0000 (2.0000-2.0000) | 97.88 (97.25-98.50) | -0.62 | 10.00 | 3.33 | 10.0 | 30.0 |" in text
    assert text.endswith(
        "`dgc`: 0.62 points of accuracy below `sgd`, target 0.5 (missed); 30 times fewer bytes after the warm-up, "
        "target 200 (missed)."
    )
    section = tables.section("convergence", {"convergence-digits": {**document("digits", OF_DIGITS), **MADE_BY}})
    assert section.startswith(
        "### convergence-digits\n\n`python -m torch.distributed.run --nproc-per-node 4 benchmarks/"
    )
    assert section.endswith(text)


def test_what_diverged_is_said() -> None:
    rows = [*OF_DIGITS[:2], row("ef-sgd-32", 0, loss=math.nan, accuracy=10.0), row("ef-sgd-32", 1, accuracy=90.0)]
    line = convergence.format_runs(rows, 10).splitlines()[3]
    assert "NaN: 1 of 2" in line
    text = tables.convergence_section(document("digits", rows))
    assert "| `ef-sgd-32` | 0.1 | NaN with 1 of 2 seeds | 50.00 (10.00-90.00) | -48.50 |" in text


MADE_BY = {
    "benchmark": "convergence", "command": "benchmarks/convergence.py", "time": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef", "uncommitted_changes": False, "processor": "Some Processor", "cores": 2, "gpu": None,
    "torch": "2.13.0", "smallreduce": {"cpu": "avx2"}, "threads": 1, "world_size": 4, "link_rate": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "adam"], "invalid choice: 'adam'"),
        (["--seeds", "0", "1000"], "none of --seeds"),
        (["--sparsity-warmup", "6"], "a multiple of 4"),
        (["--steps", "64", "--sparsity-warmup", "64"], "less than --steps"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convergence.parse_arguments(arguments)
    assert message in capsys.readouterr().err
