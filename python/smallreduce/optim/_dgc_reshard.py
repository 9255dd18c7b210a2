"""The states of DGC on W ranks as those of W' ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smallreduce._layout import BLOCK
from smallreduce.codecs import as_int

__all__ = ["reshard"]


def reshard(state_dicts: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """See :meth:`smallreduce.optim.DGC.reshard`."""
    world_size = as_int(world_size, "world_size")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    states = _in_order(state_dicts)
    olds = [state["compression"] for state in states]
    parameters = {name: [old["parameters"][name] for old in olds] for name in olds[0]["parameters"]}
    common = {key: value for key, value in states[0].items() if key != "compression"}
    return [
        {
            **copy.deepcopy(common),
            "compression": {
                **olds[0],
                "rank": rank,
                "world_size": world_size,
                "parameters": {name: _of_rank(saved, rank, world_size) for name, saved in parameters.items()},
            },
        }
        for rank in range(world_size)
    ]


def _in_order(state_dicts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The states by rank, all ranks of one run.

    Raises:
        TypeError, ValueError: They are not.
    """
    if not isinstance(state_dicts, Sequence) or not all(isinstance(state, Mapping) for state in state_dicts):
        raise TypeError(f"state_dicts must be a sequence of dicts, got {type(state_dicts).__name__}")
    if not state_dicts or not all("compression" in state for state in state_dicts):
        raise ValueError(f"reshard takes the states of smallreduce.optim.DGC on all ranks, got {len(state_dicts)}")
    states = sorted(state_dicts, key=lambda state: int(state["compression"]["rank"]))
    given = [(state["compression"]["rank"], state["compression"]["world_size"]) for state in states]
    if given != [(rank, len(states)) for rank in range(len(states))]:
        raise ValueError(f"reshard takes the states of all ranks, got those of {', '.join(map(_rank_of, given))}")
    for key in ("format", "step", "seed", "loss_scale"):
        values = {state["compression"][key] for state in states}
        if len(values) > 1:
            raise ValueError(f"the states must be of one step of one run, got {key} {sorted(values)}")
    names = [sorted(state["compression"]["parameters"]) for state in states]
    if names.count(names[0]) != len(names):
        raise ValueError("the states must be of one model, but they are of parameters of different names")
    return states


def _rank_of(given: tuple[int, int]) -> str:
    return f"{given[0]} of {given[1]}"


def _of_rank(saved: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """One parameter's state on a new rank."""
    server = torch.zeros(BLOCK * -(-saved[0]["numel"] // BLOCK), dtype=torch.float64)
    for old in saved:
        for (_, begin, end), values in zip(old["shards"], old["server"], strict=True):
            if values is not None:
                server[BLOCK * begin : BLOCK * end] = values.cpu()
    velocity = _overlapped([old["worker"] for old in saved], rank, world_size) + server[: saved[0]["numel"]]
    momentum = _overlapped([old["momentum"] for old in saved], rank, world_size)
    return {
        "codec": saved[0]["codec"],
        "numel": saved[0]["numel"],
        "worker": velocity.float(),
        "shards": [],
        "server": [],
        "momentum": momentum.float(),
    }


def _overlapped(values: Sequence[Tensor], rank: int, world_size: int) -> Tensor:
    """The mean of the old ranks' values, weighted by how far the new rank overlaps theirs; fp64.

    On a line of length W * W' an old rank is W' long and a new one W.
    """
    old_size = len(values)
    mean = torch.zeros(values[0].shape, dtype=torch.float64)
    for old_rank, value in enumerate(values):
        begin = max(old_rank * world_size, rank * old_size)
        end = min((old_rank + 1) * world_size, (rank + 1) * old_size)
        if begin < end:
            mean += value.cpu().double() * ((end - begin) / old_size)
    return mean
