"""Error feedback: nothing is lost over the steps, it is state, and it survives being saved."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import smallreduce as sr
from collectives.compose import dyadic, inputs, to_original_domain
from ranks import run
from smallreduce._layout import BLOCK
from smallreduce.collectives import _engine_for, channel_of, engine_for

_CPU = torch.device("cpu")


def _telescopes(rank: int, world: int, spelling: str, sum_of: bool) -> dict[str, torch.Tensor]:
    numel, steps = 3001, 12
    op = dist.ReduceOp.SUM if sum_of else dist.ReduceOp.AVG
    feedback = sr.ErrorFeedback()
    outputs = torch.zeros(numel, dtype=torch.float64)
    given = torch.zeros(numel, dtype=torch.float64)
    for step in range(steps):
        x = dyadic(numel, rank, seed=step)
        given += x
        sr.all_reduce(x, spelling, op=op, feedback=feedback)
        outputs += x
    codec = sr.codec(spelling)
    assert codec is not None
    assert feedback.step == steps
    assert feedback.worker is not None
    assert feedback.server is not None
    engine = engine_for([(0, numel)], codec, torch.float32, channel_of(None, _CPU))
    server = torch.zeros(engine.worker_numel // BLOCK, BLOCK)
    server[engine.server_origins] = to_original_domain(feedback.server, codec).view(-1, BLOCK)
    owed = feedback.worker[:numel].double()
    return {"given": given, "outputs": outputs, "worker": owed, "server": server.view(-1)[:numel].double()}


def _telescopes_when_split(rank: int, world: int, spelling: str, sum_of: bool) -> dict[str, torch.Tensor]:
    with unittest.mock.patch.object(_engine_for, "gathers", return_value=False):
        result = _telescopes(rank, world, spelling, sum_of)
    assert result["server"].any()
    return result


DENSE = ["int8", "int4", "int2", "int4:rounding=stochastic", "int4-hadamard", "sign"]
SPARSE = ["topk:0.05", "topk:0.05,values=bf16", "random-blocks:0.2", "random-blocks:0.2,block=100"]


@pytest.mark.parametrize(
    ("function", "spelling", "world", "sum_of"),
    [
        *((_telescopes, spelling, *case) for spelling in DENSE for case in ((2, False), (3, True))),
        *((_telescopes, spelling, *case) for spelling in SPARSE for case in ((2, False), (3, True), (4, False))),
        *((_telescopes_when_split, spelling, *case) for spelling in SPARSE[:2] for case in ((2, False), (3, True))),
    ],
)
def test_outputs_plus_residuals_are_the_inputs(
    function: Callable[..., Any], spelling: str, world: int, sum_of: bool
) -> None:
    # Inputs are multiples of 1/16 below 4, scales have 8 bits: every sum here is exact, so nothing may be missing.
    ranks = run(function, world, spelling, sum_of)
    factor = 1.0 if sum_of else 1 / world
    given = sum(result["given"] for result in ranks) * factor
    owed = sum(result["worker"] for result in ranks) * factor + sum(result["server"] for result in ranks)
    for result in ranks:
        assert torch.equal(result["outputs"] + owed, given)
    assert owed.any()


def _constant(rank: int, world: int) -> None:
    x = inputs(10_000, world, torch.float32)[rank]
    exact = sum(inputs(10_000, world, torch.float32)) / world
    feedback = sr.ErrorFeedback()
    total = torch.zeros_like(x)
    for _ in range(200):
        y = x.clone()
        sr.all_reduce(y, "int4", feedback=feedback)
        total += y
    assert ((total / 200 - exact).norm() / exact.norm()).item() < 0.02


def test_constant_gradient_is_reached() -> None:
    run(_constant, 2)


def _non_finite_is_not_stored(rank: int, world: int, spelling: str) -> None:
    feedback = sr.ErrorFeedback()
    for value in (0.0, float("nan"), float("inf"), 0.0):
        x = inputs(1000, world, torch.float32)[rank]
        if rank == 0:
            x[5] += value
        sr.all_reduce(x, spelling, feedback=feedback)
        assert feedback.worker is not None
        assert feedback.server is not None
        assert feedback.worker.isfinite().all()
        assert feedback.server.isfinite().all()
        assert x.isfinite().all() == (value == 0.0)


@pytest.mark.parametrize("spelling", ["int4", "topk:0.01", "random-blocks:0.1,block=16"])
def test_non_finite_values_are_not_stored(spelling: str) -> None:
    run(_non_finite_is_not_stored, 2, spelling)


def _saved_and_loaded(rank: int, world: int, spelling: str) -> list[dict[str, Any]]:
    def advance(feedback: sr.ErrorFeedback, steps: range) -> torch.Tensor:
        results = []
        for step in steps:
            x = inputs(700, world, torch.float32, seed=step)[rank]
            sr.all_reduce(x, spelling, feedback=feedback)
            results.append(x)
        return torch.stack(results)

    first = sr.ErrorFeedback()
    advance(first, range(5))
    state = first.state_dict()
    second = sr.ErrorFeedback()
    second.load_state_dict(state)
    assert second.step == 5
    assert second.server is not None
    assert first.server is not None
    assert torch.equal(second.server, first.server)
    # No seed is given, and the group's counter is elsewhere for the second.
    assert torch.equal(advance(first, range(5, 8)), advance(second, range(5, 8)))
    # The state is a copy: what came after has not changed it.
    third = sr.ErrorFeedback()
    third.load_state_dict(state)
    for residual, saved in ((third.worker, state["worker"]), (second.worker, state["worker"])):
        assert residual is not None
        assert torch.equal(residual, saved) == (residual is third.worker)
    return [state]


@pytest.mark.parametrize("spelling", ["int4", "int4-hadamard", "topk:0.05,values=bf16", "random-blocks:0.2,block=100"])
def test_a_loaded_state_goes_on_bit_for_bit(spelling: str) -> None:
    run(_saved_and_loaded, 2, spelling)


def _malformed(state: dict[str, Any]) -> list[tuple[dict[str, Any], type[Exception], str]]:
    owner = state["owner"]
    return [
        ({}, ValueError, "must have owner, seed, step, got nothing"),
        ([], TypeError, "the state must be a dict, got list"),  # type: ignore[list-item]
        ({**state, "owner": 5}, TypeError, "its owner must be a dict, got int"),
        ({**state, "step": -1}, ValueError, "step must not be negative, got -1"),
        ({key: value for key, value in state.items() if key != "server"}, ValueError, "server, step, worker, got"),
        ({**state, "more": 1}, ValueError, "got more"),
        ({**state, "owner": {"codec": "int4"}}, ValueError, "chunks, codec, numel.*got codec"),
        ({**state, "owner": {**owner, "codec": None}}, ValueError, "must have a codec, got None"),
        ({**state, "owner": {**owner, "numel": 64.0}}, TypeError, "numel must be an int, got float"),
        ({**state, "step": "5"}, TypeError, "step must be an int, got str"),
        ({**state, "worker": state["worker"][:-1]}, ValueError, "worker must be 704 elements of torch.float32"),
        ({**state, "server": state["server"].half()}, ValueError, "server must be .* of torch.float16"),
        ({**state, "worker": state["worker"].tolist()}, TypeError, "worker must be a tensor, got list"),
    ]


def _malformed_is_refused(rank: int, world: int) -> None:
    feedback = sr.ErrorFeedback()
    sr.all_reduce(inputs(700, world, torch.float32)[rank], "int4", feedback=feedback)
    state = feedback.state_dict()
    for loading in (feedback, sr.ErrorFeedback()):
        before = loading.state_dict()
        for wrong, error, message in _malformed(state):
            with pytest.raises(error, match=message):
                loading.load_state_dict(wrong)
        after = loading.state_dict()
        assert after["step"] == before["step"]
        assert after["owner"] == before["owner"]
        loading.load_state_dict(state)


def test_a_malformed_state_is_refused() -> None:
    run(_malformed_is_refused, 2)


def _others_state(rank: int, world: int) -> None:
    feedback = sr.ErrorFeedback()
    x = torch.ones(100)
    sr.all_reduce(x, "int4", feedback=feedback)
    mine = feedback.state_dict()
    states: list[Any] = [None] * world
    dist.all_gather_object(states, mine)
    theirs = states[1 - rank]
    with pytest.raises(ValueError, match=rf"rank {1 - rank} of 2.*rank {rank} of 2"):
        feedback.load_state_dict(theirs)
    # Not yet bound, it finds out in the first collective, on every rank.
    fresh = sr.ErrorFeedback()
    fresh.load_state_dict(theirs)
    with pytest.raises(ValueError, match=f"rank {1 - rank} of 2"):
        sr.all_reduce(x, "int4", feedback=fresh)
    larger = {**mine, "owner": {**mine["owner"], "world_size": 4}}
    with pytest.raises(ValueError, match=f"rank {rank} of 4"):
        feedback.load_state_dict(larger)
    recut = {**mine, "owner": {**mine["owner"], "chunks": 3}}
    with pytest.raises(ValueError, match=r"3 chunks.*not to .*1 chunk,"):
        feedback.load_state_dict(recut)
    with pytest.raises(ValueError, match="100 elements"):
        sr.all_reduce(torch.ones(101), "int4", feedback=feedback)
    with pytest.raises(ValueError, match="int4"):
        sr.all_reduce(x, "int8", feedback=feedback)
    feedback.reset()
    sr.all_reduce(x, "int8", feedback=feedback)


def test_another_ranks_state_is_refused() -> None:
    run(_others_state, 2)


def test_unused_feedback_is_saved_and_loaded() -> None:
    feedback = sr.ErrorFeedback()
    other = sr.ErrorFeedback()
    other.load_state_dict(feedback.state_dict())
    assert other.step == 0
    assert other.residual_norm() == 0.0
    other.scale_(2.0)


def _scaled(rank: int, world: int) -> None:
    feedback = sr.ErrorFeedback()
    sr.all_reduce(dyadic(500, rank), "int4-hadamard", feedback=feedback)
    assert feedback.worker is not None
    before, norm = feedback.worker.clone(), feedback.residual_norm()
    assert norm > 0
    feedback.scale_(0.5)
    assert torch.equal(feedback.worker, before * 0.5)
    assert feedback.residual_norm() == norm * 0.5


def test_scaling() -> None:
    run(_scaled, 2)


def _norm(rank: int, world: int) -> None:
    feedback = sr.ErrorFeedback()
    sr.all_reduce(inputs(1000, world, torch.float32)[rank], "int4-hadamard", feedback=feedback)
    assert feedback.worker is not None
    assert feedback.server is not None
    server = to_original_domain(feedback.server, sr.IntQuant(4, hadamard=True)).double()
    norm = torch.hypot(feedback.worker.double().norm(), server.norm()).item()
    # fp32 norms of under 2048 elements each: relative errors of at most 2048 roundings of 2^-24.
    assert abs(feedback.residual_norm() - norm) <= 2048 * 2.0**-24 * norm


def test_the_norm_is_that_of_the_original_domain() -> None:
    run(_norm, 2)
