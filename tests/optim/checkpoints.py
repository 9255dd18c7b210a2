"""Optimizers whose state crosses from some ranks to others through a checkpoint, and goes on there to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from optim.sharded_parameters import full, gradient
from ranks import run
from smallreduce.ragged import RaggedTensor

__all__ = ["Contents", "Make", "check_crossing", "contents", "same", "step"]

Make = Callable[[Any], tuple[nn.Module, Optimizer]]
"""Of a kind of sharding: a model, the same on all ranks, and the optimizer of some of its parameters."""

Contents = dict[str, Tensor]


def step(optimizer: Optimizer, steps: range) -> None:
    """Steps with gradients that are functions of their numbers."""
    for number in steps:
        for index, p in enumerate(optimizer.param_groups[0]["params"]):
            whole = gradient(number, index, p.shape, p.dtype)
            p.grad = RaggedTensor.distribute(whole, p.placement) if isinstance(p, RaggedTensor) else whole
        optimizer.step()


def contents(model: nn.Module, optimizer: Optimizer) -> Contents:
    """Copies of the whole parameters, and of the whole tensors of their states."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = full(p).clone()
        found |= {f"{name}.{key}": full(value).clone() for key, value in optimizer.state.get(p, {}).items()}
    return found


def same(one: Contents, other: Contents) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def check_crossing(make: Make, source: Any, saved_on: int, target: Any, loaded_on: int, folder: Path) -> None:
    """That what ``loaded_on`` ranks load is what ``saved_on`` have saved, and that both go on alike.

    Args:
        make: A function of a module.
        source, target: Kinds of sharding.
    """
    saved = run(_saves, saved_on, make, source, str(folder), timeout=120)
    loaded = run(_loads, loaded_on, make, target, str(folder), timeout=120)
    for of_rank in (*saved, *loaded):
        assert all(same(one, other) for one, other in zip(of_rank, saved[0], strict=True))
    assert not same(*saved[0])


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _goes_on(model: nn.Module, optimizer: Optimizer) -> tuple[Contents, Contents]:
    """What there is, and what there is some steps later."""
    now = contents(model, optimizer)
    step(optimizer, range(4, 6))
    return now, contents(model, optimizer)


def _saves(rank: int, world: int, make: Make, kind: Any, folder: str) -> tuple[Contents, Contents]:
    model, optimizer = make(kind)
    step(optimizer, range(1, 4))
    dcp.save(_state(model, optimizer), checkpoint_id=folder)
    return _goes_on(model, optimizer)


def _loads(rank: int, world: int, make: Make, kind: Any, folder: str) -> tuple[Contents, Contents]:
    model, optimizer = make(kind)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return _goes_on(model, optimizer)
