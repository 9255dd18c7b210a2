"""Checkpoints of training: from any number of ragged ranks to any other, to FSDP2, to one process, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import smallreduce as sr
from fsdp.training import Model, loss_of, sharded
from ragged.sharding import full, full_parameters, ragged
from ranks import run

Saved = dict[str, Tensor]


def _make(kind: str) -> nn.Module:
    """A model of other weights than those that are loaded into it."""
    if kind == "ragged":
        return ragged(7, granularity="rows")
    if kind == "matrices":
        return ragged(7, granularity="matrix", policy="bf16")
    if kind == "fsdp2":
        return sharded(7)
    torch.manual_seed(7)
    return Model()


def _contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> Saved:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = full_parameters(model)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            found[f"{names[id(parameter)]}.{key}"] = full(value)
    return found


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def _save(rank: int, world: int, kind: str, folder: str) -> Saved:
    model = _make(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()
    dcp.save(_state(model, optimizer), checkpoint_id=folder)
    return _contents(model, optimizer)


def _load(rank: int, world: int, kind: str, folder: str) -> Saved:
    model = _make(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    found = _contents(model, optimizer)
    optimizer.zero_grad()
    loss_of(model, rank, 9).backward()  # and it goes on from there
    optimizer.step()
    assert not torch.equal(_contents(model, optimizer)["embed.weight"], found["embed.weight"])
    return found


def _equal(one: Saved, other: Saved) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("source", "saved_on", "target", "loaded_on"),
    [
        ("ragged", 4, "ragged", 4),
        ("ragged", 4, "ragged", 2),
        ("ragged", 4, "matrices", 3),
        ("ragged", 4, "ragged", 1),
        ("ragged", 4, "fsdp2", 2),
        ("ragged", 4, "plain", 1),
        ("matrices", 3, "fsdp2", 4),
        ("fsdp2", 2, "ragged", 4),
        ("fsdp2", 4, "matrices", 3),
        ("plain", 1, "ragged", 4),
    ],
)
def test_checkpoints_cross(source: str, saved_on: int, target: str, loaded_on: int, tmp_path: Path) -> None:
    # DTensor remembers groups that are gone, so its processes are not used again.
    keep = "fsdp2" not in (source, target)
    saved = run(_save, saved_on, source, str(tmp_path), timeout=120, keep=keep)
    loaded = run(_load, loaded_on, target, str(tmp_path), timeout=120, keep=keep)
    assert any(key.endswith("exp_avg_sq") for key in saved[0])
    assert all(_equal(found, saved[0]) for found in (*saved, *loaded))


def _replicated(rank: int, world: int, folder: str) -> None:
    """Replicas hold the same: each part is saved once, and loaded by all."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    model, other = (sr.ragged.fully_shard(nn.Linear(256, 256), granularity="rows", mesh=mesh) for _ in range(2))
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    dcp.load({"model": other.state_dict()}, checkpoint_id=folder)
    assert _equal(full_parameters(other), full_parameters(model))
    nbytes = sum(path.stat().st_size for path in Path(folder).glob("*.distcp"))
    weights = 4 * (256 * 256 + 256)
    assert weights < nbytes < 1.5 * weights


def test_replicas_are_saved_once(tmp_path: Path) -> None:
    run(_replicated, 4, str(tmp_path), timeout=120)
