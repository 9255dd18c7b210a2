"""Error feedback telescopes through all that DDP does: what came out and what is owed is what went in, exactly."""

from __future__ import annotations

import contextlib
import itertools
import unittest.mock
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr
from collectives.compose import to_original_domain
from ddp.training import Given, dyadic, equal, gradients, loss_of, mlp, same_on_all_ranks, wrap
from ranks import run
from smallreduce.collectives import _engine

SHAPES = ((33, 9), (128, 5), (7, 1), (257, 3), (64, 64), (5, 30))
# The last used is ready first: not the order in which DDP assumes it when it first makes its buckets.
USE = (3, 0, 5, 1, 4, 2)


def owed_to(state: sr.ddp.HookState, world: int) -> dict[str, torch.Tensor]:
    """What is owed to the mean of each gradient, in fp64: the mean of the workers' residuals, and the servers'."""
    owed = {}
    for name, saved in state.state_dict()["parameters"].items():
        numel = saved["numel"]
        mine = torch.zeros(-(-numel // 32) * 32, dtype=torch.float64)
        mine[:numel] += saved["worker"].double() / world
        for (_, begin, end), server in zip(saved["shards"], saved["server"], strict=True):
            if server is not None:
                codec = sr.codec(saved["codec"])
                assert codec is not None
                mine[32 * begin : 32 * end] += to_original_domain(server, codec).double()
        dist.all_reduce(mine)
        owed[name] = mine[:numel]
    return owed


def mean_of(gradient: torch.Tensor) -> torch.Tensor:
    mean = gradient.double() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.flatten()


def _given(**options: Any) -> DistributedDataParallel:
    return wrap(Given(SHAPES, USE), bucket_cap_mb=0.004, **options)


def _telescopes(rank: int, world: int, codec: str, chunk_numel: int) -> None:
    with unittest.mock.patch.object(_engine, "CHUNK_NUMEL", chunk_numel):
        _telescope(rank, world, codec)


def _telescope(rank: int, world: int, codec: str) -> None:
    ddp = _given()
    state = sr.ddp.register(ddp, codec)
    went_in = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in ddp.module.named_parameters()}
    came_out = {name: torch.zeros_like(total) for name, total in went_in.items()}
    owners = []
    for step in range(6):
        if step == 5:  # a restart: other buckets, and other owners of the server residuals
            saved = state.state_dict()
            ddp = wrap(Given(SHAPES, USE), bucket_cap_mb=100)
            state = sr.ddp.register(ddp, codec)
            state.load_state_dict(saved)
        ddp.zero_grad()
        given = [dyadic(shape, step, rank, i) for i, shape in enumerate(SHAPES)]
        ddp(given).backward()
        for (name, parameter), gradient in zip(ddp.module.named_parameters(), given, strict=True):
            assert parameter.grad is not None
            went_in[name] += mean_of(gradient)
            came_out[name] += parameter.grad.double().flatten()
        owed = owed_to(state, world)
        for name in went_in:
            assert torch.equal(went_in[name], came_out[name] + owed[name]), (step, name)
        assert max(float(error.abs().max()) for error in owed.values()) > 0
        owners.append({name: saved["shards"] for name, saved in state.state_dict()["parameters"].items()})
    # DDP has rebuilt its buckets after the first step, and other ranks own the server residuals since.
    assert owners[0] != owners[1]
    assert owners[1] == owners[4]
    assert owners[4] != owners[5]
    assert same_on_all_ranks([p.grad for p in ddp.parameters() if p.grad is not None])


@pytest.mark.parametrize("codec", ["int4", "int2:rounding=nearest", "int4-hadamard", "fp8-e4m3"])
def test_outputs_and_residuals_are_inputs(codec: str) -> None:
    run(_telescopes, 2, codec, _engine.CHUNK_NUMEL)


def test_outputs_and_residuals_are_inputs_in_many_chunks() -> None:
    run(_telescopes, 2, "int4:group=32", 1000)


def _unused(rank: int, world: int, view: bool) -> None:
    """Parameter 4 is used by no rank in steps 1 and 2, by rank 0 alone in step 3; all are used in steps 0 and 4."""
    ddp = _given(find_unused_parameters=True, gradient_as_bucket_view=view)
    state = sr.ddp.register(ddp, "int4")
    names = [name for name, _ in ddp.module.named_parameters()]
    went_in = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in ddp.module.named_parameters()}
    came_out = {name: torch.zeros_like(total) for name, total in went_in.items()}
    before: dict[str, torch.Tensor] = {}
    for step in range(5):
        ddp.zero_grad()
        given: list[torch.Tensor | None] = [dyadic(shape, step, rank, i) for i, shape in enumerate(SHAPES)]
        if step in (1, 2) or (step == 3 and rank > 0):
            given[4] = None
        ddp(given).backward()
        for name, parameter, gradient in zip(names, ddp.module.parameters(), given, strict=True):
            went_in[name] += mean_of(torch.zeros_like(parameter) if gradient is None else gradient)
            if parameter.grad is not None:
                came_out[name] += parameter.grad.double().flatten()
        assert (list(ddp.module.parameters())[4].grad is None) == (step in (1, 2))
        owed = owed_to(state, world)
        for name in names:
            assert torch.equal(went_in[name], came_out[name] + owed[name]), (step, name)
        if step in (1, 2):
            assert torch.equal(owed[names[4]], before[names[4]])
        assert float(owed[names[4]].abs().max()) > 0
        before = owed


