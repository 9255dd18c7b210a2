"""Weights as differences: what the operators give, once for each change, the same in all passes, and checkpoints."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import smallreduce as sr
from fsdp.seen import Two, shard_each
from fsdp.training import POLICIES, Given, equal, loss_of, sharded, shards
from ranks import run
from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.collectives import ring_bytes
from smallreduce.collectives._engine import stage_seed

BACKEND = sr.metrics.register_counting_backend()

SHAPES: list[tuple[int, ...]] = [(13, 9), (5,), (64, 33), (2, 7)]
SEED = 3


def _whole(model: nn.Module) -> list[Tensor]:
    """What the optimizer has, of all ranks."""
    return [parameter.full_tensor().detach() for parameter in model.parameters()]  # type: ignore[operator]


def _seen(model: nn.Module) -> list[Tensor]:
    """What the next pass computes with."""
    model.unshard()  # type: ignore[operator]
    found = [parameter.detach().clone() for parameter in model.parameters()]
    model.reshard()  # type: ignore[operator]
    return found


def _touch(model: nn.Module, scale: float, seed: int = 0) -> None:
    """Changes the shards by random numbers."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            shard = parameter.to_local()  # type: ignore[operator]
            shard += scale * torch.randn(shard.shape, generator=torch.Generator().manual_seed(100 * seed + index))


# ---- what travels ---------------------------------------------------------------------------------------------------


