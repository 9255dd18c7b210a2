"""Packets of weights that are kept for the backward pass: when they are decoded, and when they are let go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import smallreduce as sr
from fsdp.seen import Two, shard_each
from fsdp.training import Given, fsdp_modules
from ranks import run


def _compressed() -> tuple[Any, sr.fsdp.State]:
    model = shard_each(Two(True, None))
    return model, sr.fsdp.compress(model, "int8", "int4", keep_packets=True)


def _changed_on_one_rank(rank: int, world: int) -> None:
    # Whether a collective is issued must not depend on what one rank alone has done: the other one goes on with its
    # packets, whether it meets the first one again or not.
    model, state = _compressed()
    loss = model(torch.ones(64))
    sent = state.stats().weights.bytes_sent
    if rank == 0:
        with torch.no_grad():
            model.second.weight.to_local().fill_(7.0)
        with pytest.raises(RuntimeError, match=r"weights of second have changed.*compress without keep_packets"):
            loss.backward()
    else:
        seen = [*model.second.seen]
        with pytest.raises(RuntimeError):  # it waits for the first one in the reduction, which never comes
            loss.backward()
        assert torch.equal(model.second.seen[-1], seen[0]) and len(model.second.seen) == 2
    assert state.stats().weights.bytes_sent == sent


def test_a_change_on_one_rank_is_an_error_there() -> None:
    run(_changed_on_one_rank, 2, group_timeout=3, keep=False)


def _after_shutdown(rank: int, world: int) -> None:
    model, state = _compressed()
    unbroken, _ = _compressed()
    for step in range(3):
        if step == 1:
            sr.shutdown()
        for each in (model, unbroken):
            each(torch.ones(64)).backward()
    for each, other in zip(model.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(each.grad.to_local(), other.grad.to_local())
    packet = sr.IntQuant(4).packet_nbytes(64 // world)
    assert state.stats().weights.bytes_sent == 3 * 2 * (world - 1) * packet  # two units, once in a step


def test_training_goes_on_after_shutdown() -> None:
    run(_after_shutdown, 2)


def _shut_down_with_differences(rank: int, world: int) -> None:
    results = []
    for shut_down in (False, True):
        model = shard_each(Two(True, None))
        sr.fsdp.compress(model, "int8", "int4", differences=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        for _ in range(3):
            model(torch.ones(64)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if shut_down:
                sr.shutdown()
        results.append(model.first.weight.to_local().detach())
    assert torch.equal(*results)


def test_differences_go_on_after_shutdown() -> None:
    run(_shut_down_with_differences, 2)


def _let_go(rank: int, world: int) -> None:
    model, state = _compressed()
    model(torch.ones(64)).backward()
    assert state.stats().kept_nbytes > 0
    for module in fsdp_modules(model):
        module.set_reshard_after_forward(False)
    model(torch.ones(64)).backward()
    assert state.stats().kept_nbytes == 0


def test_what_is_not_used_is_let_go() -> None:
    run(_let_go, 2)


def _other_sizes(rank: int, world: int) -> None:
    for options in ({}, {"differences": True}):
        model = Given([(40, 8)])
        torch.distributed.fsdp.fully_shard(model)
        state = sr.fsdp.compress(model, "int8", "int4", **options)
        gather = state._gathers[0]
        with pytest.raises(RuntimeError, match="gathers 161 elements from each rank, but its parameters have 160"):
            gather(torch.empty(2 * 161), torch.empty(161), torch.distributed.group.WORLD)


def test_parts_of_another_size_are_refused() -> None:
    run(_other_sizes, 2)