@pytest.mark.parametrize("view", [False, True])
def test_a_parameter_that_no_rank_used_keeps_its_residual(view: bool) -> None:
    run(_unused, 2, view)


def _non_finite(rank: int, world: int) -> None:
    ddp = wrap(Given([(4, 128), (2, 128)]))
    state = sr.ddp.register(ddp, "int4:group=128")
    for step in range(3):
        ddp.zero_grad()
        given = [dyadic((4, 128), step, rank, 0), dyadic((2, 128), step, rank, 1)]
        if step == 1 and rank == 0:
            given[0][2, 5] = torch.inf
            given[1][0, 7] = torch.nan
        before = [p["worker"] for p in state.state_dict()["parameters"].values()]
        ddp(given).backward()
        first, second = (p.grad for p in ddp.module.parameters())
        if step == 1:
            assert torch.equal(first.isfinite().all(1), torch.tensor([True, True, False, True]))
            assert torch.equal(second.isfinite().all(1), torch.tensor([False, True]))
            after = [p["worker"].view(-1, 128) for p in state.state_dict()["parameters"].values()]
            if rank == 0:
                assert torch.equal(after[0][2], before[0].view(-1, 128)[2])
                assert torch.equal(after[1][0], before[1].view(-1, 128)[0])
        else:
            assert first.isfinite().all() and second.isfinite().all()
        for saved in state.state_dict()["parameters"].values():
            assert saved["worker"].isfinite().all()
            assert all(server is None or server.isfinite().all() for server in saved["server"])


def test_non_finite_gradients_travel_and_are_not_kept() -> None:
    run(_non_finite, 2)


def _whole_server(saved: dict[str, Any]) -> torch.Tensor:
    """The server's residual of a parameter, wherever its shards lie."""
    whole = torch.zeros(-(-saved["numel"] // 32) * 32)
    for (_, begin, end), values in zip(saved["shards"], saved["server"], strict=True):
        if values is not None:
            whole[32 * begin : 32 * end] = values
    dist.all_reduce(whole)
    return whole


def _scaled(rank: int, world: int, passes: int, options: dict[str, Any], codec: str) -> None:
    """With a loss scale, powers of two, everything is that of a run without one, skipped steps left out."""
    plain, scaled = (_given(**options) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    state = sr.ddp.register(plain, codec)
    scaled_state = sr.ddp.register(scaled, codec, scaler=scaler)
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=0.25) for ddp in (plain, scaled)]
    scales = [scaler.get_scale()]
    for step in range(8):
        given: list[list[torch.Tensor | None]] = [
            [dyadic(shape, step, k, rank, i) for i, shape in enumerate(SHAPES)] for k in range(passes)
        ]
        if options and step in (2, 3, 5):
            for gradients_of_pass in given:
                gradients_of_pass[4] = None
        # As it most often is, the very first is skipped: before DDP rebuilds its buckets or, in two passes, around it.
        overflow = step in (0, 3, 6)
        if not overflow:
            plain.zero_grad()
            for gradients_of_pass in given:
                plain(gradients_of_pass).backward()
            optimizers[0].step()
        if overflow and rank == 1:
            given[step % passes][1] = torch.full(SHAPES[1], torch.inf)
        scaled.zero_grad()
        for gradients_of_pass in given:
            scaler.scale(scaled(gradients_of_pass)).backward()
        scaler.step(optimizers[1])
        scaler.update()
        scales.append(scaler.get_scale())
        assert equal(list(scaled.parameters()), list(plain.parameters())), step
        if step == 3:  # the next step brings the residuals back, where state_dict() has not
            continue
        ours, theirs = scaled_state.state_dict()["parameters"], state.state_dict()["parameters"]
        for name, saved in ours.items():
            if step == 0:
                assert not saved["worker"].any() and not _whole_server(saved).any()
                continue
            assert torch.equal(saved["worker"], theirs[name]["worker"] * scaler.get_scale()), (step, name)
            assert torch.equal(_whole_server(saved), _whole_server(theirs[name]) * scaler.get_scale()), (step, name)
    changes = {after / before for before, after in itertools.pairwise(scales)}
    assert changes == {0.5, 1.0, 2.0}


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}])
@pytest.mark.parametrize("passes", [1, 2])
def test_residuals_follow_the_loss_scale_and_skipped_steps_leave_them(passes: int, options: dict[str, Any]) -> None:
    run(_scaled, 2, passes, options, "int4:rounding=nearest")


