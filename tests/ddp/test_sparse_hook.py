"""Sparse codecs under the hook: replicas, residuals, figures and saved states, whichever form the all-reduce takes."""

from __future__ import annotations

import contextlib
import itertools
import unittest.mock
from typing import Any

import pytest
import torch
from torch import nn

import smallreduce as sr
from ddp.test_residuals import SHAPES, USE, mean_of, owed_to
from ddp.test_stats import collectives_of
from ddp.training import Given, dyadic, equal, gradients, loss_of, mlp, same_on_all_ranks, wrap
from ranks import run
from smallreduce import metrics
from smallreduce.collectives import _engine_for

BACKEND = metrics.register_counting_backend()
BLOCKS = "random-blocks:0.3,block=64"
# Whether packets are gathered: always, never, or where they are small, as they are in small buckets.
LIMITS = {"gather": 1 << 40, "split": -1, "either": 1000}
CASES = [("topk:0.1", "gather"), ("topk:0.1,values=bf16", "split"), ("topk:0.1", "either"), (BLOCKS, "gather")]


def form(name: str) -> contextlib.AbstractContextManager[Any]:
    return unittest.mock.patch.object(_engine_for, "gathers", side_effect=lambda nbytes, world: nbytes <= LIMITS[name])


def _trains(rank: int, world: int) -> list[list[float]]:
    everything = []
    for codec, name in [(None, "gather"), *CASES]:
        with form(name):
            ddp = wrap(mlp())
            state = sr.ddp.register(ddp, codec)
            optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
            losses = []
            for step in range(40):
                optimizer.zero_grad()
                loss = loss_of(ddp, rank, step)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            assert same_on_all_ranks(list(ddp.parameters()))
            assert state.stats().uncompressed_steps == 0
            everything.append(losses)
    return everything


@pytest.mark.parametrize("world", [2, 3, 4])
def test_replicas_stay_identical_and_learn(world: int) -> None:
    losses = torch.tensor(run(_trains, world)).mean(0)
    plain, *compressed = losses.view(len(losses), 4, 10).mean(2)
    # At least a tenth of the elements travels in each step and nothing is lost, so a correction comes some ten steps
    # late: the last ten steps are no worse than the ten before without compression.
    assert all(of_codec[3] < plain[2] for of_codec in compressed)


def _telescopes(rank: int, world: int, codec: str, name: str) -> None:
    """Outputs and residuals are inputs, through rebuilt buckets and restarts with other buckets, exactly."""
    with form(name):
        servers = []
        saved = None
        went_in = [torch.zeros(shape.numel(), dtype=torch.float64) for shape in map(torch.Size, SHAPES)]
        came_out = [torch.zeros_like(total) for total in went_in]
        for restart, bucket_cap_mb in enumerate((0.004, 100, 0.004)):
            ddp = wrap(Given(SHAPES, USE), bucket_cap_mb=bucket_cap_mb)
            state = sr.ddp.register(ddp, codec)
            if saved is not None:
                state.load_state_dict(saved)
            for step in range(3 * restart, 3 * restart + 3):
                ddp.zero_grad()
                given = [dyadic(shape, step, rank, i) for i, shape in enumerate(SHAPES)]
                ddp(given).backward()
                owed = owed_to(state, world)
                for i, (parameter, gradient) in enumerate(zip(ddp.module.parameters(), given, strict=True)):
                    assert parameter.grad is not None
                    went_in[i] += mean_of(gradient)
                    came_out[i] += parameter.grad.double().flatten()
                    assert torch.equal(went_in[i], came_out[i] + owed[f"weights.{i}"]), (step, i)
                assert max(float(error.abs().max()) for error in owed.values()) > 0
                assert same_on_all_ranks([p.grad for p in ddp.parameters() if p.grad is not None])
            saved = state.state_dict()
            servers.append([len(parameter["shards"]) > 0 for parameter in saved["parameters"].values()])
    if name == "either":
        # From workers' residuals alone to servers' beside them, and back: these have become the workers'.
        assert not all(servers[0]) and all(servers[1])
        assert servers[2] == servers[0]
    else:
        assert {any(some) for some in servers} == {all(some) for some in servers} == {name == "split"}


@pytest.mark.parametrize(("codec", "name"), CASES)
def test_outputs_and_residuals_are_inputs(codec: str, name: str) -> None:
    run(_telescopes, 2, codec, name)


def _counts(rank: int, world: int) -> None:
    for (codec, name), feedback in itertools.product(CASES, (True, False)):
        with form(name):
            ddp = wrap(mlp(), bucket_cap_mb=0.004)
            state = sr.ddp.register(ddp, codec, feedback=feedback, measure_every=2)
            for step in range(2):
                loss_of(ddp, rank, step).backward()
            steps = []
            for step in range(2, 8):
                before = state.stats()
                metrics.reset()
                loss_of(ddp, rank, step).backward()
                stats, sent = state.stats(), metrics.sent()
                steps.append(stats.bytes_sent - before.bytes_sent)
                assert steps[-1] == metrics.bytes_sent()
                assert stats.collectives - before.collectives == collectives_of(sent)
            # Only of random blocks is not every step's share the same: the last block of a tensor is shorter.
            assert (len(set(steps)) > 1) == (codec == BLOCKS)
            assert all((bucket.residual_norm is not None) == feedback for bucket in stats.buckets)
            # Nine tenths of the elements do not travel, and they are not all zero.
            assert all(0 < bucket.relative_error < 1 for bucket in stats.buckets if bucket.compressed_numel)


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_are_those_counted_at_the_process_group(world: int) -> None:
    run(_counts, world, backend=BACKEND)