def _parts(tensors: list[Tensor], world: int) -> list[list[Tensor]]:
    """For each rank the rows of every tensor, padded, that it has."""
    chunks = []
    for tensor in tensors:
        rows = -(-len(tensor) // world)
        padded = torch.zeros(rows * world, *tensor.shape[1:], dtype=tensor.dtype)
        padded[: len(tensor)] = tensor
        chunks.append(padded.view(world, -1))
    return [[chunk[rank] for chunk in chunks] for rank in range(world)]


def _sum(known: list[Tensor], now: list[Tensor], codec: Any, number: int, world: int) -> list[Tensor]:
    """What all ranks have after a difference, from the operators alone."""
    moved = []
    for rank, (reference, target) in enumerate(zip(_parts(known, world), _parts(now, world), strict=True)):
        sizes = [part.numel() for part in reference]
        offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        layout = Layout.build(list(zip(offsets, sizes, strict=True)), codec.format, known[0].dtype)
        part, packet = torch.cat(reference), torch.zeros(layout.stride, dtype=torch.uint8)
        step = torch.tensor(number)
        ops.encode_difference(torch.cat(target).float(), part, layout, packet, stage_seed(SEED, 0, rank, 0), step)
        ops.decode_add(packet, layout, part)
        moved.append(part.split(sizes))
    return [
        torch.cat([of_rank[index] for of_rank in moved])[: tensor.numel()].view(tensor.shape)
        for index, tensor in enumerate(known)
    ]


def _transcription(rank: int, world: int, policy: str, spelling: str, node_size: int | None) -> None:
    codec, dtype = sr.codec(spelling), POLICIES[policy].param_dtype or torch.float32
    assert isinstance(codec, sr.IntQuant)
    model = fully_shard(Given(SHAPES), mp_policy=POLICIES[policy])
    gradients = None if node_size is None else ("int8", "int4")
    state = sr.fsdp.compress(model, gradients, codec, differences=True, seed=SEED, node_size=node_size)
    known = [weight.to(dtype) for weight in _whole(model)]
    assert equal(_seen(model), known)  # the first are exact
    for number in range(3):
        model([torch.zeros(shape) for shape in SHAPES]).backward()  # the next step
        _touch(model, 0.1, seed=number + 1)
        known = _sum(known, [weight.to(dtype) for weight in _whole(model)], codec.with_feedback(), number, world)
        assert equal(_seen(model), known), number
    part = sum(part.numel() for part in _parts(known, world)[0])
    assert state.stats().kept_nbytes == (world + 1) * part * dtype.itemsize


@pytest.mark.parametrize(
    ("world", "policy", "spelling", "node_size"),
    [
        (2, "fp32", "int4", None),
        (3, "bf16", "int8:group=64", None),
        (3, "fp32", "int2:rounding=stochastic", None),
        (4, "bf16", "int4:rounding=stochastic", 2),
    ],
)
def test_the_operators_give_the_same(world: int, policy: str, spelling: str, node_size: int | None) -> None:
    run(_transcription, world, policy, spelling, node_size)


def _catches_up(rank: int, world: int) -> None:
    model = fully_shard(Given([(64, 33)]))
    sr.fsdp.compress(model, None, "int4:group=32", differences=True)
    _seen(model)
    model([torch.zeros(64, 33)]).backward()  # the next step
    _touch(model, 1.0, seed=rank)
    lost = []
    for _ in range(5):
        lost.append((_whole(model)[0] - _seen(model)[0]).abs().max().item())
        model([torch.zeros(64, 33)]).backward()  # the next step
    for before, after in pairwise(lost):
        # Half of a unit of what was lost before, which is a seventh of its group's largest, in bf16 rounded up; and
        # sums are rounded to the last place of weights below 8.
        assert after <= before * (1 + 2**-7) / 14 + 8 * 2**-24
    assert lost[0] > 0.1 > 1e-4 > lost[-1]


def test_what_a_difference_loses_is_in_the_next() -> None:
    run(_catches_up, 2)


# ---- when -----------------------------------------------------------------------------------------------------------


def _once_for_each_change(rank: int, world: int) -> None:
    for recompute in (None, False, True):
        sr.metrics.reset()
        model = shard_each(Two(True, recompute))
        state = sr.fsdp.compress(model, None, "int4", differences=True)
        x = torch.ones(64)

        def sent(state: sr.fsdp.State = state) -> int:
            return state.stats().weights.bytes_sent

        # Of two units; where the gradients have not been reduced since, the ranks ask each other.
        exact, asked = (world - 1) * 4 * 2 * 64 // world, 2 * ring_bytes(4, world)
        difference = (world - 1) * 2 * sr.IntQuant(4).packet_nbytes(64 // world)
        first = model(x)
        assert sent() == exact
        with torch.no_grad():
            model(x)
        second = model(x)
        second.backward()
        first.backward()
        assert sent() == exact + 2 * asked
        with torch.inference_mode():
            model(x)
        assert sent() == exact + 2 * asked + difference
        saw = [*model.first.seen]
        assert all(torch.equal(weight, saw[0]) for weight in saw) and len(saw) >= 6  # no weights have changed

        model.first.seen.clear()
        _touch(model, 0.1)
        with torch.inference_mode():
            model(x)
        model(x).backward()
        # Weights that have changed out of turn travel exactly.
        assert sent() == 2 * exact + 4 * asked + difference
        now = [*model.first.seen]
        assert all(torch.equal(weight, now[0]) for weight in now) and not torch.equal(now[0], saw[0])

        late = model(x)
        _touch(model, 0.1, seed=1)
        with pytest.raises(RuntimeError, match=r"weights of (first|second) have changed since the latest forward pass"):
            late.backward()
        stats = state.stats()
        assert stats.bytes_sent == sr.metrics.bytes_sent()
        # Each pass gathers each unit once more in backward, of which that of the last has failed.
        assert stats.weights.uncompressed_bytes == stats.weights.calls * exact // 2


def test_weights_travel_once_for_each_change() -> None:
    run(_once_for_each_change, 2, backend=BACKEND)


def _frozen(rank: int, world: int) -> None:
    packet = sr.IntQuant(8).packet_nbytes(64 // world)
    model = shard_each(Two(False, None))
    state = sr.fsdp.compress(model, None, "int8", differences=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sent = []
    for _ in range(3):
        model(torch.ones(64)).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent.append(state.stats().weights.bytes_sent)
    travelled = [after - before for before, after in pairwise(sent)]
    # The frozen unit has reduced nothing, so the ranks ask.
    assert travelled == 2 * [(world - 1) * packet + ring_bytes(4, world)]


def _noticed(rank: int, world: int) -> None:
    # An optimizer's step after a pass that has seen the gradients reduced, in every way that torch has to take one.
    # Some leave no trace in the versions of DTensors.
    ways: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}]
    for options in ways:
        model = shard_each(Two(True, None))
        sr.fsdp.compress(model, None, "int8", differences=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        model(torch.ones(64)).backward()
        with torch.no_grad():
            model(torch.ones(64))
        before = model.first.seen[-1]
        optimizer.step()
        model(torch.ones(64))
        # AdamW's first step moves each weight by the learning rate, or nearly.
        assert (model.first.seen[-1] - before).abs().min() > 0.05, options


def test_every_change_is_noticed() -> None:
    run(_noticed, 2)


def test_what_is_frozen_travels_once() -> None:
    run(_frozen, 2)


def _out_of_turn(rank: int, world: int) -> None:
    # Frozen weights that are loaded after a first pass, and weights that were not finite.
    model = fully_shard(Given([(40, 8)]))
    model.requires_grad_(False)
    state = sr.fsdp.compress(model, None, "int4", differences=True)
    _seen(model)
    _touch(model, 100.0)
    assert equal(_seen(model), _whole(model))
    model.requires_grad_(True)
    for value in (torch.nan, 1.0):
        model([torch.zeros(40, 8)]).backward()
        with torch.no_grad():
            model.weights[0].to_local()[0] = value
        assert not _seen(model)[0].isfinite().all()  # which a difference does not mend
    state.adopt_weights()
    assert equal(_seen(model), _whole(model))


def test_weights_that_change_out_of_turn_are_gathered_exactly() -> None:
    run(_out_of_turn, 2)


# ---- state ----------------------------------------------------------------------------------------------------------


def _make(policy: str = "bf16") -> tuple[Any, torch.optim.Optimizer, sr.fsdp.State]:
    model = sharded(policy=policy)
    state = sr.fsdp.compress(model, "int4-hadamard", "int4", differences=True)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), state


def _train(made: tuple[Any, torch.optim.Optimizer, sr.fsdp.State], rank: int, steps: range) -> None:
    model, optimizer, _ = made
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def _load(made: tuple[Any, torch.optim.Optimizer, sr.fsdp.State], path: str) -> None:
    model, _, state = made
    header = {"compression": {"ranks": torch.zeros(2, dtype=torch.int64)}}
    dcp.load(header, checkpoint_id=path)
    whole = {
        "model": dict(model.named_parameters()),
        "compression": state.sharded_state_dict(header["compression"]["ranks"]),
    }
    dcp.load(whole, checkpoint_id=path)
    state.load_sharded_state_dict(whole["compression"])


def _referred(model: Any) -> list[Tensor]:
    """The weights that all ranks have: as no shard has changed, a pass is given these."""
    seen = [weight for module in [*model.blocks, model] for weight in _seen(module)]
    return [weight for weight in seen if not isinstance(weight, DTensor)]  # a module's own


def _save(rank: int, world: int, folder: str) -> list[Tensor]:
    unbroken = _make()
    _train(unbroken, rank, range(3))
    model, _, state = unbroken
    own = shards(model), copy.deepcopy(state.state_dict())
    dcp.save(
        {"model": dict(model.named_parameters()), "compression": state.sharded_state_dict()},
        checkpoint_id=f"{folder}/changed",
    )
    whole = {
        slot.name: slot.sharded(each.stored()[slot.name]).full_tensor()
        for each in state._references.values()
        for slot in each.bucket.slots
    }
    if rank == 0:
        torch.save(whole, f"{folder}/references.pt")
    _train(unbroken, rank, range(3, 5))
    after = shards(model)
    # In either form the run goes on bit for bit, and without the state it does not.
    for form in ("all", "own", "none"):
        again = _make()
        if form == "all":
            _load(again, f"{folder}/changed")
        else:
            for parameter, shard in zip(again[0].parameters(), own[0], strict=True):
                parameter.data.to_local().copy_(shard)
        if form == "own":
            again[2].load_state_dict(own[1])
        _train(again, rank, range(3, 5))
        assert equal(shards(again[0]), after) == (form != "none"), form
    # Saved where no shard has changed since the last pass, which the next one is to see again.
    referred = _referred(model)
    dcp.save(
        {"model": dict(model.named_parameters()), "compression": state.sharded_state_dict()},
        checkpoint_id=f"{folder}/current",
    )
    return referred


def _resume(rank: int, world: int, folder: str) -> list[Tensor]:
    made = _make()
    _load(made, f"{folder}/current")
    referred = _referred(made[0])
    # What travels next is the difference from what was saved: the references are the same, whoever has which part.
    changed = _make()
    _load(changed, f"{folder}/changed")
    saved = torch.load(f"{folder}/references.pt")
    for bucket in changed[2]._references.values():
        for slot in bucket.bucket.slots:
            own = slot.split(saved[slot.name], world)[rank]
            assert torch.equal(slot.shard(own), bucket.stored()[slot.name]), slot.name
    _train(changed, rank, range(3, 4))
    return referred


@pytest.mark.parametrize(("saved", "resumed"), [(2, (2, 3)), (4, (2, 3))])
def test_from_one_number_of_ranks_to_another(saved: int, resumed: tuple[int, ...], tmp_path: Path) -> None:
    # torch caches where DTensors lie by the mesh, without the rank: no process may be another rank later.
    before = run(_save, saved, str(tmp_path), keep=False, timeout=120)
    for world in resumed:
        for referred in run(_resume, world, str(tmp_path), keep=False, timeout=120):
            assert equal(referred, before[0])


def _refused(rank: int, world: int) -> None:
    made = _make()
    _train(made, rank, range(1))
    state = made[2]
    own = state.state_dict()
    name = next(iter(own["references"]))
    for wrong, match in (
        ({**own, "references": {}}, "other weights that all ranks have"),
        ({**own, "differences": {}}, "other modules whose differences travel"),
        ({**own, "references": {**own["references"], name: torch.zeros(1)}}, "this rank's must be of shape"),
    ):
        with pytest.raises(ValueError, match=match):
            state.load_state_dict(wrong)
    # What is wrong on one rank is so on all, and nothing has changed.
    before = state.state_dict()
    for wrong, match in (
        ({**own, "differences": {**own["differences"], "": ["1", 0, True]}}, "differences of"),
        ({**own, "steps": {**own["steps"], "": [-1, 0]}}, "must not be negative"),
        ({**own, "format": 1}, "format 2"),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=match):
            state.load_state_dict(wrong if rank else own)
        assert state.state_dict()["steps"] == before["steps"]
    sent = {name: [number + rank, *rest] for name, (number, *rest) in own["differences"].items()}
    with pytest.raises(RuntimeError, match="do not agree"):
        state.load_state_dict({**own, "differences": sent})
    _train(made, rank, range(1, 2))
    direct = sr.fsdp.compress(sharded(policy="bf16"), "int4-hadamard", "int4")
    with pytest.raises(ValueError, match="other modules whose differences travel"):
        direct.load_state_dict(own)


def test_states_of_others_are_refused() -> None:
    run(_refused, 2)


def _alone(rank: int, world: int) -> None:
    made = _make()
    _train(made, rank, range(2))
    state = made[2]
    state.load_state_dict(state.state_dict())
    state.load_sharded_state_dict(state.sharded_state_dict())
    _train(made, rank, range(2, 3))
    assert state.stats().kept_nbytes == state.stats().weights.calls == 0


def test_one_rank_keeps_nothing() -> None:
    run(_alone, 1)
