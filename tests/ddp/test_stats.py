"""What stats() says is what a counter at the process group counts."""

from __future__ import annotations

import math

import pytest
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr
from collectives.compose import to_original_domain
from ddp.training import Given, dyadic, loss_of, mlp, wrap
from ranks import run
from smallreduce import metrics

BACKEND = metrics.register_counting_backend()


def collectives_of(sent: dict[str, metrics.Sent]) -> int:
    """How many there were, where those of two ranks may be a message each way."""
    return sum(count.calls for op, count in sent.items() if op != "recv")


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
        assert stats.collectives - settled.collectives == collectives_of(sent)

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


def _counts_all_else(rank: int, world: int) -> None:
    """Also flags of unused parameters, a loaded state, and residuals that move to other ranks with it."""
    saved = None
    for bucket_cap_mb in (0.004, 100):
        ddp = wrap(mlp(), bucket_cap_mb=bucket_cap_mb, find_unused_parameters=True)
        state = sr.ddp.register(ddp, "int4")
        loss_of(ddp, rank, 0).backward()
        if saved is not None:
            state.load_state_dict(saved)
        metrics.reset()
        before = state.stats()
        for step in range(1, 4):
            loss_of(ddp, rank, step).backward()
        stats, sent = state.stats(), metrics.sent()
        # DDP itself reduces, in each step, four bytes for each parameter: which of them were used. The counter takes
        # an all-reduce for a ring.
        flags = 2 * 4 * len(list(ddp.parameters())) * (world - 1) // world
        assert stats.bytes_sent - before.bytes_sent == metrics.bytes_sent() - 3 * flags
        assert stats.collectives - before.collectives == collectives_of(sent) - 3
        saved = state.state_dict()


@pytest.mark.parametrize("world", [2, 3])
def test_what_comes_with_unused_parameters_and_loading_is_counted(world: int) -> None:
    run(_counts_all_else, world, backend=BACKEND)


def _totals(rank: int, world: int) -> None:
    """Totals survive DDP's rebuilding, also of a bucket whose index goes to wholly other parameters, and loading."""
    shapes = ((20, 64), (40, 32))

    def make() -> tuple[DistributedDataParallel, sr.ddp.HookState]:
        # A bucket for each dtype, first in the reverse order of registration, and rebuilt in that of use.
        model = Given(shapes, use=(0, 1))
        model.weights[1].data = model.weights[1].data.bfloat16()
        ddp = wrap(model)
        return ddp, sr.ddp.register(ddp, "int4")

    ddp, state = make()

    def train(begin: int, end: int) -> sr.ddp.Stats:
        for step in range(begin, end):
            ddp([dyadic(shape, step, rank, i) for i, shape in enumerate(shapes)]).backward()
        return state.stats()

    at_first = train(0, 1)
    metrics.reset()
    nbytes = 4 * 20 * 64 + 2 * 40 * 32  # a ring of two ranks sends each byte once
    for step in range(1, 4):
        stats = train(step, step + 1)
        assert stats.uncompressed_bytes == (step + 1) * nbytes
    assert [bucket.dtype for bucket in stats.buckets] == [bucket.dtype for bucket in at_first.buckets][::-1]
    assert 0 <= metrics.bytes_sent() - (stats.bytes_sent - at_first.bytes_sent) < 1000  # DDP's own exchange
    assert stats.steps == 4

    state.load_state_dict(state.state_dict())
    assert (state.stats().bytes_sent, state.stats().calls) == (stats.bytes_sent, stats.calls)
    saved = state.state_dict()
    ddp, state = make()
    state.load_state_dict(saved)
    stats = train(4, 6)
    # Figures are of this object, all of them; the step is that of the training.
    assert (stats.steps, stats.calls, stats.uncompressed_bytes) == (2, 4, 2 * nbytes)
    assert state.step == 6


def test_totals_survive_rebuilding_and_start_anew_with_the_object() -> None:
    run(_totals, 2, backend=BACKEND)


def _figures(rank: int, world: int, spelling: str) -> None:
    ddp = wrap(mlp())
    state = sr.ddp.register(ddp, spelling, measure_every=3)
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
    codec = sr.codec(spelling)
    assert codec is not None
    servers = sum(
        float(to_original_domain(server, codec).square().sum())
        for saved in residuals
        for server in saved["server"]
        if server is not None
    )
    assert bucket.residual_norm == pytest.approx(math.sqrt(workers + servers), rel=1e-6)
    assert bucket.wire_ratio > 2
    assert "wire ratio" in str(state.stats())


@pytest.mark.parametrize("spelling", ["int8", "int8-hadamard"])
def test_error_and_norm(spelling: str) -> None:
    run(_figures, 2, spelling)
