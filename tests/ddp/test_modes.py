"""The hook under everything that DDP can be asked to do: the same bits on all ranks, and training that learns."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import smallreduce as sr
from ddp.training import Given, batch, dyadic, equal, gradients, loss_of, mlp, same_on_all_ranks, wrap
from ranks import run
from smallreduce.collectives import shutdown


def _train(ddp: nn.Module, rank: int, steps: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(ddp, rank, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def _identical(rank: int, world: int) -> None:
    codecs = {"0.weight": "int8", "3.weight": "sign", "5.weight": "int4-hadamard", "5.bias": "int4"}
    for options in (
        {"codec": "int4"},
        # Several codecs and exact parameters in one bucket.
        {"codec": "int2", "codec_for": lambda name, parameter: codecs.get(name)},
    ):
        ddp = wrap(mlp())
        state = sr.ddp.register(ddp, **options)
        losses = _train(ddp, rank, 200)
        assert same_on_all_ranks(list(ddp.parameters()))
        assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
        stats = state.stats()
        assert (stats.steps, stats.calls, stats.uncompressed_steps) == (200, 200, 0)
    used = {chosen.with_feedback().spelling for chosen in map(sr.codec, codecs.values()) if chosen is not None}
    assert set(stats.buckets[0].codecs) == used


@pytest.mark.parametrize("world", [2, 3])
def test_parameters_are_identical_after_200_steps(world: int) -> None:
    run(_identical, world)


def _modes(rank: int, world: int) -> None:
    """Whether or not DDP keeps gradients in its buckets, the hook sees the same ones, and gives the same bits."""
    for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}):
        results = []
        for view in (False, True):
            ddp = wrap(mlp(), gradient_as_bucket_view=view, **options)
            sr.ddp.register(ddp, "int4")
            _train(ddp, rank, 6)
            assert same_on_all_ranks(list(ddp.parameters()))
            results.append(list(ddp.parameters()))
        assert equal(results[0], results[1]), options


def _accumulates(rank: int, world: int) -> None:
    """Gradients that accumulate under no_sync are reduced as the one gradient that they are."""
    for view in (False, True):
        shapes = ((16, 16), (40, 3))
        once, often = (wrap(Given(shapes), gradient_as_bucket_view=view) for _ in range(2))
        states = [sr.ddp.register(ddp, "int4") for ddp in (once, often)]
        for step in range(3):
            parts = [[dyadic(shape, step, rank, i, k) for i, shape in enumerate(shapes)] for k in range(3)]
            once.zero_grad()
            once([sum(tensors[1:], tensors[0]) for tensors in zip(*parts, strict=True)]).backward()
            often.zero_grad()
            for k, part in enumerate(parts):
                with often.no_sync() if k < 2 else contextlib.nullcontext():
                    often(part).backward()
            assert equal(gradients(often), gradients(once))
        assert [state.step for state in states] == [3, 3]


def _mixed_dtypes(rank: int, world: int) -> None:
    model = mlp()
    model[3].to(torch.bfloat16)
    model[5].to(torch.float64)
    seen = {}

    def rule(name: str | None, parameter: torch.Tensor) -> str | None:
        seen[name] = parameter.dtype
        return None if parameter.dtype == torch.float64 else "int8"

    ddp = wrap(model)
    state = sr.ddp.register(ddp, "int4", codec_for=rule)
    for step in range(3):
        x, _ = batch(rank, step)
        hidden = model[3](model[:3](x).bfloat16()).double()
        ddp.zero_grad()
        # Through DDP's own forward, so that it prepares its buckets.
        ddp.module.forward = lambda _, hidden=hidden: model[5](hidden)
        ddp(x).square().sum().backward()
        assert same_on_all_ranks([p.grad for p in ddp.parameters() if p.grad is not None])
    assert seen == {name: p.dtype for name, p in model.named_parameters()}
    assert {bucket.dtype: bucket.codecs for bucket in state.stats().buckets} == {
        torch.float32: ("int8:rounding=nearest",),
        torch.bfloat16: ("int8:rounding=nearest",),
        torch.float64: (),
    }


def _joins(rank: int, world: int, fewer: int, options: dict[str, Any]) -> None:
    """Ranks run out of inputs at different times; those that have go on giving zeros, and what they owe is not lost."""
    shapes = ((64, 5), (9, 31))
    ddp = wrap(Given(shapes), bucket_cap_mb=0.001, **options)
    state = sr.ddp.register(ddp, "int4")
    went_in = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    came_out = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    steps = fewer if rank else 4
    with ddp.join():
        for step in range(steps):
            ddp.zero_grad()
            given = [dyadic(shape, step, rank, i) for i, shape in enumerate(shapes)]
            ddp(given).backward()
            for total, gradient in zip(went_in, given, strict=True):
                total += gradient
            for total, parameter in zip(came_out, ddp.module.parameters(), strict=True):
                assert parameter.grad is not None
                total += parameter.grad
    assert state.step == 4  # also on the rank that never had an input
    saved = state.state_dict()["parameters"]
    for (name, _), total, out in zip(ddp.module.named_parameters(), went_in, came_out, strict=True):
        owed = saved[name]["worker"].double().clone()
        dist.all_reduce(total)
        dist.all_reduce(owed)
        server = torch.zeros(-(-total.numel() // 32) * 32, dtype=torch.float64)
        for (_, begin, end), values in zip(saved[name]["shards"], saved[name]["server"], strict=True):
            if values is not None:
                server[32 * begin : 32 * end] = values
        dist.all_reduce(server)
        dist.broadcast(out, 0)  # the only rank that had a step each time
        assert torch.equal(total.flatten() / world, out.flatten() + owed / world + server[: total.numel()])


def _overlaps(rank: int, world: int) -> None:
    """The hook only starts a reduction: rank 0 goes through all of a step's hooks before rank 1 enters its first."""
    ddp = wrap(mlp(), bucket_cap_mb=0.004)
    state = sr.ddp.HookState("int4", module=ddp)
    store = dist.distributed_c10d._get_default_store()
    calls = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP would compare annotations, which are strings here
        # The first calls for buckets of a new form are not: there the ranks compare what they are about to do.
        if rank == 1 and state.step >= 2 and bucket.index() == 0:
            store.wait([f"passed {state.step}"])
        future = sr.ddp.hook(state, bucket)
        calls.append(bucket.index())
        if rank == 0 and bucket.is_last():
            store.set(f"passed {state.step - 1}", "")
        return future

    ddp.register_comm_hook(state, hook)
    _train(ddp, rank, 5)
    assert len(calls) > 5
    assert same_on_all_ranks(list(ddp.parameters()))


