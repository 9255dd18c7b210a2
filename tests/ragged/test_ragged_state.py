"""The state of a ragged model goes from one run to the next, on as many ranks or others, or is refused on all."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import smallreduce as sr
from fsdp.training import Given, Model, equal, loss_of, sharded
from ragged.owing import Composed, dyadic, everyones, gradients_of
from ragged.sharding import full_parameters, ragged
from ranks import run

FEEDBACKS = (None, "int8", "full")
MODULES = {"", "blocks.0", "blocks.1"}

pytestmark = pytest.mark.filterwarnings("ignore::smallreduce.fsdp.ResidualMemory")


def _mesh(world: int, replicas: int) -> DeviceMesh | None:
    return None if replicas == 1 else init_device_mesh("cpu", (replicas, world // replicas))


def _mixed(feedback: str | None, replicas: int = 1, granularity: Any = "rows", **options: Any) -> Model:
    """A model whose modules have codecs, and seeds, of their own."""
    torch.manual_seed(0)
    model, mesh = Model(), _mesh(dist.get_world_size(), replicas)
    between = "int8" if replicas > 1 else None
    each: dict[str, Any] = {"mesh": mesh, "granularity": granularity, "replicate_gradients": between, **options}
    for number, block in enumerate(model.blocks):
        codec = ("int4-hadamard", "int8")[number]
        sr.ragged.fully_shard(block, gradients=codec, weights="int8", feedback=feedback, seed=number, **each)
    return sr.ragged.fully_shard(model, gradients="int4", feedback=feedback, **each)


Made = tuple[Model, torch.optim.Optimizer, Any]


def _make(feedback: str | None, replicas: int = 1, **options: Any) -> Made:
    model = _mixed(feedback, replicas, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01), sr.ragged.state(model)


def _train(made: Made, rank: int, first: int, count: int) -> None:
    model, optimizer, _ = made
    for step in range(first, first + count):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def _same(ours: nn.Module, theirs: nn.Module) -> bool:
    return equal(list(full_parameters(ours).values()), list(full_parameters(theirs).values()))


def _rest(made: Made) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(made[0], made[1])
    return {"model": of_model, "optimizer": of_optimizer}


def _save(made: Made, path: str) -> None:
    dcp.save({**_rest(made), "compression": made[2].sharded_state_dict()}, checkpoint_id=path)


def _load(made: Made, path: str, *, compression: bool = True) -> None:
    model, optimizer, state = made
    header = {"compression": {"ranks": torch.zeros(2, dtype=torch.int64)}}
    dcp.load(header, checkpoint_id=path)
    loaded = {**_rest(made), "compression": state.sharded_state_dict(header["compression"]["ranks"])}
    dcp.load(loaded, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )  # before the state
    if compression:
        state.load_sharded_state_dict(loaded["compression"])


Owed = dict[str, tuple[Tensor, float]]


def _owed(made: Made) -> Owed:
    """Of what each rank owes the mean over all, fp64, and the largest magnitude of any."""
    mine = {}
    for prefix, memory in made[2]._memories:
        for name, stored in memory.stored().items():
            mine[prefix + name] = memory.owed(name, stored, memory.world_size).double()
    all_of_them = everyones(mine)
    stacks = {name: torch.stack([one[name] for one in all_of_them]) for name in mine}
    return {name: (stack.mean(0), stack.abs().max().item()) for name, stack in stacks.items()}


def _saving(rank: int, world: int, folder: str, replicas: int) -> list[Owed]:
    owed = []
    for feedback in FEEDBACKS:
        made = _make(feedback, replicas)
        _train(made, rank, 0, 3)
        path = f"{folder}/{feedback}"
        _save(made, path)
        own = copy.deepcopy(made[2].state_dict())
        owed.append(_owed(made))
        _train(made, rank, 3, 2)

        # As many ranks: the same run, in either form.
        again = _make(feedback, replicas)
        _load(again, path)
        _train(again, rank, 3, 2)
        assert _same(again[0], made[0]), feedback
        again = _make(feedback, replicas)
        _load(again, path, compression=False)
        again[2].load_state_dict(own)
        _train(again, rank, 3, 2)
        assert _same(again[0], made[0]), feedback
        # The state is of the trajectory: without it the run is another.
        without = _make(feedback, replicas)
        _load(without, path, compression=False)
        _train(without, rank, 3, 2)
        assert not _same(without[0], made[0]), feedback
    return owed


def _resuming(rank: int, world: int, folder: str, replicas: int, between: int) -> list[Owed]:
    owed = []
    for feedback in FEEDBACKS:
        made = _make(feedback, replicas)
        _load(made, f"{folder}/{feedback}")
        owed.append(_owed(made))
        assert made[2].state_dict()["steps"] == {name: [3, between, 3] for name in MODULES}
        _train(made, rank, 3, 1)
    return owed


@pytest.mark.parametrize(("saved", "resumed"), [((4, 1), [(2, 1), (3, 1)]), ((2, 1), [(4, 1)]), ((4, 2), [(2, 1)])])
def test_from_one_number_of_ranks_to_another(
    saved: tuple[int, int], resumed: list[tuple[int, int]], tmp_path: Path
) -> None:
    before = run(_saving, saved[0], str(tmp_path), saved[1], timeout=240)[0]
    for world, replicas in resumed:
        between = 3 if saved[1] > 1 else 0  # reductions over replicas so far
        after = run(_resuming, world, str(tmp_path), replicas, between, timeout=120)[0]
        for feedback, then, now in zip(FEEDBACKS, before, after, strict=True):
            assert then.keys() == now.keys()
            assert bool(then) == (feedback is not None)
            for name, (mean, largest) in then.items():
                # A rank takes a mean of what some owed, which is no larger than the largest of these, and rounds it:
                # to fp32; and to 8 bits, by half of a unit, which is 1/127 of its group's largest, in bf16 rounded up.
                unit = (1 + 2**-7) / 127 if feedback == "int8" else 0.0
                assert (mean - now[name][0]).abs().max().item() <= (2**-24 + unit / 2) * largest, (feedback, name)


def _saved(rank: int, world: int, folder: str) -> None:
    for feedback in FEEDBACKS:
        made = _make(feedback)
        _train(made, rank, 0, 2)
        _save(made, f"{folder}/{feedback}")


def _alone(rank: int, world: int, folder: str) -> None:
    for feedback in FEEDBACKS:
        made = _make(feedback)
        if feedback is None:
            _load(made, f"{folder}/{feedback}")
        else:
            with pytest.warns(UserWarning, match="the residuals of 4 ranks are dropped"):
                _load(made, f"{folder}/{feedback}")
        assert made[2].state_dict()["steps"] == {name: [2, 0, 2] for name in MODULES}
        _train(made, rank, 2, 1)


def _several(rank: int, world: int, folder: str) -> None:
    for feedback in FEEDBACKS:
        made = _make(feedback)
        _train(made, rank, 0, 1)
        assert all(mean.any() for mean, _ in _owed(made).values())
        _load(made, f"{folder}/{feedback}")
        assert not any(mean.any() for mean, _ in _owed(made).values())


def test_to_one_rank_and_from_it(tmp_path: Path) -> None:
    for world, there, other, back in ((4, "several", 1, _alone), (1, "one", 2, _several)):
        run(_saved, world, str(tmp_path / there), timeout=120)
        run(back, other, str(tmp_path / there))


def _steps_of(model: Given, rank: int, first: int, last: int) -> list[dict[str, Tensor]]:
    found = []
    for step in range(first, last):
        model.zero_grad()
        model([dyadic(weight.shape, rank, step) for weight in model.weights]).backward()
        found.append(gradients_of(model))
    return found


def _other_owners(rank: int, world: int) -> None:
    """Nothing of a state depends on who owns what: neither what is loaded nor what comes after."""
    shapes: list[tuple[int, ...]] = [(40, 24), (700,), (6, 130)]
    for feedback in ("int8", "full"):

        def make(granularity: str, feedback: str = feedback) -> tuple[Given, Any]:
            model = Given(shapes)
            sr.ragged.fully_shard(model, gradients="int4", feedback=feedback, granularity=granularity)
            return model, sr.ragged.state(model)

        model, state = make("group")
        _steps_of(model, rank, 0, 3)
        saved = state.state_dict()
        expected = _steps_of(model, rank, 3, 6)
        for granularity in ("rows", "matrix"):
            other, others = make(granularity)
            assert any(a.placement != b.placement for a, b in zip(other.weights, model.weights, strict=True))
            others.load_state_dict(saved)
            for ours, theirs in zip(_steps_of(other, rank, 3, 6), expected, strict=True):
                assert equal(list(ours.values()), list(theirs.values())), (feedback, granularity)
            owed, own = others.state_dict()["residuals"], state.state_dict()["residuals"]
            assert all(torch.equal(owed[name], own[name]) for name in own), (feedback, granularity)
            assert not any(torch.equal(owed[name], saved["residuals"][name]) for name in own)


def test_other_owners_of_the_same_parameters() -> None:
    run(_other_owners, 3)


def _replicas(rank: int, world: int) -> None:
    """Every rank of every replica owes what its own gradients lost."""
    codec = sr.IntQuant(4, rounding="nearest")
    model = sr.ragged.fully_shard(
        Given([(40, 24), (7,)]), gradients=codec, feedback="full", mesh=_mesh(world, 2), granularity="rows"
    )
    state = sr.ragged.state(model)
    first = world // 2 * (rank // (world // 2))  # of this replica
    composed = [[Composed(shape, world // 2, codec) for shape in ((40, 24), (7,))] for _ in range(2)]
    for step in range(3):
        found = _steps_of(model, rank, step, step + 1)[0]
        for index, shape in enumerate(((40, 24), (7,))):
            means = [
                composed[replica][index].reduce(
                    [dyadic(shape, replica * world // 2 + r, step) for r in range(world // 2)], step
                )
                for replica in range(2)
            ]
            assert torch.equal(found[f"weights.{index}"], (means[0] + means[1]) / 2)  # type: ignore[operator]
            owed = composed[first // (world // 2)][index].owed[rank - first]
            assert torch.equal(state.state_dict()["residuals"][f"weights.{index}"], owed)


def test_replicas_owe_for_themselves() -> None:
    run(_replicas, 4)


def _refused(rank: int, world: int) -> None:
    made = _make("full")
    model, _, state = made
    _train(made, rank, 0, 1)
    own = state.state_dict()
    with pytest.raises(ValueError, match=f"belongs to rank {1 - rank} of 2, not to rank {rank}"):
        state.load_state_dict(everyones(own)[1 - rank])
    for wrong, match in (
        ({}, "not a state"),
        ({**own, "seed": 3}, r"has seed 3, but this model has \[0, 0, 1\]"),
        ({**own, "feedback": "int8"}, "feedback 'int8'"),
        ({**own, "steps": {"other": [1, 0, 1]}}, "other modules"),
        ({**own, "steps": {name: [1, 0] for name in own["steps"]}}, "must be 3 numbers, got"),
        ({**own, "steps": {name: [1, 0, -1] for name in own["steps"]}}, "must not be negative"),
        ({**own, "residuals": {"other": torch.zeros(1)}}, "other residuals"),
        ({**own, "residuals": {name: t[:1] for name, t in own["residuals"].items()}}, "elements of torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            state.load_state_dict(wrong)
    # One rank alone cannot: then none does. Nor do they load states of different steps.
    changed = copy.deepcopy(own)
    for residual in changed["residuals"].values():
        residual.zero_()
    with pytest.raises(ValueError if rank else RuntimeError, match="not a state"):
        state.load_state_dict({} if rank else changed)
    changed["steps"] = {name: [1 + rank, 0, 1] for name in MODULES}
    with pytest.raises(RuntimeError, match="do not agree"):
        state.load_state_dict(changed)
    now = state.state_dict()
    assert now["steps"] == own["steps"]
    assert all(torch.equal(residual, now["residuals"][name]) for name, residual in own["residuals"].items())
    with pytest.raises(ValueError, match="saved_on"):
        state.sharded_state_dict(0)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(state)

    with pytest.raises(TypeError, match="must be a module"):
        sr.ragged.state(model.parameters())  # type: ignore[arg-type]
    for other in (nn.Linear(2, 2), sharded()):
        with pytest.raises(TypeError, match=r"nothing in .* is sharded by smallreduce.ragged.fully_shard"):
            sr.ragged.state(other)


def test_states_of_others_are_refused() -> None:
    run(_refused, 2)


def _other_ranks(rank: int, world: int) -> None:
    """With feedback all modules are of one shard group; without, each may be of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    for feedback in ("full", None):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        sr.ragged.fully_shard(model[0], gradients="int4", mesh=mesh["inner"])
        sr.ragged.fully_shard(model, gradients="int4", feedback=feedback)
        if feedback is None:
            state = sr.ragged.state(model)
            model(torch.ones(2, 8)).sum().backward()
            assert state.stats().world_size == 4
            own = state.state_dict()
            assert own["steps"] == {"": [1, 0, 1], "0": [1, 0, 1]}
            state.load_state_dict(own)
            continue
        with pytest.raises(ValueError, match=r"root module is sharded over ranks \[\[0, 1, 2, 3\]\] and 0 over ranks"):
            sr.ragged.state(model)


