"""CSER's state: saved and loaded bit for bit, refused where it does not belong, taken to another number of ranks."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from collectives.compose import to_original_domain
from ddp.training import equal, mlp, same_on_all_ranks
from optim.cser_reference import F64
from optim.cser_training import SIZES, Absolute, beginning, flat
from optim.test_cser import MEMBERS, train, values
from ranks import run
from smallreduce.codecs import codec as parse
from smallreduce.optim import CSER


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _resumes(rank: int, world: int, member: str) -> None:
    """After 4 steps: for intervals of 3, in the middle of one."""
    model = mlp()
    optimizer = CSER(model, lr=0.1, weight_decay=0.01, **MEMBERS[member])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(optimizer, model, rank, 0, 4)
    scheduler.step()
    saved = through_a_file(optimizer.state_dict())
    train(optimizer, model, rank, 4, 8)
    expected = values(model)

    torch.manual_seed(3)
    fresh = mlp(seed=9)
    resumed = CSER(fresh, lr=0.7, **MEMBERS[member])
    train(resumed, fresh, rank, 0, 1)  # what was done before is forgotten
    resumed.load_state_dict(saved)
    assert resumed.steps == 4
    assert resumed.param_groups[0]["lr"] == 0.1 * 0.9
    assert equal(values(fresh), [saved["state"][i]["parameter"] for i in range(len(expected))])
    train(resumed, fresh, rank, 4, 8)
    assert equal(values(fresh), expected)

    # The same state again, into the optimizer that made it.
    optimizer.load_state_dict(saved)
    train(optimizer, model, rank, 4, 8)
    assert equal(values(model), expected)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_loaded_state_continues_bit_for_bit(member: str, world: int) -> None:
    run(_resumes, world, member)


def _refuses(rank: int, world: int) -> None:
    model = mlp()
    optimizer = CSER(model, lr=0.1, **MEMBERS["cser of quantisers"])
    train(optimizer, model, rank, 0, 3)
    state = optimizer.state_dict()
    everyones: list[Any] = [None] * world
    dist.all_gather_object(everyones, state)
    before = values(model)

    def changed(**changes: Any) -> dict[str, Any]:
        other = copy.deepcopy(state)
        other["cser"].update(changes)
        return other

    def without_a_buffer() -> dict[str, Any]:
        other = copy.deepcopy(state)
        del other["state"][2]["momentum_buffer"]
        return other

    def with_a_longer(name: str) -> dict[str, Any]:
        other = copy.deepcopy(state)
        other["state"][2][name] = torch.zeros(999)
        return other

    def with_a_longer_server() -> dict[str, Any]:
        other = copy.deepcopy(state)
        other["cser"]["buckets"][0]["update"]["server"] = torch.zeros(999)
        return other

    cases: list[tuple[Any, type[Exception], str]] = [
        (everyones[1 - rank], ValueError, f"belongs to rank {1 - rank} of 2, not to rank {rank} of 2.*reshard"),
        (changed(world_size=4), ValueError, f"belongs to rank {rank} of 4"),
        (changed(scheme="another"), ValueError, "scheme another, but"),
        (changed(seed=5), ValueError, "seed 5, but this optimizer has 0"),
        (changed(format=7), ValueError, "format 1, got 7"),
        (changed(step="1"), TypeError, "step must be an int"),
        (changed(more=1), ValueError, "more"),
        (torch.optim.SGD(mlp().parameters(), lr=0.1).state_dict(), ValueError, "no 'cser'"),
        ([], TypeError, "a state is a dict, got list"),
        ({**state, "param_groups": []}, ValueError, "groups"),
        (without_a_buffer(), ValueError, "the same state"),
        (with_a_longer("shared"), ValueError, r"shared of parameter 2 must be \(40,\)"),
        (with_a_longer_server(), ValueError, "server's residual must have"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(wrong)
        # On one rank alone: the other is told.
        with pytest.raises(error if rank == 0 else RuntimeError):
            optimizer.load_state_dict(wrong if rank == 0 else state)
    assert equal(values(model), before)
    train(optimizer, model, rank, 3, 5)
    after = values(model)
    with pytest.raises(RuntimeError, match=r"after 5 steps.*after 3 steps"):
        optimizer.load_state_dict(optimizer.state_dict() if rank == 0 else state)
    assert equal(values(model), after) and optimizer.steps == 5 and len(optimizer.state) == len(after)
    optimizer.load_state_dict(state)
    assert equal(values(model), before)


def test_a_state_that_does_not_belong_is_refused() -> None:
    run(_refuses, 2)


def _trained(rank: int, world: int, member: str, steps: int) -> tuple[dict[str, Any], F64]:
    """The state, and the sum of all updates of this rank."""
    model = Absolute()
    optimizer = CSER(model, lr=0.25, momentum=0.5, **MEMBERS[member])
    velocity = updates = np.zeros(sum(SIZES))
    for step in range(steps):
        optimizer.zero_grad()
        model(rank, step).backward()
        gradient = flat([p.grad for p in model.parameters() if p.grad is not None])
        velocity = 0.5 * velocity + gradient
        updates = updates + 0.25 * (gradient + 0.5 * velocity)
        optimizer.step()
    return through_a_file(optimizer.state_dict()), updates


def _states(rank: int, world: int, member: str, steps: int) -> dict[str, Any]:
    return _trained(rank, world, member, steps)[0]


@pytest.mark.parametrize("member", MEMBERS)
def test_what_was_applied_and_what_is_owed_is_every_update(member: str) -> None:
    """Taken to one rank, which owes no one, the parameters are the beginning less the mean of all updates: exactly."""
    states, updates = zip(*run(_trained, 4, member, 4), strict=True)
    (alone,) = CSER.reshard(states, 1)
    assert np.array_equal(_of_each(alone, "parameter"), beginning(1)[0] - np.mean(updates, axis=0))


def _of_each(state: dict[str, Any], name: str) -> Any:
    return flat([state["state"][i][name] for i in sorted(state["state"])])


def _owed_by_servers(states: list[dict[str, Any]], sync: str) -> Any:
    """In fp64, all parameters one after the other."""
    parameters = [states[0]["state"][i]["parameter"] for i in sorted(states[0]["state"])]
    blocks = [-(-p.numel() // 32) for p in parameters]
    owed = torch.zeros(sum(blocks), 32, dtype=torch.float64)
    for state in states:
        saved = state["cser"]["buckets"][0][sync]
        if saved is not None:
            used = parse(saved["codec"])
            assert used is not None
            owed[saved["origins"]] += to_original_domain(saved["server"], used).double().view(-1, 32)
    parts = owed.split(blocks)
    return flat([part.flatten()[: p.numel()] for part, p in zip(parts, parameters, strict=True)])


def _continues(rank: int, world: int, member: str, states: list[dict[str, Any]]) -> None:
    model = Absolute()
    optimizer = CSER(model, lr=0.25, momentum=0.5, **MEMBERS[member])
    optimizer.load_state_dict(states[rank])
    assert optimizer.steps == 4
    for step in range(4, 8):
        optimizer.zero_grad()
        model(rank, step).backward()
        optimizer.step()
    if optimizer._scheme.keeps_shared and world > 1:
        assert same_on_all_ranks([held["shared"] for held in optimizer.state.values()])


@pytest.mark.parametrize("member", ["cser", "cser of quantisers", "cser of blocks", "csea", "ef-sgd", "qsparse"])
def test_reshard_preserves_what_is_owed(member: str) -> None:
    """The mean of what all ranks owe, and what servers owe beside it, is the same on any number of ranks: exactly, on
    these numbers, in fp32."""
    options = {**MEMBERS[member]}
    states = run(_states, 4, member, 4)
    kept = CSER.reshard(states[::-1], 4)
    for before, same in zip(states, kept, strict=True):
        assert before["cser"]["rank"] == same["cser"]["rank"]
        assert all(
            torch.equal(before["state"][i][name], same["state"][i][name])
            for i in same["state"]
            for name in same["state"][i]
        )
    mean = {name: np.mean([_of_each(state, name) for state in states], axis=0) for name in states[0]["state"][0]}
    update, reset = (_owed_by_servers(states, sync) for sync in ("update", "reset"))
    if options["model_codec"] in ("int4", "int4-hadamard", "sign", "int2"):
        assert update.any() or reset.any()
    for world in (1, 2, 3):
        resharded = CSER.reshard(states, world)
        assert [state["cser"]["rank"] for state in resharded] == list(range(world))
        for state in resharded:
            assert np.array_equal(_of_each(state, "momentum_buffer"), mean["momentum_buffer"])
            x = _of_each(state, "parameter")
            if "residual" in mean and world == 1:
                owed = mean["residual"] + update + reset
                assert np.array_equal(x, mean["parameter"] + (owed if member == "qsparse" else -owed))
            elif "residual" in mean:
                assert np.array_equal(x, mean["parameter"])
                assert np.array_equal(_of_each(state, "residual"), mean["residual"] + update + reset)
            else:
                assert np.array_equal(x, mean["parameter"] - update + reset)
            if "shared" in mean and world > 1:
                assert np.array_equal(_of_each(state, "shared"), mean["shared"])
                assert np.array_equal(mean["shared"], _of_each(states[0], "shared"))
            assert ("shared" in state["state"][0]) == ("shared" in mean and world > 1)
        run(_continues, world, member, resharded)
    alone = CSER.reshard(states, 1)
    run(_continues, 3, member, CSER.reshard(alone, 3))


def test_reshard_refuses() -> None:
    states = run(_states, 2, "cser", 2)
    others = run(_states, 2, "cser", 3)
    for given, world, error, message in (
        (states, 0, ValueError, "world_size must be at least 1, got 0"),
        (states, 1.0, TypeError, "world_size must be an int"),
        (states[:1], 2, ValueError, r"those of ranks \[0\]"),
        ([*states, states[0]], 2, ValueError, r"those of ranks \[0, 0, 1\]"),
        ([], 2, ValueError, r"those of ranks \[\]"),
        ([states[0], others[1]], 2, ValueError, "differ in step: 2 and 3"),
        ([{}], 2, ValueError, "no 'state'"),
    ):
        with pytest.raises(error, match=message):
            CSER.reshard(given, world)  # type: ignore[arg-type]
