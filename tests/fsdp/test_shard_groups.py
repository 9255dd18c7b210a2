"""Shard groups that are not all alike, or of one rank: what is kept, and what goes from one number to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import smallreduce as sr
from fsdp.training import equal, gradients, loss_of, sharded, shards
from ranks import run

pytestmark = pytest.mark.filterwarnings("ignore::smallreduce.fsdp.ResidualMemory")

# ---- groups of different sizes --------------------------------------------------------------------------------------


def _experts() -> nn.Sequential:
    """An expert over two ranks, the rest over four."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "expert"))["expert"])
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    return model


def _unequal(rank: int, world: int) -> None:
    expert = "0, 1" if rank < 2 else "2, 3"
    match = rf"the root module is sharded over ranks 0, 1, 2, 3 and 0 over ranks {expert}, .*"
    for arguments, instead in (
        ({"feedback": "full"}, "give feedback=None, or call compress on each part"),
        ({"feedback": "int8"}, "give feedback=None, or call compress on each part"),
        ({"weights": "int8", "differences": True}, "give differences=False, or call compress on each part"),
    ):
        with pytest.raises(ValueError, match=match + instead):
            sr.fsdp.compress(_experts(), "int8", **arguments)
    # Without, it works, and the state has what random bits depend on.
    made = []
    for _ in range(2):
        model = _experts()
        made.append((model, sr.fsdp.compress(model, "int8", "int8")))
    model, state = made[0]
    found = []
    for _ in range(3):
        model(torch.ones(4, 24)).square().mean().backward()
        found.append(gradients(model))
        model.zero_grad()
    stats = state.stats()
    assert stats.world_size == 4 and stats.gradients.exact_calls == 0 < stats.gradients.calls
    other, again = made[1]
    for _ in range(2):
        other(torch.ones(4, 24)).square().mean().backward()
        other.zero_grad()
    saved = again.state_dict()
    assert (saved["row"], saved["ranks"]) == (rank, [4, 1]) and not saved["residuals"]
    sharded_form = again.sharded_state_dict()
    for load in (lambda: again.load_state_dict(saved), lambda: again.load_sharded_state_dict(sharded_form)):
        load()
        other(torch.ones(4, 24)).square().mean().backward()
        assert equal(gradients(other), found[2])
        other.zero_grad()
    # What the message says can be done.
    apart = _experts()
    state = sr.fsdp.compress(apart[0], "int8", feedback="full")
    assert state.stats().world_size == 2


def test_modules_on_shard_groups_of_different_sizes() -> None:
    run(_unequal, 4)


# ---- one rank -------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "none": {"weights": "int8"},
    "int8": {"weights": "int8", "feedback": "int8"},
    "full": {"weights": "int8", "feedback": "full"},
    "differences": {"weights": "int4", "differences": True},
}


def _make(way: str) -> tuple[Any, torch.optim.Optimizer, sr.fsdp.State]:
    model = sharded()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), sr.fsdp.compress(model, "int4", **WAYS[way])


def _train(made: tuple[Any, torch.optim.Optimizer, sr.fsdp.State], rank: int, steps: range) -> None:
    model, optimizer, _ = made
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def _whole(model: Any) -> dict[str, Tensor]:
    return {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}


def _save(rank: int, world: int, folder: str) -> list[dict[str, Tensor]]:
    found = []
    for way in WAYS:
        made = _make(way)
        _train(made, rank, range(2))
        model, _, state = made
        content = {"model": dict(model.named_parameters()), "compression": state.sharded_state_dict()}
        dcp.save(content, checkpoint_id=f"{folder}/{way}")
        found.append(_whole(model))
    return found