def test_modules_on_other_ranks() -> None:
    run(_other_ranks, 4)


def _halves(rank: int, world: int) -> None:
    """Residuals of fp16 are in units that depend on the number of ranks."""
    model = ragged(policy="fp16-reduce", gradients="int8", feedback="full")
    state = sr.ragged.state(model)
    loss_of(model, rank, 0).backward()
    state.load_sharded_state_dict(state.sharded_state_dict())
    with pytest.raises(ValueError, match=r"root module reduces in fp16.*load on 4 ranks"):
        state.load_sharded_state_dict(state.sharded_state_dict((4, 1)))


def test_residuals_of_halves_stay_on_as_many_ranks() -> None:
    run(_halves, 2)


class _TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.single = Given([(40, 8)])
        self.brief = Given([(9, 5)]).to(torch.bfloat16)

    def forward(self, given: list[Tensor]) -> Tensor:
        return self.single(given[:1]) + self.brief([given[1].to(torch.bfloat16)])


def _names(rank: int, world: int) -> None:
    """Of parameters of two dtypes, and without those of wrappers."""
    model = sr.ragged.fully_shard(_TwoDtypes(), gradients="int4", feedback="full")
    state = sr.ragged.state(model)
    model([dyadic((40, 8), rank, 0), dyadic((9, 5), rank, 0)]).backward()
    own = state.state_dict()
    assert own["steps"] == {"": [1, 0, 1], ":1": [1, 0, 1]}
    assert {name: len(residual) for name, residual in own["residuals"].items()} == {
        "single.weights.0": 320,
        "brief.weights.0": 45,
    }
    plain, wrapped = (ragged(checkpoint=c, gradients="int4", feedback="full") for c in (False, True))
    loss_of(plain, rank, 0).backward()
    saved = sr.ragged.state(plain).state_dict()
    sr.ragged.state(wrapped).load_state_dict(saved)
    loaded = sr.ragged.state(wrapped).state_dict()
    assert loaded["steps"] == saved["steps"]
    assert saved["residuals"].keys() == {name for name, _ in Model().named_parameters()}
    assert all(torch.equal(residual, loaded["residuals"][name]) for name, residual in saved["residuals"].items())


