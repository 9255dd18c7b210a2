"""The state of SDP4Bit: of one rank, and of all through torch.distributed.checkpoint to another number of ranks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import smallreduce as sr
from ddp.training import equal, same_on_all_ranks
from optim.sdp4bit_training import EXACT, Case, net, sdp4bit, train
from ranks import run
from smallreduce._flat_shard import FlatShard

FRESH = ("format", "seed", "compressed", "strides", "master", "param_groups")
HADAMARD = {"weights": "int4-hadamard"}  # whose gaps would not stay zero by themselves

CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "adamw, bf16": (Case(dtype=torch.bfloat16, groups=True), {"node_size": 1}),
    "sgd": (Case(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), {"node_size": 1, "start_step": 1, **HADAMARD}),
    "adagrad, exact": (Case(torch.optim.Adagrad, {"lr": 0.01}), EXACT),
    "exact bf16": (Case(dtype=torch.bfloat16), {**EXACT, "master_dtype": None}),
}


def _made(name: str, seed: int = 0) -> tuple[Case, nn.Module, sr.optim.SDP4Bit]:
    case, options = CASES[name]
    model = net(case.dtype, seed=seed)
    return case, model, sdp4bit(case, model, **options)


def _advance(case: Case, model: nn.Module, optimizer: sr.optim.SDP4Bit, rank: int, steps: range) -> list[Tensor]:
    losses = train(case, model, optimizer, rank, steps, optimizer.clip_grad_norm_, optimizer.no_sync)
    optimizer.synchronize()
    return losses


# ---- one rank -------------------------------------------------------------------------------------------------------


def _resumes(rank: int, world: int) -> None:
    for name in CASES:
        for model_first in (True, False):
            case, model, optimizer = _made(name)
            _advance(case, model, optimizer, rank, range(3))
            states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            given = copy.deepcopy(states)
            losses = _advance(case, model, optimizer, rank, range(3, 6))
            _, other, resumed = _made(name, seed=1)
            if model_first:
                other.load_state_dict(states[0])
            resumed.load_state_dict(states[1])
            if not model_first:
                other.load_state_dict(states[0])
            assert equal(_advance(case, other, resumed, rank, range(3, 6)), losses), name
            assert equal(list(other.parameters()), list(model.parameters())), name
            before, after = optimizer.state_dict(), resumed.state_dict()
            assert equal(before["sdp4bit"].pop("master"), after["sdp4bit"].pop("master"))
            assert before["sdp4bit"] == after["sdp4bit"]
            # Loading shares no memory with what was loaded.
            assert equal(states[1]["sdp4bit"]["master"], given[1]["sdp4bit"]["master"])
            for key, values in given[1]["state"].items():
                for name_of, value in values.items():
                    assert torch.equal(torch.as_tensor(states[1]["state"][key][name_of]), torch.as_tensor(value))


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_goes_on_bit_for_bit(world: int) -> None:
    run(_resumes, world)


def _refuses(rank: int, world: int) -> None:
    case, model, optimizer = _made("adamw, bf16")
    _advance(case, model, optimizer, rank, range(2))
    state = optimizer.state_dict()
    own = state["sdp4bit"]
    for wrong, message in (
        ({**state, "sdp4bit": {**own, "rank": 1 - rank}}, "belongs to rank"),
        ({**state, "sdp4bit": {**own, "world_size": 3}}, r"checkpoint\(\) is for another number"),
        ({**state, "sdp4bit": {**own, "layout": "0"}}, "other parameters, shapes or buckets"),
        ({**state, "sdp4bit": {**own, "seed": 3}}, "seed 3, not 0"),
        ({**state, "sdp4bit": {**own, "master": []}}, "master must be"),
        (torch.optim.SGD(model.parameters(), lr=1.0).state_dict(), "not a state of smallreduce.optim.SDP4Bit"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
    with pytest.raises(TypeError, match="a state is a dict"):
        optimizer.load_state_dict(None)  # type: ignore[arg-type]
    # One rank's is an error on both.
    with pytest.raises((ValueError, RuntimeError), match="belongs to rank"):
        optimizer.load_state_dict({**state, "sdp4bit": {**own, "rank": 1}})
    with pytest.raises(RuntimeError, match="steps"):
        optimizer.load_state_dict({**state, "sdp4bit": {**own, "steps": rank}})
    short = [{**group, "params": group["params"][:-1]} for group in state["param_groups"]]
    with pytest.raises((ValueError, RuntimeError), match="slices on this rank"):
        optimizer.load_state_dict({**state, "param_groups": short} if rank else state)
    # Checkpoints, too, are the same on all ranks, or nothing is loaded.
    state = optimizer.checkpoint()
    for wrong in ({"steps": 2 + rank}, {"passes": 5 + rank}):
        with pytest.raises(RuntimeError, match="do not agree"):
            optimizer.load_checkpoint({**state, **wrong})
    for wrong, message in (({"seed": 1}, "seed 1, not 0"), ({"steps": 0.5}, "steps"), ({"master": {}}, "lacks")):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            optimizer.load_checkpoint({**state, **wrong} if rank else state)
    for wrong, kind in (({}, ValueError), (3, TypeError), ({**optimizer.checkpoint(), "param_groups": ()}, ValueError)):
        with pytest.raises(kind, match="checkpoint"):
            optimizer.load_checkpoint(wrong)  # type: ignore[arg-type]
    # The order of elements in memory is that of the model that was saved.
    other = net(torch.bfloat16)
    other.convolution.to(memory_format=torch.contiguous_format)
    contiguous = sdp4bit(case, other, node_size=1)
    with pytest.raises(ValueError, match=r"convolution.weight lie in memory with strides .*memory format"):
        contiguous.load_checkpoint(state)
    _advance(case, model, optimizer, rank, range(2, 4))
    assert same_on_all_ranks(list(model.parameters()))
    # Of compressed weights the master is another than the weights, for which there must be room.
    model, other = net(), net()
    optimizer, exact = sdp4bit(Case(), model, node_size=1), sdp4bit(Case(), other, **EXACT)
    _advance(Case(), model, optimizer, rank, range(1))
    # Where the master is a part of the weights, it is saved without the rest.
    assert all(m.untyped_storage().nbytes() == m.nbytes for m in exact.state_dict()["sdp4bit"]["master"])
    weights = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(ValueError, match="of compressed weights"):
        exact.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="of compressed weights"):
        exact.load_checkpoint(optimizer.checkpoint())
    assert equal(list(other.parameters()), weights)
    # A checkpoint of no steps leaves nothing of those that were done.
    fresh = {key: optimizer.checkpoint()[key] for key in FRESH}
    optimizer.load_checkpoint({**fresh, "steps": 0, "passes": 0, "state": {}})
    assert not optimizer.state
    assert optimizer._steps == 0


def test_a_state_that_does_not_fit_is_refused() -> None:
    run(_refuses, 2)


def _adopts(rank: int, world: int) -> None:
    # A model loaded or changed without the optimizer is what training goes on from.
    for name in ("adamw, bf16", "sgd"):
        case, start, fresh = _made(name, seed=3)
        saved = copy.deepcopy(start.state_dict())
        expected = _advance(case, start, fresh, rank, range(1))
        _, model, optimizer = _made(name)
        model.load_state_dict(saved)
        assert equal(_advance(case, model, optimizer, rank, range(1)), expected)
        assert equal(list(model.parameters()), list(start.parameters()))
        _, model, optimizer = _made(name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(saved[key])
        optimizer.adopt_weights()
        _advance(case, model, optimizer, rank, range(1))
        assert equal(list(model.parameters()), list(start.parameters()))


def test_weights_that_were_loaded_become_the_masters() -> None:
    run(_adopts, 2)


# ---- all ranks ------------------------------------------------------------------------------------------------------


def _held(optimizer: sr.optim.SDP4Bit) -> tuple[dict[str, tuple[int, Tensor]], dict[str, Any]]:
    """The ranges that this rank holds, by name; and what it has of each parameter as a whole."""
    ranges: dict[str, tuple[int, Tensor]] = {}
    others: dict[str, Any] = {}
    state = optimizer.checkpoint()
    for name, shard in state["master"].items():
        ranges[f"{name}: master"] = (shard.offset, shard.local.clone())
        for key, value in state["state"][name].items():
            if isinstance(value, FlatShard):
                ranges[f"{name}: {key}"] = (value.offset, value.local.clone())
            else:
                others[f"{name}: {key}"] = float(value)
    others["groups"] = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    others["progress"] = (state["steps"], state["passes"])
    return ranges, others


def _whole(of_ranks: list[tuple[dict[str, tuple[int, Tensor]], dict[str, Any]]]) -> tuple[dict[str, Tensor], dict]:
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    others: dict[str, Any] = {}
    for ranges, scalars in of_ranks:
        for name, piece in ranges.items():
            pieces.setdefault(name, []).append(piece)
        for name, value in scalars.items():
            assert others.setdefault(name, value) == value
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        ends = [0]
        for offset, values in parts:
            assert offset == ends[-1], name
            ends.append(offset + values.numel())
        whole[name] = torch.cat([values for _, values in parts])
    return whole, others


def _quietly(function: Any, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its storage
        function(*args, **kwargs)


def _save(rank: int, world: int, folder: str, steps: int) -> list[Any]:
    results = []
    for number, name in enumerate(CASES):
        case, model, optimizer = _made(name)
        _advance(case, model, optimizer, rank, range(steps))
        state = {"model": model.state_dict(), "optimizer": optimizer.checkpoint()}
        _quietly(dcp.save, state, checkpoint_id=f"{folder}/{number}")
        held = _held(optimizer)
        losses = _advance(case, model, optimizer, rank, range(steps, steps + 3))
        results.append((held, losses, [p.detach() for p in model.parameters()]))
    return results


def _load(rank: int, world: int, folder: str, steps: int) -> list[Any]:
    results = []
    for number, name in enumerate(CASES):
        case, model, optimizer = _made(name, seed=1)
        # The initial options are not those that were saved.
        for group in optimizer.param_groups:
            group["lr"] = 123.0
        state = {"model": model.state_dict(), "optimizer": optimizer.checkpoint()}
        _quietly(dcp.load, state, checkpoint_id=f"{folder}/{number}")
        model.load_state_dict(state["model"])
        optimizer.load_checkpoint(state["optimizer"])
        assert same_on_all_ranks(list(model.parameters()))
        held = _held(optimizer)
        losses = _advance(case, model, optimizer, rank, range(steps, steps + 3))
        assert same_on_all_ranks(list(model.parameters()))
        results.append((held, losses, [p.detach() for p in model.parameters()]))
    return results


@pytest.mark.parametrize(("steps", "saved_on", "loaded_on"), [(3, 4, (4, 2, 3)), (2, 2, (4, 1)), (0, 2, (2, 3))])
def test_checkpoints_go_to_any_number_of_ranks(
    tmp_path: Path, steps: int, saved_on: int, loaded_on: tuple[int, ...]
) -> None:
    saved = run(_save, saved_on, str(tmp_path), steps)
    for world in loaded_on:
        loaded = run(_load, world, str(tmp_path), steps)
        for number, name in enumerate(CASES):
            before, others_before = _whole([of_rank[number][0] for of_rank in saved])
            after, others_after = _whole([of_rank[number][0] for of_rank in loaded])
            assert before.keys() == after.keys(), name
            assert all(torch.equal(before[key], after[key]) for key in before), name
            assert others_before == others_after, name
            if world == saved_on:
                for of_saved, of_loaded in zip(saved, loaded, strict=True):
                    assert equal(of_saved[number][1], of_loaded[number][1]), name
                    assert equal(of_saved[number][2], of_loaded[number][2]), name


def test_a_flat_shard_is_a_range() -> None:
    shard = FlatShard(torch.arange(3.0), 4, 9)
    assert shard.size() == (9,)
    assert repr(shard) == "FlatShard(4 to 7 of 9, torch.float32)"
    with pytest.raises(TypeError, match=r"for torch\.distributed\.checkpoint only"):
        torch.neg(shard)
    with pytest.raises(ValueError, match="not a range"):
        FlatShard(torch.zeros(3), 7, 9)
    with pytest.raises(ValueError, match="1-D"):
        FlatShard(torch.zeros(2, 2), 0, 9)
