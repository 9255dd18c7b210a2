"""What is owed: that it is all there, what it takes, and that it goes from one run to the next."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import smallreduce as sr
from fsdp.training import Given, equal, loss_of, sharded, shards
from ranks import run
from smallreduce import ops
from smallreduce._layout import Layout

SHAPES: list[tuple[int, ...]] = [(13, 9), (5,), (64, 3)]

pytestmark = pytest.mark.filterwarnings("ignore::smallreduce.fsdp.ResidualMemory")


def _dyadic(shape: tuple[int, ...], rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(-64, 65, shape, generator=generator) / 8.0


def _everyones(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, tensors)
    return found


def _telescopes(rank: int, world: int, chunk: int) -> None:
    with mock.patch("smallreduce.collectives._engine.CHUNK_NUMEL", chunk):
        _telescope(rank, world)


def _telescope(rank: int, world: int) -> None:
    for codec in ("int8", "int4:group=32", "int4-hadamard", "topk:0.2"):
        for dim in (0, 1):
            shapes = SHAPES if dim == 0 else [(3, 6 * world), (7, world)]
            model = Given(shapes)
            fully_shard(model, shard_placement_fn=lambda p, dim=dim: torch.distributed.tensor.Shard(dim))
            with pytest.warns(sr.fsdp.ResidualMemory) if rank == 0 else nullcontext():
                state = sr.fsdp.compress(model, codec, feedback="full")
            steps = 3
            for step in range(steps):
                model([_dyadic(shape, rank, step) for shape in shapes]).backward()
            owed = _everyones(state.state_dict()["residuals"])
            for index, (name, parameter) in enumerate(model.named_parameters()):
                # All of it in fp64; in fp32 the sums would be exact for few codecs.
                given = sum(_dyadic(shapes[index], r, s).double() for r in range(world) for s in range(steps))
                left = sum(one[name].double().view(shapes[index]) for one in owed)
                sent = torch.cat([p.double() for p in _gathered(parameter.grad, shapes[index], dim, world)], dim)
                # Three fp32 additions of a mean that is itself rounded, of values up to 3 * 8.
                assert torch.allclose(sent * world + left, given, rtol=0, atol=world * 4 * 24 * 2**-24), (codec, name)


def _gathered(gradient: Any, shape: tuple[int, ...], dim: int, world: int) -> list[torch.Tensor]:
    found: list[Any] = [None] * world
    dist.all_gather_object(found, gradient.to_local())
    return [part for part in found if part.numel()]


@pytest.mark.parametrize(("world", "chunk"), [(2, 1 << 22), (3, 64)])
def test_outputs_and_residuals_are_the_inputs(world: int, chunk: int) -> None:
    run(_telescopes, world, chunk)


def _loco(rank: int, world: int) -> None:
    numel, beta = 96, 0.75
    model = Given([(world * numel,)])
    fully_shard(model)
    codec = sr.IntQuant(4, rounding="nearest")
    state = sr.fsdp.compress(model, codec, feedback="int8", beta=beta, reset_every=3)
    layout = Layout.build([(r * numel, numel) for r in range(world)], codec.format, torch.float32)
    kept = Layout.build(
        [(r * numel, numel) for r in range(world)], sr.IntQuant(8, rounding="nearest").format, torch.float32
    )
    packet = torch.zeros(kept.stride, dtype=torch.uint8)
    ops.encode(torch.zeros(world * numel), kept, packet)
    for step in range(5):
        gradient = torch.randn(world * numel, generator=torch.Generator().manual_seed(10 * step + rank))
        model([gradient]).backward()
        old = torch.zeros(world * numel)
        if step != 3:
            ops.decode(packet, kept, old)
        error = old.clone()
        ops.encode(gradient, layout, torch.zeros(layout.stride, dtype=torch.uint8), error)
        new = error * (1 - beta) if step == 3 else (error * (1 - beta) / beta + old) * beta
        ops.encode(new, kept, packet)
        assert torch.equal(state.state_dict()["residuals"]["weights.0"], packet), step
    assert state.stats().residual_nbytes == packet.nbytes


def test_loco_is_an_exponential_average_in_eight_bits() -> None:
    run(_loco, 2)


def _make(rank: int, world: int, feedback: str | None, replicas: int = 1) -> tuple[Any, Any, Any]:
    options: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
        options = {"mesh": mesh["shard"]}
        arguments = {"replicate_group": mesh["replicate"], "replicate_gradients": "int8"}
    model = sharded(**options)
    state = sr.fsdp.compress(model, "int4-hadamard", "int8", feedback=feedback, **arguments)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False), state


def _steps(made: tuple[Any, Any, Any], rank: int, first: int, count: int) -> None:
    model, optimizer, _ = made
    for step in range(first, first + count):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


FEEDBACKS = (None, "int8", "full")
Owed = dict[str, tuple[torch.Tensor, float]]


def _owed(made: tuple[Any, Any, Any]) -> Owed:
    """Of what each rank owes the mean over all, fp64, and the largest magnitude of any."""
    state = made[2]
    mine = {}
    for _, memory in state._memories:
        stored = memory.stored()
        for slot in memory.slots:
            mine[slot.name] = memory.owed(slot.name, stored[slot.name], memory.world_size).double()
    everyones = _everyones(mine)
    stacks = {name: torch.stack([one[name] for one in everyones]) for name in mine}
    return {name: (stack.mean(0), stack.abs().max().item()) for name, stack in stacks.items()}


def _save(rank: int, world: int, folder: str, replicas: int) -> list[Owed]:
    owed = []
    for feedback in FEEDBACKS:
        made = _make(rank, world, feedback, replicas)
        _steps(made, rank, 0, 3)
        model, optimizer, state = made
        path = f"{folder}/{feedback}"
        # The residuals alone: torch caches where DTensors lie by the mesh, without the rank, and the processes of these
        # tests are given one rank after another. docs/fsdp.md saves and loads all of a run.
        dcp.save({"compression": state.sharded_state_dict()}, checkpoint_id=path)
        rest = shards(model), copy.deepcopy(optimizer.state_dict())
        own = state.state_dict()
        owed.append(_owed(made))
        _steps(made, rank, 3, 2)

        # As many ranks: the same run, in either form.
        for form in ("all", "own"):
            again = _make(rank, world, feedback, replicas)
            _load(again, path, own if form == "own" else None, rest)
            _steps(again, rank, 3, 2)
            assert equal(shards(again[0]), shards(model)), (feedback, form)
        # The state is of the trajectory: without it the run is another.
        without = _make(rank, world, feedback, replicas)
        _load(without, path, without[2].state_dict(), rest)
        _steps(without, rank, 3, 2)
        assert not equal(shards(without[0]), shards(model)), feedback
    return owed


def _load(
    made: tuple[Any, Any, Any], path: str, own: dict[str, Any] | None = None, rest: tuple[Any, Any] | None = None
) -> None:
    model, optimizer, state = made
    header = {"compression": {"ranks": torch.zeros(2, dtype=torch.int64)}}
    dcp.load(header, checkpoint_id=path)
    compression = state.sharded_state_dict(header["compression"]["ranks"])
    dcp.load({"compression": compression}, checkpoint_id=path)
    if rest is not None:
        for parameter, shard in zip(model.parameters(), rest[0], strict=True):
            parameter.data.to_local().copy_(shard)
        optimizer.load_state_dict(copy.deepcopy(rest[1]))
    if own is None:
        state.load_sharded_state_dict(compression)
    else:
        state.load_state_dict(own)


def _resume(rank: int, world: int, folder: str, replicas: int) -> list[Owed]:
    owed = []
    for feedback in FEEDBACKS:
        made = _make(rank, world, feedback, replicas)
        _load(made, f"{folder}/{feedback}")
        owed.append(_owed(made))
        steps = made[2].state_dict()["steps"]
        assert {name: step for name, (step, _) in steps.items()} == {"": 3, "blocks.0": 3, "blocks.1": 3}
        _steps(made, rank, 3, 1)
    return owed


@pytest.mark.parametrize(
    ("saved", "resumed"), [((4, 1), [(2, 1), (3, 1), (4, 2)]), ((2, 1), [(3, 1)]), ((4, 2), [(2, 1)])]
)
def test_from_one_number_of_ranks_to_another(
    saved: tuple[int, int], resumed: list[tuple[int, int]], tmp_path: Path
) -> None:
    before = run(_save, saved[0], str(tmp_path), saved[1], timeout=120)[0]
    for world, replicas in resumed:
        after = run(_resume, world, str(tmp_path), replicas)[0]
        for feedback, then, now in zip(FEEDBACKS, before, after, strict=True):
            assert then.keys() == now.keys() and bool(then) == (feedback is not None)
            for name, (mean, largest) in then.items():
                # A rank takes a mean of what some owed, which is no larger than the largest of these, and rounds it:
                # to fp32; and to 8 bits, by half of a unit, which is 1/127 of its group's largest, in bf16 rounded up.
                unit = (1 + 2**-7) / 127 if feedback == "int8" else 0.0
                assert (mean - now[name][0]).abs().max().item() <= (2**-24 + unit / 2) * largest, (feedback, name)


def _refused(rank: int, world: int) -> None:
    made = _make(rank, world, "full")
    state = made[2]
    _steps(made, rank, 0, 1)
    own = state.state_dict()
    others = _everyones(own)[1 - rank]
    with pytest.raises(ValueError, match=f"belongs to rank {1 - rank} of 2, not to rank {rank}"):
        state.load_state_dict(others)
    for wrong, match in (
        ({}, "not a state"),
        ({**own, "seed": 3}, "seed 3"),
        ({**own, "feedback": "int8"}, "feedback 'int8'"),
        ({**own, "steps": {"other": 1}}, "other modules"),
        ({**own, "residuals": {"other": torch.zeros(1)}}, "other residuals"),
        ({**own, "residuals": {name: t[:1] for name, t in own["residuals"].items()}}, "elements of torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            state.load_state_dict(wrong)
    with pytest.raises(ValueError, match="saved_on"):
        state.sharded_state_dict(0)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(state)


def _halves(rank: int, world: int) -> None:
    """Residuals of fp16 are in units that depend on the number of ranks."""
    model = sharded(policy="fp16-reduce")
    state = sr.fsdp.compress(model, "int8", feedback="full")
    loss_of(model, rank, 0).backward()
    state.load_sharded_state_dict(state.sharded_state_dict())
    others = state.sharded_state_dict((4, 1))
    with pytest.raises(ValueError, match=r"reduces in fp16.*load on 4 ranks"):
        state.load_sharded_state_dict(others)


def test_residuals_of_halves_stay_on_as_many_ranks() -> None:
    run(_halves, 2)


def test_states_of_others_are_refused() -> None:
    run(_refused, 2)
