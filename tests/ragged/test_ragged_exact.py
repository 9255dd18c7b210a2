"""Where nothing is compressed, a ragged model has the bits of FSDP2."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsdp.training import loss_of, sharded
from ragged.sharding import full_gradients, full_parameters, in_rank_order, ragged
from ranks import run

STEPS = 20
# Products with powers of two are exact, so that no rounding depends on how a loop was vectorised, which depends on
# where a tensor was cut.
SGD = {"lr": 2.0**-4, "momentum": 0.5, "weight_decay": 2.0**-8}

ALL = {"accumulate": True, "freeze": True, "checkpoint": True}
GRANULARITIES: list[Any] = ["group", "rows", 3, "matrix", lambda name, _: "matrix" if "wide" in name else 2]
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    *(("fp32", granularity, {}) for granularity in GRANULARITIES),
    ("fp32", "rows", {"reshard_after_forward": False}),
    ("fp32", "rows", {"accumulate": True}),
    ("fp32", 2, ALL),
    ("bf16", "rows", ALL),
    ("bf16", "matrix", {"accumulate": True}),
    ("bf16-reduce", "group", ALL),
    ("fp16-reduce", "rows", {"freeze": True}),
]


def train(model: Any, optimizer: torch.optim.Optimizer, rank: int, step: int, accumulate: bool) -> dict[str, Any]:
    optimizer.zero_grad()
    for micro in range(1 + accumulate):
        if accumulate:
            model.set_requires_gradient_sync(micro == 1)
        loss_of(model, rank, 2 * step + micro).backward()
    found = full_gradients(model)
    optimizer.step()
    return found


def same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> bool:
    return list(ours) == list(theirs) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def _exact(rank: int, world: int) -> None:
    for case in CASES:
        _compare(rank, world, *case)


def _compare(rank: int, world: int, policy: str, granularity: Any, given: dict[str, Any]) -> None:
    case = (policy, granularity, given)
    options = {"accumulate": False, **given}
    accumulate = options.pop("accumulate")
    stock, ours = sharded(policy=policy, **options), ragged(policy=policy, granularity=granularity, **options)
    models: list[nn.Module] = [ours, stock]
    optimizers = [torch.optim.SGD(model.parameters(), **SGD) for model in models]
    with in_rank_order(stock) if world > 2 else contextlib.nullcontext():
        for step in range(STEPS):
            found = [train(m, o, rank, step, accumulate) for m, o in zip(models, optimizers, strict=True)]
            assert same(*found), (case, step)
            assert same(full_parameters(ours), full_parameters(stock)), (case, step)
            assert any(gradient is not None and gradient.any() for gradient in found[0].values())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_bits_are_those_of_fsdp2(world: int) -> None:
    run(_exact, world, timeout=300)
