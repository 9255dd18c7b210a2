"""training.py: every method trains, ranks stay equal, and bytes are those of the gradients."""

from __future__ import annotations

import argparse

from programs import training

from ranks import run
from smallreduce import metrics

BACKEND = metrics.register_counting_backend()
METHODS = ("ddp", "fp16", "powersgd-1", "int4", "sign", "dgc")
ARGUMENTS = argparse.Namespace(
    steps=6, warmup_steps=4, uncompressed_steps=3, compute_steps=2, eval_every=3,
    width=32, layers=1, batch=1, context=16, lr=1e-3,
)  # fmt: skip


def train_all(rank: int, world_size: int) -> list[training.Run]:
    corpus = training.load_corpus()
    return [training.train(method, 0, ARGUMENTS, corpus) for method in METHODS]


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
    table = training.format_runs(list(runs.values()))
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(METHODS)