def _compiles(rank: int, world: int) -> None:
    eager = wrap(mlp())
    compiled = wrap(copy.deepcopy(eager.module))
    states = [sr.ddp.register(ddp, "int4:rounding=nearest") for ddp in (eager, compiled)]
    faster = torch.compile(compiled, backend="aot_eager")
    _train(eager, rank, 3)
    _train(faster, rank, 3)
    assert [state.calls for state in states] == [3, 3]
    # Compilation may order the model's own sums otherwise, which a quantiser magnifies: this is the hook's part.
    assert same_on_all_ranks(list(compiled.parameters()))


def _copies(rank: int, world: int) -> None:
    """A DDP module with our hook can be copied, as for an average of weights. torch registers no hook on the copy."""
    ddp = wrap(mlp())
    state = sr.ddp.register(ddp, "int4")
    _train(ddp, rank, 2)
    other = copy.deepcopy(ddp)
    assert equal(list(other.parameters()), list(ddp.parameters()))
    _train(other, rank, 1)
    assert state.calls == 2
    _train(ddp, rank, 1)
    assert state.calls == 3


def _all_modes(rank: int, world: int) -> None:
    _modes(rank, world)
    _accumulates(rank, world)
    _mixed_dtypes(rank, world)
    _copies(rank, world)


def test_modes_of_ddp() -> None:
    run(_all_modes, 2)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