def test_residuals_of_a_sparse_codec_follow_the_loss_scale() -> None:
    run(_scaled, 2, 2, {"find_unused_parameters": True}, "topk:0.1")


def _changes_scale(rank: int, world: int) -> None:
    """A state that was saved under another scale, or under one and loaded under none, owes the same gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    ddp = _given()
    state = sr.ddp.register(ddp, "int4", scaler=scaler)
    scaler.scale(ddp([dyadic(shape, rank, i) for i, shape in enumerate(SHAPES)])).backward()
    saved = state.state_dict()
    assert saved["loss_scale"] == 2.0**6
    for scale in (None, 2.0**4, 2.0**9):
        # A step has been done: what it left is neither brought back nor counted.
        ddp, other = _given(), None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        state = sr.ddp.register(ddp, "int4", scaler=other)
        ddp([dyadic(shape, rank, i) for i, shape in enumerate(SHAPES)]).backward()
        state.load_state_dict(saved)
        loaded = state.state_dict()
        factor = loaded["loss_scale"] / 2.0**6
        assert loaded["loss_scale"] == scale or (scale is None and loaded["loss_scale"] == 1.0)
        for name, residuals in saved["parameters"].items():
            assert torch.equal(loaded["parameters"][name]["worker"], residuals["worker"] * factor)
            assert torch.equal(_whole_server(loaded["parameters"][name]), _whole_server(residuals) * factor)


def test_a_loaded_state_is_brought_into_the_loss_scale() -> None:
    run(_changes_scale, 2)


def _cannot_skip(rank: int, world: int) -> None:
    """Where this rank may have joined, which does not see the scale, the hook says so; alone, it owes nothing."""

    def backward(ddp: DistributedDataParallel, scaler: torch.amp.GradScaler, step: int) -> None:
        given = [dyadic(shape, step, rank, i) for i, shape in enumerate(SHAPES)]
        scaler.scale(ddp(given)).backward()

    def make(
        *, enabled: bool = True, known: bool = True, **options: Any
    ) -> tuple[DistributedDataParallel, torch.amp.GradScaler, sr.ddp.HookState]:
        ddp, scaler = wrap(Given(SHAPES)), torch.amp.GradScaler("cpu", enabled=enabled)
        state = sr.ddp.HookState("int4", module=ddp if known else ddp.module, scaler=scaler, **options)
        ddp.register_comm_hook(state, sr.ddp.hook)
        return ddp, scaler, state

    for known in (True, False):
        ddp, scaler, state = make(known=known)
        if world == 1:
            with ddp.join():
                backward(ddp, scaler, 0)
                backward(ddp, scaler, 1)
            assert state.step == 2
            continue
        with contextlib.nullcontext() if known else pytest.raises(RuntimeError, match="module=ddp_model"), ddp.join():
            # An even number of inputs for all: nothing is wrong but that nobody can know.
            with pytest.raises(RuntimeError, match="join") if known else contextlib.nullcontext():
                backward(ddp, scaler, 0)
            if not known:
                backward(ddp, scaler, 1)

    ddp, scaler, state = make(known=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(3):
        with ddp.no_sync():
            backward(ddp, scaler, step)
        backward(ddp, scaler, step)
        scaler.step(optimizer)
        scaler.update()
    backward(ddp, scaler, 3)
    # A state that was loaded follows no backward pass.
    state.load_state_dict(state.state_dict())
    backward(ddp, scaler, 4)

    # Nothing depends on the scale, and nothing is in the way.
    for options in ({"enabled": False}, {"feedback": False}):
        ddp, scaler, state = make(known=False, **options)
        for step in range(3):
            backward(ddp, scaler, step)
        assert all(len(tensor) == 1 for held in state._memory.values() for tensor in held.tensors())


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_that_may_have_joined_does_not_follow_the_loss_scale(world: int) -> None:
    run(_cannot_skip, world)


def _replays(rank: int, world: int) -> None:
    ddp = wrap(mlp(), bucket_cap_mb=0.004)
    state = sr.ddp.register(ddp, "int4-hadamard:rounding=stochastic", seed=7)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

    def steps(begin: int, end: int) -> list[torch.Tensor | None]:
        for step in range(begin, end):
            optimizer.zero_grad()
            loss_of(ddp, rank, step).backward()
            optimizer.step()
        return gradients(ddp)

    steps(0, 4)
    parameters = [p.detach().clone() for p in ddp.parameters()]
    saved = state.state_dict()
    expected = steps(4, 8)

    def back() -> None:
        with torch.no_grad():
            for p, value in zip(ddp.parameters(), parameters, strict=True):
                p.copy_(value)

    back()
    state.load_state_dict(saved)
    assert state.step == 4
    assert equal(steps(4, 8), expected)
    # Neither the residuals nor the step are for show.
    for change in ({"step": 5}, {"parameters": {}}):
        back()
        state.load_state_dict({**saved, **change})
        assert not equal(steps(4, 8), expected)

    # What is not ours is refused, and what was there stays.
    before = state.state_dict()
    for change, message in (
        ({"rank": (rank + 1) % world}, "belongs to rank"),
        ({"world_size": world + 1}, "belongs to rank"),
        ({"format": 0}, "format"),
        ({"seed": 8}, "seed 8, but this HookState has 7"),
        ({"step": None}, r"state_dict\['step'\] must be of type int, got None"),
        ({"loss_scale": "1"}, "loss_scale"),
        ({"parameters": []}, "Mapping"),
        ({"step": -1}, "step >= 0"),
        ({"loss_scale": 0.0}, "loss_scale, got 4 and 0.0"),
        ({"loss_scale": float("nan")}, "loss_scale, got 4 and nan"),
        ({"parameters": {"0.weight": None}}, "0.weight have the keys .*NoneType"),
        ({"parameters": {0: saved["parameters"]["0.weight"]}}, "residuals of 0, which"),
        ({"parameters": {"0.weight": {**saved["parameters"]["0.weight"], "worker": None}}}, "0.weight have a worker's"),
        ({"parameters": {"nobody": next(iter(saved["parameters"].values()))}}, "nobody"),
        ({"parameters": {"0.weight": saved["parameters"]["3.weight"]}}, "0.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            state.load_state_dict({**saved, **change})
    for nothing in (None, []):
        with pytest.raises(ValueError, match="not a state"):
            state.load_state_dict(nothing)  # type: ignore[arg-type]
    assert _same(before, state.state_dict())
    with pytest.raises(ValueError, match="feedback is off"):
        sr.ddp.register(wrap(mlp()), "int4", feedback=False, seed=7).load_state_dict(saved)
    with pytest.raises(ValueError, match="int8"):
        sr.ddp.register(wrap(mlp()), "int8", seed=7).load_state_dict(saved)
    # Whatever the rule raises: nothing has changed then.
    rule = unittest.mock.Mock(return_value="int4-hadamard")
    fresh = sr.ddp.register(wrap(mlp()), "int4", seed=7, codec_for=rule)
    rule.side_effect = KeyError("no rule")
    with pytest.raises(KeyError, match="no rule"):
        fresh.load_state_dict(saved)
    assert fresh.state_dict()["parameters"] == {} and fresh.step == 0


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, Sequence) and not isinstance(ours, str):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


@pytest.mark.parametrize("world", [2, 3])
def test_a_loaded_state_replays_the_same_bits(world: int) -> None:
    run(_replays, world)
