"""Wrong use: an error that names what is wrong, on every rank, within the group's timeout."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import time
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import optimizer

import smallreduce as sr
from ddp.training import Given, loss_of, mlp, wrap
from ranks import outcomes, run


def _refused(rank: int, world: int) -> None:
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        sr.ddp.register(mlp(), "int4")  # type: ignore[arg-type]
    ddp = wrap(mlp())
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "int5", {"codec": "int5"}),
        (TypeError, "codec", {"codec": 4}),
        (TypeError, "codec_for", {"codec_for": "int4"}),
        (TypeError, "scaler", {"scaler": 1024.0}),
        (TypeError, "scaler", {"scaler": mock.Mock()}),  # has a get_scale, but not what else is needed
        (ValueError, "warmup_steps", {"warmup_steps": -1}),
        (TypeError, "warmup_steps", {"warmup_steps": 1.5}),
        (TypeError, "seed", {"seed": "0"}),
        (ValueError, "measure_every", {"measure_every": -1}),
    ]
    for kind, match, options in wrong:
        with pytest.raises(kind, match=match):
            sr.ddp.register(ddp, **{"codec": "int4", **options})
        # One rank alone: the others are told.
        alone = rank == world - 1
        with pytest.raises(kind if alone else RuntimeError, match=match):
            sr.ddp.register(ddp, **{"codec": "int4", **(options if alone else {})})
    with pytest.raises(TypeError, match="float64"):
        sr.ddp.register(wrap(mlp().double()), "int4", codec_for=lambda name, parameter: "int4")
    # None of this is in the way of what is right.
    state = sr.ddp.register(ddp, "int4")
    loss_of(ddp, rank, 0).backward()
    assert state.calls == 1
    for pickled in (state, ddp):
        with pytest.raises(TypeError, match=r"HookState cannot be pickled.*state_dict\(\)"):
            pickle.dumps(pickled)

    sparse = wrap(nn.Embedding(10, 4, sparse=True))
    sr.ddp.register(sparse, "int4")
    with pytest.raises(TypeError, match="sparse=False"):
        sparse(torch.tensor([1, 2])).sum().backward()


def test_impossible_values() -> None:
    run(_refused, 2)


def _second_hook(rank: int, world: int) -> None:
    first = (lambda ddp: sr.ddp.register(ddp, "int4"), lambda ddp: sr.optim.DGC(ddp, lr=0.1))
    for make in first:
        for again in first:
            ddp = wrap(mlp())
            make(ddp)
            with pytest.raises(RuntimeError, match=r"takes one hook, once: .*Wrap the model anew"):
                again(ddp)


def test_a_second_hook_is_refused() -> None:
    run(_second_hook, 1)


def _disagree(rank: int, world: int) -> None:
    other: list[tuple[dict[str, Any], list[str]]] = [
        ({"codec": "int8"}, ["int4", "int8"]),
        ({"seed": 3}, ["seed 0", "seed 3"]),
        ({"feedback": False}, ["feedback True", "feedback False"]),
        (
            {"codec_for": lambda name, parameter: None if name == "3.weight" else "int4"},
            ["3.weight", "int4", "no codec"],
        ),
    ]
    for options, words in other:
        common = {"codec": "int4", "codec_for": lambda name, parameter: "int4"}
        with pytest.raises(RuntimeError) as raised:
            sr.ddp.register(wrap(mlp()), **(common | options if rank == 1 else common))
        for word in words:
            assert word in str(raised.value), (words, str(raised.value))

    def broken(name: str | None, parameter: torch.Tensor) -> str:
        raise KeyError(f"no rule for {name}")

    # A rank whose rule fails tells the others, which do not wait for it.
    with pytest.raises(KeyError if rank == 0 else RuntimeError, match=r"no rule for 0\.weight"):
        sr.ddp.register(wrap(mlp()), "int4", codec_for=broken if rank == 0 else None)

    # Nor where a bucket's plan fails, with whatever error.
    ddp = wrap(mlp())
    sr.ddp.register(ddp, "int4")
    broken_plan = mock.patch("smallreduce.ddp._state.plan_bucket", side_effect=OverflowError("no plan"))
    with (
        broken_plan if rank == 0 else contextlib.nullcontext(),
        pytest.raises(OverflowError if rank == 0 else RuntimeError, match="no plan"),
    ):
        loss_of(ddp, rank, 0).backward()

    # Through torch's pair the ranks meet in the first backward pass only.
    ddp = wrap(mlp())
    ddp.register_comm_hook(sr.ddp.HookState("int4" if rank == 0 else "sign"), sr.ddp.hook)
    with pytest.raises(RuntimeError, match=r"int4.*sign"):
        loss_of(ddp, rank, 0).backward()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_disagree(world: int) -> None:
    run(_disagree, world)


def _train(ddp: nn.Module, rank: int, begin: int, end: int) -> None:
    for step in range(begin, end):
        loss_of(ddp, rank, step).backward()


def _dies(rank: int, world: int) -> None:
    ddp = wrap(mlp(), bucket_cap_mb=0.004)
    sr.ddp.register(ddp, "int4")
    _train(ddp, rank, 0, 2)
    if rank == 1:
        os._exit(3)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        _train(ddp, rank, 2, 4)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_dies(world: int) -> None:
    results = outcomes(_dies, world, group_timeout=5, keep=False)
    assert results[1].exitcode == 3
    for rank in range(0, world, 2):
        assert results[rank].error is None, results[rank].traceback
        assert results[rank].exitcode == 0


def _notices(rank: int, world: int) -> None:
    def step(ddp: nn.Module, forward: nn.Module) -> list[str]:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_of(forward, rank, 0).backward()
            optimizer.step()
            optimizer.step()
        return [str(w.message) for w in caught if issubclass(w.category, sr.ddp.NeverCalled)]

    # The inner module is called, past DDP.
    ddp = wrap(mlp())
    state = sr.ddp.register(ddp, "int4")
    messages = step(ddp, ddp.module)
    assert len(messages) == 1 and "never been called" in messages[0] and "SGD" in messages[0]
    assert state.stats().calls == 0

    # A framework was given the state, and has not registered it.
    ddp = wrap(mlp())
    state = sr.ddp.HookState("int4", module=ddp)
    assert len(step(ddp, ddp)) == 1
    ddp.register_comm_hook(state, sr.ddp.hook)
    assert step(ddp, ddp) == []

    # Nothing is wrong: another model's optimizer, and accumulation.
    ddp = wrap(Given(((4, 4),)))
    state = sr.ddp.register(ddp, "int4")
    assert step(mlp(), mlp()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", sr.ddp.NeverCalled)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        with ddp.no_sync():
            ddp([torch.ones(4, 4)]).backward()
        ddp([torch.ones(4, 4)]).backward()
        optimizer.step()
    assert state.calls == 1


def test_a_dropped_state_leaves_no_optimizer_hook() -> None:
    before = list(optimizer._global_optimizer_pre_hooks)
    state = sr.ddp.HookState("int4", module=mlp())
    assert len(optimizer._global_optimizer_pre_hooks) == len(before) + 1
    del state
    gc.collect()
    assert list(optimizer._global_optimizer_pre_hooks) == before


def test_a_hook_that_is_never_called_is_noticed() -> None:
    run(_notices, 2)