def _replays(rank: int, world: int) -> None:
    for codec, name in CASES:
        with form(name):
            ddp = wrap(mlp(), bucket_cap_mb=0.004)
            state = sr.ddp.register(ddp, codec, seed=7)
            optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

            def steps(
                begin: int, end: int, ddp: nn.Module = ddp, optimizer: torch.optim.Optimizer = optimizer
            ) -> list[torch.Tensor | None]:
                for step in range(begin, end):
                    optimizer.zero_grad()
                    loss_of(ddp, rank, step).backward()
                    optimizer.step()
                return gradients(ddp)

            steps(0, 3)
            parameters = [p.detach().clone() for p in ddp.parameters()]
            saved = state.state_dict()
            expected = steps(3, 6)

            def back(to: list[torch.Tensor] = parameters, ddp: nn.Module = ddp) -> None:
                with torch.no_grad():
                    torch._foreach_copy_(list(ddp.parameters()), to)

            back()
            state.load_state_dict(saved)
            assert equal(steps(3, 6), expected)
            # Residuals are not for show, nor is the step where it chooses the blocks.
            for change in ({"parameters": {}}, {"step": 77}):
                back()
                state.load_state_dict({**saved, **change})
                assert equal(steps(3, 6), expected) == ("step" in change and codec != BLOCKS)
            with pytest.raises(ValueError, match="belongs to rank"):
                state.load_state_dict({**saved, "rank": 1 - rank})
            with pytest.raises(ValueError, match=r"residuals of .* in (topk|random-blocks):.* in int4"):
                sr.ddp.register(wrap(mlp()), "int4", seed=7).load_state_dict(saved)


def test_a_loaded_state_replays_the_same_bits() -> None:
    run(_replays, 2)


def _unused(rank: int, world: int, codec: str, name: str) -> None:
    """A parameter that no rank used keeps what is owed to it."""
    with form(name):
        ddp = wrap(Given(SHAPES, USE), bucket_cap_mb=0.004, find_unused_parameters=True)
        state = sr.ddp.register(ddp, codec)
        before = None
        for step in range(4):
            ddp.zero_grad()
            given: list[torch.Tensor | None] = [dyadic(shape, step, rank, i) for i, shape in enumerate(SHAPES)]
            if step in (1, 2):
                given[4] = None
            ddp(given).backward()
            owed = owed_to(state, world)["weights.4"]
            assert owed.any()
            assert (list(ddp.module.parameters())[4].grad is None) == (step in (1, 2))
            if step in (1, 2):
                assert before is not None and torch.equal(owed, before)
            before = owed
        assert same_on_all_ranks([p.grad for p in ddp.parameters() if p.grad is not None])


@pytest.mark.parametrize(("codec", "name"), [("topk:0.1", "gather"), ("topk:0.1", "split"), (BLOCKS, "gather")])
def test_unused_parameters(codec: str, name: str) -> None:
    run(_unused, 2, codec, name)


def _non_finite(rank: int, world: int) -> None:
    for codec, name in CASES:
        with form(name):
            ddp = wrap(Given([(40, 128), (20, 128)]))
            state = sr.ddp.register(ddp, codec)
            for step in range(3):
                ddp.zero_grad()
                given = [dyadic((40, 128), step, rank, 0), dyadic((20, 128), step, rank, 1)]
                if step == 1 and rank == 1:
                    given[0][2, 5] = torch.inf
                ddp(given).backward()
                first, second = (bool(p.grad.isfinite().all()) for p in ddp.module.parameters())
                assert (first, second) == (step != 1, True)
                for saved in state.state_dict()["parameters"].values():
                    assert saved["worker"].isfinite().all()
                    assert all(server is None or server.isfinite().all() for server in saved["server"])


def test_non_finite_gradients_reach_all_ranks_and_are_not_kept() -> None:
    run(_non_finite, 2)


def _dtypes(rank: int, world: int) -> None:
    """Mixed dtypes, each in a bucket of its own, and a vector that is compressed because the rule says so."""
    for codec, name in CASES:
        with form(name):
            model = Given([(30, 40), (50, 20), (700,)])
            model.weights[1].data = model.weights[1].data.bfloat16()
            ddp = wrap(model)
            state = sr.ddp.register(ddp, None, codec_for=lambda name, parameter, codec=codec: codec)
            for step in range(3):
                ddp.zero_grad()
                ddp([dyadic((30, 40), step, rank), dyadic((50, 20), step, rank), dyadic((700,), step, rank)]).backward()
            assert same_on_all_ranks([p.grad for p in ddp.parameters() if p.grad is not None])
            assert not state.stats().bypassed
            assert {bucket.dtype for bucket in state.stats().buckets} == {torch.float32, torch.bfloat16}


def test_dtypes() -> None:
    run(_dtypes, 2)