@pytest.mark.parametrize("fewer", [0, 2])
def test_join(fewer: int, options: dict[str, Any]) -> None:
    # Of 2 ranks, so that the mean is exact.
    run(_joins, 2, fewer, options)


def test_reduction_overlaps_the_backward_pass() -> None:
    run(_overlaps, 2)


def test_torch_compile() -> None:
    run(_compiles, 2)


def _empty(rank: int, world: int) -> None:
    """Parameters without elements, of one element, and of a size that no rank gets a whole block of."""
    shapes = ((0, 4), (1, 1), (31, 1), (33, 1), (1, 1000))
    ddp = wrap(Given(shapes))
    state = sr.ddp.register(ddp, "int8")
    for step in range(3):
        ddp.zero_grad()
        ddp([dyadic(shape, step, rank, i) for i, shape in enumerate(shapes)]).backward()
        assert same_on_all_ranks([p.grad for p in ddp.parameters() if p.grad is not None and p.numel()])
    assert state.stats().buckets[0].compressed_numel == 1065


def _odd_hooks(rank: int, world: int) -> None:
    _empty(rank, world)
    # On a group that is not the default one, with the pair that frameworks take, and names given or not.
    group = dist.new_group(list(range(world)))
    for module in (True, False):
        names: list[Any] = []
        ddp = wrap(mlp(), process_group=group)

        def rule(name: str | None, parameter: torch.Tensor, names: list[Any] = names) -> str | None:
            names.append(name)
            return "int4" if parameter.dim() > 1 else None

        state = sr.ddp.HookState(
            "int8", codec_for=rule, module=ddp.module if module else None, process_group=group, measure_every=1
        )
        ddp.register_comm_hook(state, sr.ddp.hook)
        _train(ddp, rank, 3)
        assert same_on_all_ranks(list(ddp.parameters()))
        expected = {name for name, _ in ddp.module.named_parameters()} if module else {None}
        assert set(names) == expected
        assert all((name in expected) == module for name in state.state_dict()["parameters"])
    dist.destroy_process_group(group)


def _takes_from_ddp(rank: int, world: int) -> None:
    """A state that is given the DDP module takes from it what must be the same."""
    mine = [dist.new_group([member]) for member in range(world)][rank]
    ddp = wrap(mlp(), process_group=mine, find_unused_parameters=True)
    state = sr.ddp.HookState("int4", module=ddp)
    ddp.register_comm_hook(state, sr.ddp.hook)
    if rank == 0:  # alone in its group
        _train(ddp, rank, 2)
        assert state.stats().world_size == 1
    assert state._find_unused and not sr.ddp.HookState("int4", module=wrap(mlp()))._find_unused
    static = wrap(mlp(), find_unused_parameters=True, static_graph=True)
    assert not sr.ddp.HookState("int4", module=static, find_unused_parameters=True)._find_unused

    with pytest.raises(ValueError, match="process_group"):
        sr.ddp.HookState("int4", module=ddp, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="find_unused_parameters is False, but True"):
        sr.ddp.HookState("int4", module=ddp, find_unused_parameters=False)
    sr.ddp.HookState("int4", module=ddp, process_group=mine, find_unused_parameters=True)


def test_group_and_unused_parameters_are_those_of_ddp() -> None:
    run(_takes_from_ddp, 2)


def _shut_down(rank: int, world: int) -> None:
    """The hook starts anew after shutdown(), and its residuals go on."""
    ours, plain = (wrap(mlp(), bucket_cap_mb=0.004) for _ in range(2))
    states = [sr.ddp.register(ddp, "int4") for ddp in (ours, plain)]
    for step in range(5):
        if step == 3:
            shutdown()
        for ddp in (ours, plain):
            ddp.zero_grad()
            loss_of(ddp, rank, step).backward()
            if step == 3 and ddp is ours:
                shutdown()
        assert equal(gradients(ours), gradients(plain)), step
    assert states[0].stats().calls == states[1].stats().calls > 5


def test_training_goes_on_after_shutdown() -> None:
    run(_shut_down, 2)


def test_sizes_groups_and_names() -> None:
    run(_odd_hooks, 3)
