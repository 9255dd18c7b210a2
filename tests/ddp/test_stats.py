"""What stats() says is what a counter at the process group counts."""

from __future__ import annotations

import math

import pytest

import smallreduce as sr
from ddp.training import loss_of, mlp, wrap
from ranks import run
from smallreduce import metrics

BACKEND = metrics.register_counting_backend()


def _counts(rank: int, world: int) -> None:
    for options in (
        {"codec": "int4"},
        {"codec": "sign", "warmup_steps": 2},
        {"codec": None},
        {"codec": "int8", "feedback": False, "codec_for": lambda name, p: "int2" if "3" in name else "int4-hadamard"},
    ):
        # No buffers to broadcast, no unused parameters to find: DDP itself sends nothing in a step but the order of its
        # rebuilt buckets, once, after the first.
        ddp = wrap(mlp(), bucket_cap_mb=0.004)
        metrics.reset()
        state = sr.ddp.register(ddp, **options)
        stock = wrap(mlp(), bucket_cap_mb=0.004)
        metrics.reset()
        at_register = state.stats()
        for step in range(2):
            loss_of(ddp, rank, step).backward()
        settled, counted = state.stats(), metrics.bytes_sent()
        if world > 1:
            # At most DDP's own exchange of bucket indices is not the hook's.
            assert 0 <= counted - (settled.bytes_sent - at_register.bytes_sent) < 1000
        metrics.reset()
        for step in range(2, 7):
            loss_of(ddp, rank, step).backward()
        stats = state.stats()
        sent = metrics.sent()
        assert stats.bytes_sent - settled.bytes_sent == metrics.bytes_sent() == sum(s.nbytes for s in sent.values())
        assert stats.collectives - settled.collectives == sum(s.calls for s in sent.values())

        for step in range(2):
            loss_of(stock, rank, step).backward()
        metrics.reset()
        for step in range(2, 7):
            loss_of(stock, rank, step).backward()
        assert stats.uncompressed_bytes - settled.uncompressed_bytes == metrics.bytes_sent()
        assert stats.steps == 7
        assert stats.calls - settled.calls == 5 * len(stats.buckets) > 5
        assert sum(bucket.numel for bucket in stats.buckets) == sum(p.numel() for p in ddp.parameters())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_bytes_are_those_counted_at_the_process_group(world: int) -> None:
    run(_counts, world, backend=BACKEND)


def _figures(rank: int, world: int) -> None:
    ddp = wrap(mlp())
    state = sr.ddp.register(ddp, "int8", measure_every=3)
    assert state.stats().calls == 0
    errors = []
    for step in range(5):
        loss_of(ddp, rank, step).backward()
        bucket = state.stats().buckets[0]
        assert bucket.relative_error is not None
        errors.append(bucket.relative_error)
    # Measured in step 0, in step 1, since DDP has rebuilt its bucket, and three steps later.
    assert errors[1] == errors[2] == errors[3]
    assert len(set(errors)) == 3
    # 8 bits: steps of absmax / 127, evenly rounded to one side or the other.
    assert all(0 < error < 0.02 for error in errors)
    residuals = state.state_dict()["parameters"].values()
    workers = sum(float(saved["worker"].square().sum()) for saved in residuals)
    servers = sum(float(t.square().sum()) for saved in residuals for t in saved["server"] if t is not None)
    assert bucket.residual_norm == pytest.approx(math.sqrt(workers + servers), rel=1e-6)
    assert bucket.wire_ratio > 2
    assert "wire ratio" in str(state.stats())


def test_error_and_norm() -> None:
    run(_figures, 2)
