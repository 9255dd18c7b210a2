"""sharded.py: every method trains, the exact ones alike, and bytes are those of the method."""

from __future__ import annotations

import argparse
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from programs import comparison, sharded

from ranks import run
from smallreduce import metrics

BACKEND = metrics.register_counting_backend()
ARGUMENTS = argparse.Namespace(
    steps=6, warmup_steps=4, compute_steps=2, eval_every=3, node_size=2,
    width=64, layers=2, batch=1, context=16, lr=1e-3,
)  # fmt: skip


def train_all(rank: int, world_size: int) -> list[comparison.Run]:
    corpus = comparison.load_corpus()
    return [comparison.train(method, 0, ARGUMENTS, corpus, sharded.prepare) for method in sharded.METHODS]


@pytest.fixture(scope="module")
def runs() -> dict[str, comparison.Run]:
    return {result.method: result for result in run(train_all, 4, backend=BACKEND, timeout=240)[0]}


def test_every_method_trains(runs: dict[str, comparison.Run]) -> None:
    for result in runs.values():
        assert result.wrong == 0, result.method
        assert [step for step, _ in result.validation_losses] == [3, 6]
        assert result.validation_losses[1][1] < result.validation_losses[0][1], result.method
        assert result.exposed_seconds == result.step_seconds.median - result.compute_seconds.median
        assert result.parameters == runs["ddp"].parameters


def test_sharding_without_compression_changes_nothing(runs: dict[str, comparison.Run]) -> None:
    # Four gradients are added up in another order, which changes a mean by at most 2^-22 of their largest. AdamW moves
    # an element by up to 1e-3 a step in the direction of its gradient's sign, so elements with gradients as small as
    # that change, none larger than 0.1, may be moved elsewhere in 6 steps: the loss, about 5.2, changes by less than
    # 133440 * 2^-22 * 0.1 * 2 * 6e-3 = 4e-5. What a rank of four alone contributes is a thousand times as much.
    for method in ("zero", "fsdp2", "fsdp2-keep", "sdp4bit-exact"):
        assert runs[method].validation_loss == pytest.approx(runs["ddp"].validation_loss, rel=1e-5), method


def test_bytes_are_those_of_the_method(runs: dict[str, comparison.Run]) -> None:
    parameters = runs["ddp"].parameters
    once = 4 * parameters * 3 / 4  # what a rank sends of fp32 when each of 4 shards goes to three others
    assert runs["ddp"].sent_nbytes_per_step == pytest.approx(2 * once, rel=1e-6)
    # The blocks' weights are gathered for the forward and for the backward pass, those of the rest once.
    block_parameters = 2 * 12 * 64 * 64 + 2 * 2 * 64
    expected = 2 * once + 4 * block_parameters * 3 / 4
    assert runs["fsdp2"].sent_nbytes_per_step == pytest.approx(expected, rel=1e-3)
    assert runs["fsdp2-keep"].sent_nbytes_per_step == pytest.approx(2 * once, rel=1e-3)
    # Without the first gather of differences, which is exact: it is not among the timed steps.
    for method in ("fsdp2-int4", "fsdp2-two-level", "fsdp2-differences", "fsdp2-int4-loco", "sdp4bit"):
        assert runs[method].sent_nbytes_per_step < runs["fsdp2"].sent_nbytes_per_step / 4, method


def count_parameters(rank: int, world_size: int) -> tuple[int, int, Counter[str]]:
    """Elements of the parameters that the optimizer without communication updates, with and without sharding; and what
    a measurement of it sends."""
    batch = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64)
    numels = []
    metrics.reset()
    for parts in (1, world_size):
        alone = sharded.Alone(ARGUMENTS, parts)
        assert alone(batch, 100.0) < 100
        (group,) = alone._made[1].param_groups
        numels.append(sum(parameter.numel() for parameter in group["params"]))
    sent = Counter({op: count.calls for op, count in metrics.sent().items()})
    dist.barrier()
    return numels[0], numels[1], sent


def test_computing_alone_sends_nothing(runs: dict[str, comparison.Run]) -> None:
    for whole, part, sent in run(count_parameters, 2, backend=BACKEND):
        assert (whole, part, sent) == (runs["ddp"].parameters, runs["ddp"].parameters // 2, Counter())


def test_a_method_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sharded.parse_arguments(["--methods", "fsdp3"])
    assert "no method is called 'fsdp3'; there are ddp, ddp-int4, zero, fsdp2" in capsys.readouterr().err
