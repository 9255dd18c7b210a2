"""Where nothing is compressed, gradients have the very bits of DDP without a hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import smallreduce as sr
from ddp.training import batch, equal, gradients, mlp, wrap
from ranks import run

STEPS = 4


def _both(rank: int, options: dict[str, Any], dtype: torch.dtype, **hook: Any) -> tuple[list[bool], sr.ddp.Stats]:
    """For each step, whether the gradients equal those of stock DDP."""
    stock, ours = (wrap(mlp().to(dtype), bucket_cap_mb=0.004, **options) for _ in range(2))
    state = sr.ddp.register(ours, **hook)
    same = []
    for step in range(STEPS):
        x, y = (tensor.to(dtype) for tensor in batch(rank, step))
        for ddp in (stock, ours):
            ddp.zero_grad()
            nn.functional.mse_loss(ddp(x), y).backward()
        same.append(equal(gradients(ours), gradients(stock)))
    return same, state.stats()


def _exact(rank: int, world: int) -> None:
    always = [True] * STEPS
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}):
        for codec in (None, "fp32"):
            same, stats = _both(rank, options, torch.float32, codec=codec)
            assert same == always, (options, codec, same)
            assert stats.bytes_sent == 0 if world == 1 else stats.wire_ratio > 0.95
    for dtype in (torch.bfloat16, torch.float64):
        same, stats = _both(rank, {}, dtype, codec=None)
        assert same == always, (dtype, same)

    same, stats = _both(rank, {}, torch.float32, codec="int4", codec_for=lambda name, parameter: None)
    assert same == always
    assert {bypassed.reason for bypassed in stats.bypassed} == {
        "world size 1" if world == 1 else "codec_for gives None"
    }

    # Warm-up: exact at first, compressed after it; at world size 1 never compressed.
    same, stats = _both(rank, {}, torch.float32, codec="int4", warmup_steps=2)
    assert same[:2] == [True, True]
    assert same[2:] == ([True, True] if world == 1 else [False, False])
    assert stats.uncompressed_steps == (STEPS if world == 1 else 2)
    assert stats.steps == STEPS

    # No codec takes float64: it is exact, and says so.
    same, stats = _both(rank, {}, torch.float64, codec="int4")
    assert same == always
    if world > 1:
        assert {b.reason for b in stats.bypassed} == {"fewer than two dimensions", "no codec takes torch.float64"}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_bits_are_those_of_ddp(world: int) -> None:
    run(_exact, world)


def _vectors_exact(rank: int, world: int) -> None:
    stock, ours = wrap(mlp()), wrap(mlp())
    state = sr.ddp.register(ours, "int4")
    for step in range(STEPS):
        x, y = batch(rank, step)
        for ddp in (stock, ours):
            ddp.zero_grad()
            nn.functional.mse_loss(ddp(x), y).backward()
        for (name, p), q in zip(ours.module.named_parameters(), stock.module.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert torch.equal(p.grad, q.grad) == (p.dim() < 2), name
    stats = state.stats()
    assert {b.name for b in stats.bypassed} == {n for n, p in ours.module.named_parameters() if p.dim() < 2}
    assert sum(b.numel for b in stats.bypassed) + sum(b.compressed_numel for b in stats.buckets) == sum(
        p.numel() for p in ours.parameters()
    )


def test_parameters_of_one_dimension_are_exact_by_default() -> None:
    # On two ranks: on more, the order of gloo's sum depends on where in a buffer an element stands.
    run(_vectors_exact, 2)
