"""SDP4Bit: what its steps give, what it sends and how much memory it takes."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import smallreduce as sr
from ddp.training import equal, same_on_all_ranks
from optim.sdp4bit_reference import Reference
from optim.sdp4bit_training import EXACT, GIVEN_BUCKET_MB, MOMENTUM, Case, given_gradients, given_model, train_sdp4bit
from ranks import run
from smallreduce import ops
from smallreduce.optim._sdp4bit_bucket import assign

BACKEND = sr.metrics.register_counting_backend()

ADAMW = (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1})


COMPRESSED: dict[str, dict[str, Any]] = {
    "all": {},
    "weights themselves": {"differences": False, "gradients": None},
    "weights alone": {"gradients": None, "weights": "int2:group=64"},
    "gradients alone": {"weights": None, "seed": 5},
    "one codec": {"gradients": "int4:group=64", "weights": "int8"},
    "no hadamard": {"gradients": ("int8:group=32", "int4:group=128")},
    "start step": {"start_step": 2},
}


def _matches_reference(rank: int, world: int, node_size: int, dtype: torch.dtype, optimizer: Any) -> None:
    kind, options = optimizer
    for name, scheme in COMPRESSED.items():
        # Of more than two ranks gloo's exact sums have an order of their own.
        if world > 2 and (scheme.get("start_step") or scheme.get("gradients", "") is None):
            continue
        model = given_model(dtype)
        weights = list(model.weights)
        buckets = assign(weights, GIVEN_BUCKET_MB)
        assert len(buckets) > 1
        reference = Reference(
            [w.detach().clone() for w in weights], buckets, world, kind, options, node_size=node_size, **scheme
        )
        ours = sr.optim.SDP4Bit(model, kind, bucket_cap_mb=GIVEN_BUCKET_MB, node_size=node_size, **scheme, **options)
        for step in range(5):
            for accumulated in range(2):
                key = 10 * step + accumulated
                model(given_gradients(rank, key, dtype)).backward()
                reference.reduce([given_gradients(r, key, dtype) for r in range(world)])
            ours.step()
            ours.zero_grad()
            reference.step()
            ours.synchronize()
            assert equal(weights, reference.weights), (name, step)
            assert same_on_all_ranks(weights)


@pytest.mark.parametrize(
    ("world", "node_size", "dtype", "optimizer"),
    [
        (2, 1, torch.float32, ADAMW),
        (2, 2, torch.bfloat16, MOMENTUM),
        (4, 2, torch.float32, MOMENTUM),
        (3, 3, torch.float32, ADAMW),
    ],
)
def test_steps_are_those_of_the_paper(world: int, node_size: int, dtype: torch.dtype, optimizer: Any) -> None:
    run(_matches_reference, world, node_size, dtype, optimizer)


def _random_bits(rank: int, world: int) -> None:
    # No two roundings may use the same bits: those of stages, ranks, buckets, passes and steps.
    used: dict[str, set[tuple[int, int]]] = {}

    def recording(name: str) -> Any:
        function = getattr(ops, name)
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> None:
            given = signature.bind(*args, **kwargs).arguments
            used.setdefault(name, set()).add((given["seed"], int(given["step"])))
            function(*args, **kwargs)

        return call

    model = given_model()
    optimizer = sr.optim.SDP4Bit(
        model, torch.optim.SGD, lr=0.1, bucket_cap_mb=GIVEN_BUCKET_MB, node_size=2, weights="int4:rounding=stochastic"
    )
    passes, steps = 6, 3
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encode", "reduce_encode", "encode_difference"):
            patch.setattr(ops, name, recording(name))
        for number in range(passes):
            model(given_gradients(rank, number)).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        optimizer.synchronize()
    buckets = len(optimizer._buckets)
    assert {name: len(of) for name, of in used.items()} == {
        "encode": passes * buckets, "reduce_encode": passes * buckets, "encode_difference": steps * buckets,
    }  # fmt: skip
    everyones: list[Any] = [None] * world
    dist.all_gather_object(everyones, used)
    each = [of for one in everyones for of in one.values()]
    assert len(set().union(*each)) == sum(map(len, each))


def test_no_two_roundings_use_the_same_bits() -> None:
    run(_random_bits, 4)


def _stuck(rank: int, world: int) -> None:
    # After the counter-example of section 4.1: f = |x - c|^2 / 2, each c between the levels 0 and 1 of a ternary
    # quantiser whose scale one weight at 1, without a gradient, sets. Rounded to nearest the weights themselves are 0
    # or 1, never nearer to c than 0.2; differences come as near as the step size lets them.
    target = torch.linspace(0.2, 0.4, 63).view(63, 1)
    for differences in (True, False):
        model = nn.Linear(1, 64, bias=False)
        with torch.no_grad():
            model.weight.fill_(0.75)
            model.weight[0] = 1.0
        optimizer = sr.optim.SDP4Bit(
            model,
            torch.optim.SGD,
            lr=0.05,
            weights="int2:group=64,rounding=nearest",
            differences=differences,
            gradients=None,
            overlap=False,
        )
        for _ in range(400):
            (((model.weight[1:] - target) ** 2).sum() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        error = (model.weight.detach()[1:] - target).abs()
        assert model.weight[0].item() == 1.0
        if differences:
            assert error.max() < 0.002  # a hundredth of what the other cannot get below
        else:
            assert set(model.weight.detach()[1:].flatten().tolist()) <= {0.0, 1.0}
            assert error.min() >= 0.2


def test_nearest_rounding_of_weights_gets_stuck_where_that_of_differences_converges() -> None:
    run(_stuck, 2)


# ---- figures --------------------------------------------------------------------------------------------------------


def _counts(rank: int, world: int) -> None:
    cases: list[dict[str, Any]] = [{"node_size": 2}, {"gradients": "int4", "weights": "int8"}, dict(EXACT)]
    for options in cases:
        sr.metrics.reset()
        _, model, optimizer = train_sdp4bit(Case(max_norm=0.1, scaled=True), rank, range(6), **options)
        assert same_on_all_ranks(list(model.parameters()))
        # (same_on_all_ranks has sent, too.)
        nbytes = sum(tensor.nbytes for tensor in model.parameters())
        stats = optimizer.stats()
        assert stats.bytes_sent == sr.metrics.bytes_sent() - (world - 1) * nbytes
        assert stats.bytes_sent >= stats.gradient_bytes_sent + stats.weight_bytes_sent > 0
        assert (stats.steps, stats.passes, stats.world_size) == (6, 6, world)
        assert "6 steps" in str(stats)


@pytest.mark.parametrize("world", [2, 4])
def test_what_was_sent_is_what_is_counted(world: int) -> None:
    run(_counts, world, backend=BACKEND)


def _memory(rank: int, world: int) -> None:
    model = nn.Linear(640, 64 * world, bias=False)
    numel = model.weight.numel()
    optimizer = sr.optim.SDP4Bit(model, torch.optim.Adam, lr=0.1, node_size=1)
    model(torch.ones(1, 640)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    memory = optimizer.memory()
    part = numel // world
    assert memory.weights == 4 * numel
    assert memory.master == 4 * part
    assert memory.optimizer_state == 2 * 4 * part + 4  # and a step
    assert memory.gradients == 4 * numel  # the buffer of the only bucket
    # Of gradients what is sent and what is received, of weights what is received, this rank's among them.
    gradient, weight = sr.IntQuant(4, group=128, hadamard=True), sr.IntQuant(4, group=2048)
    assert memory.packets == world * (2 * gradient.packet_nbytes(part) + weight.packet_nbytes(part))
    assert model.weight.grad is None
    assert "master" in str(memory)


def test_memory() -> None:
    run(_memory, 2)


def _shared_memory(rank: int, world: int) -> None:
    # A bucket each, all of other sizes, and one in use at a time.
    widths = (40, 64, 24, 80, 48, 16, 56)
    layers = [nn.Linear(n, m, bias=False) for n, m in pairwise(widths)]
    for options, padded in (({}, True), (EXACT, False), ({"start_step": 2}, True)):
        model = nn.Sequential(*layers)
        optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.1, bucket_cap_mb=1e-5, node_size=1, **options)
        buckets = optimizer._buckets
        assert len(buckets) == len(layers)
        for _ in range(4):
            model(torch.ones(1, widths[0])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        sizes = [bucket.weights.numel() if padded else bucket.numel for bucket in buckets]
        # Exact ones of the CPU become the reduced gradients, whole, so all are in use.
        expected = 4 * (max(sizes) if padded else sum(sizes))
        assert optimizer.memory().gradients == expected, (options, sizes)
        del optimizer


def test_buckets_share_the_memory_of_gradients() -> None:
    run(_shared_memory, 2)


def _one_rank(rank: int, world: int) -> None:
    losses, model, optimizer = train_sdp4bit(Case(dtype=torch.bfloat16), rank, range(4))
    exact, same, _ = train_sdp4bit(Case(dtype=torch.bfloat16), rank, range(4), **EXACT)
    assert equal(losses, exact)
    assert equal(list(model.parameters()), list(same.parameters()))
    assert optimizer.stats().bytes_sent == 0
    assert math.isnan(optimizer.stats().wire_ratio)


def test_one_rank_copies_exactly() -> None:
    run(_one_rank, 1)