def _resume(rank: int, world: int, folder: str, saved_on: int) -> list[dict[str, Tensor]]:
    found = []
    for way, arguments in WAYS.items():
        made = _make(way)
        model, _, state = made
        header = {"compression": {"ranks": torch.zeros(2, dtype=torch.int64)}}
        dcp.load(header, checkpoint_id=f"{folder}/{way}")
        assert header["compression"]["ranks"].tolist() == [saved_on, 1]
        compression = state.sharded_state_dict(header["compression"]["ranks"])
        dcp.load({"model": dict(model.named_parameters()), "compression": compression}, checkpoint_id=f"{folder}/{way}")
        if world == 1 < saved_on and "feedback" in arguments:
            with pytest.warns(UserWarning, match=f"residuals of {saved_on} ranks are dropped"):
                state.load_sharded_state_dict(compression)
        else:
            state.load_sharded_state_dict(compression)
        # torch has called no collective on one rank.
        assert {step for step, _ in state.state_dict()["steps"].values()} == {2 if saved_on > 1 else 0}
        found.append(_whole(model))
        if world > 1:
            _begins(way, made, rank, world)
        _train(made, rank, range(2, 4))
        # What one rank saves after that is taken over again.
        state.load_state_dict(state.state_dict())
        if world == 1:
            assert all(step is None for _, step, _ in state.state_dict()["differences"].values())
    return found


def _begins(way: str, made: tuple[Any, torch.optim.Optimizer, sr.fsdp.State], rank: int, world: int) -> None:
    """With nothing owed, and without a reference: as a model that has just been compressed, of these weights."""
    model, _, state = made
    fresh, _, beginning = _make(way)
    for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
        other.data.to_local().copy_(parameter.data.to_local())
    begun = beginning.state_dict()
    begun["steps"] = state.state_dict()["steps"]
    beginning.load_state_dict(begun)
    for each in (model, fresh):
        loss_of(each, rank, 2).backward()
    assert equal(gradients(model), gradients(fresh))
    before, after = state.stats().weights, beginning.stats().weights
    assert before.exact_calls == after.exact_calls == (3 if way == "differences" else 0)
    found, expected = state.state_dict()["residuals"], beginning.state_dict()["residuals"]
    assert found.keys() == expected.keys() and bool(found) == ("feedback" in WAYS[way])
    assert all(torch.equal(residual, expected[name]) for name, residual in found.items())


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 2), (2, 1), (1, 1)])
def test_from_one_rank_and_to_one(saved_on: int, resumed_on: int, tmp_path: Path) -> None:
    # torch caches where DTensors lie by the mesh, without the rank: no process may be another rank later.
    before = run(_save, saved_on, str(tmp_path), keep=False, timeout=120)[0]
    after = run(_resume, resumed_on, str(tmp_path), saved_on, keep=False, timeout=120)[0]
    for then, now in zip(before, after, strict=True):
        assert then.keys() == now.keys() and all(torch.equal(now[name], whole) for name, whole in then.items())


# ---- what a state was made with -------------------------------------------------------------------------------------


def _given(rank: int, world: int, folder: str) -> None:
    def sharded_form(**arguments: Any) -> dict[str, Any]:
        return sr.fsdp.compress(sharded(), "int4", **arguments).sharded_state_dict()

    state = sr.fsdp.compress(sharded(), "int4", "int8", feedback="int8", seed=3)
    own = state.sharded_state_dict()
    for other, match in (
        (sharded_form(weights="int8", feedback="int8"), "this state has seed 0, but this model has 3"),
        (sharded_form(weights="int8", seed=3), "this state has feedback None, but this model has 'int8'"),
        (sharded_form(weights="int8", seed=3, feedback="full"), "has feedback 'full', but this model has 'int8'"),
        (
            sharded_form(weights="int8", seed=3, feedback="int8", differences=True),
            "this state has by_differences True, but this model has False",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            state.load_sharded_state_dict(other)
    state.load_sharded_state_dict(own)
    # Through a checkpoint: one without residuals into a model that takes none either, of another seed.
    dcp.save({"compression": sharded_form(weights="int8", seed=3)}, checkpoint_id=folder)
    model = sharded()
    other = sr.fsdp.compress(model, "int4", "int8", seed=4)
    before = shards(model)
    content = {"compression": other.sharded_state_dict((2, 1))}
    dcp.load(content, checkpoint_id=folder)
    with pytest.raises(ValueError, match="this state has seed 3, but this model has 4"):
        other.load_sharded_state_dict(content["compression"])
    assert equal(shards(model), before)


def test_the_sharded_form_of_another_model_is_refused(tmp_path: Path) -> None:
    run(_given, 2, str(tmp_path))