def test_names_of_modules_and_parameters() -> None:
    run(_names, 2)


def _before_there_are_weights(rank: int, world: int) -> None:
    """A model on the meta device has a state, too."""
    made = _make("int8")
    _train(made, rank, 0, 2)
    own = made[2].state_dict()
    with torch.device("meta"):
        model = Given([(40, 8)])
    sr.ragged.fully_shard(model, gradients="int4", feedback="full")
    state = sr.ragged.state(model)
    saved = state.state_dict()
    saved["residuals"]["weights.0"] = dyadic((320,), rank, 7)
    saved["steps"] = {"": [5, 0, 5]}
    state.load_state_dict(saved)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.weights[0].zero_()
    composed = Composed((40, 8), world, sr.IntQuant(4, rounding="nearest"))
    composed.owed = [dyadic((320,), r, 7) for r in range(world)]
    mean = composed.reduce([dyadic((40, 8), r, 5) for r in range(world)], 5)
    assert mean is not None
    assert torch.equal(_steps_of(model, rank, 5, 6)[0]["weights.0"], mean)
    assert own["steps"] == {name: [2, 0, 2] for name in MODULES}


def test_a_state_before_there_are_weights() -> None:
    run(_before_there_are_weights, 2)


def _parts_are_read(rank: int, world: int) -> None:
    """torch's own fully sharded modules inside are none of ours, and a module inside has a state of its own."""
    made = _make("full")
    _train(made, rank, 0, 2)
    inner = sr.ragged.state(made[0].blocks[1]).state_dict()
    whole = made[2].state_dict()
    assert inner["steps"] == {"": whole["steps"]["blocks.1"]}
    assert all(torch.equal(one, whole["residuals"][f"blocks.1.{name}"]) for name, one in inner["residuals"].items())
    model = nn.Sequential(fully_shard(nn.Linear(4, 4)), sr.ragged.fully_shard(nn.Linear(4, 4)))
    assert sr.ragged.state(model).state_dict()["steps"] == {"1": [0, 0, 0]}


def test_the_state_of_a_part() -> None:
    run(_parts_are_read, 2)
