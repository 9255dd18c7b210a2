"""Muon's state, saved and loaded on other ranks; and training of a model that is fully sharded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smallreduce as sr
from fsdp.training import Model, loss_of
from optim.checkpoints import check_crossing
from optim.sharded_parameters import gradient
from ragged.sharding import full_gradients, full_parameters, ragged
from ranks import run

OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.25, "momentum": 0.75}


def _hidden(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]


# ---- training --------------------------------------------------------------------------------------------------------


def _trains(rank: int, world: int, granularity: Any) -> None:
    """Beside a copy in one process, which is given the same gradients."""
    model = ragged(granularity=granularity)
    torch.manual_seed(0)
    copied = Model()
    optimizer, reference = sr.optim.Muon(_hidden(model), **OPTIONS), torch.optim.Muon(_hidden(copied), **OPTIONS)
    of_others = [
        # Products with powers of two are exact, wherever a vector was cut.
        torch.optim.SGD([p for name, p in m.named_parameters() if name not in dict(_hidden(m))], lr=2.0**-4)
        for m in (model, copied)
    ]
    before = full_parameters(model)
    for step in range(6):
        for one in (optimizer, reference, *of_others):
            one.zero_grad()
        loss_of(model, rank, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        gradients = full_gradients(model)
        for name, p in copied.named_parameters():
            p.grad = gradients[name]
        for one in (optimizer, reference, *of_others):
            one.step()
        after = full_parameters(model)
        for name, p in copied.named_parameters():
            assert torch.equal(after[name], p), (step, name)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    stats = optimizer.stats()
    assert stats.matrices == 4
    assert (stats.moved_matrices > 0) == (granularity != "matrix" and world == 3)  # two halves happen to cut none


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("granularity", ["group", "rows", 3, "matrix"])
def test_a_sharded_model_trains_as_an_unsharded_one(world: int, granularity: Any) -> None:
    run(_trains, world, granularity, timeout=120)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _made(kind: Any) -> tuple[nn.Module, sr.optim.Muon]:
    """A model, sharded at a granularity or plain."""
    if kind == "plain":
        torch.manual_seed(0)
        model: nn.Module = Model()
    else:
        model = ragged(granularity=kind)
    return model, sr.optim.Muon(_hidden(model), **OPTIONS)


@pytest.mark.parametrize(
    ("source", "saved_on", "target", "loaded_on"),
    [
        ("rows", 4, "matrix", 3),
        ("rows", 4, "group", 2),
        ("rows", 4, "plain", 1),
        ("matrix", 2, "rows", 1),
        ("plain", 1, "rows", 4),
    ],
)
def test_checkpoints_cross(source: str, saved_on: int, target: str, loaded_on: int, tmp_path: Path) -> None:
    check_crossing(_made, source, saved_on, target, loaded_on, tmp_path)


def test_state_is_that_of_torch() -> None:
    """And goes from one to the other, and back."""
    weights = [nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
    ours, theirs, again = sr.optim.Muon(weights[:1]), torch.optim.Muon(weights[1:2]), sr.optim.Muon(weights[2:])
    weights[0].grad = gradient(1, 0, (6, 4))
    ours.step()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for weight, optimizer in zip(weights[1:], (theirs, again), strict=True):
        with torch.no_grad():
            weight.copy_(weights[0])
        weight.grad = gradient(2, 0, (6, 4))
        optimizer.step()
    assert torch.equal(weights[1], weights[2])
    weights[0].grad = gradient(2, 0, (6, 4))
    ours.step()
    assert torch.equal(weights[1], weights[0])


def test_a_copy_goes_on_by_itself() -> None:
    weight = nn.Parameter(gradient(0, 0, (6, 4)))
    optimizer = sr.optim.Muon([weight], lr=0.1)
    weight.grad = gradient(1, 0, (6, 4))
    optimizer.step()
    other = copy.deepcopy(optimizer)
    (copied,) = other.param_groups[0]["params"]
    for one, p in ((optimizer, weight), (other, copied)):
        p.grad = gradient(2, 0, (6, 4))
        one.step()
    assert copied is not weight
    assert torch.equal(copied, weight)
    assert other.stats().steps == 1
