"""BlockAdam8bit's state: kept to the bit, by state dicts and by checkpoints on any number of ranks."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import smallreduce as sr
from optim.checkpoints import check_crossing, contents, same, step
from ranks import run
from smallreduce.ragged import RaggedShard, RaggedTensor

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.75, 0.9)}
NAMES = ("step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(100, 70)
        self.second = nn.Conv2d(5, 90, 3)
        self.scale = nn.Parameter(torch.ones(600))


def _made(kind: str) -> tuple[nn.Module, sr.optim.BlockAdam8bit]:
    model = _Model()
    if kind != "plain":
        of_matrices = kind == "matrix"
        sr.ragged.fully_shard(
            model,
            granularity=lambda name, p: (
                "matrix" if of_matrices and p.dim() == 2 else sr.optim.BlockAdam8bit.granularity(name, p)
            ),
        )
    return model, sr.optim.BlockAdam8bit(model.named_parameters(), **OPTIONS)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "saved_on", "target", "loaded_on"),
    [
        ("rows", 4, "rows", 2),
        ("rows", 4, "matrix", 3),
        ("rows", 4, "rows", 1),
        ("rows", 4, "plain", 1),
        ("plain", 1, "rows", 4),
    ],
)
def test_checkpoints_cross(source: str, saved_on: int, target: str, loaded_on: int, tmp_path: Path) -> None:
    check_crossing(_made, source, saved_on, target, loaded_on, tmp_path)
    entries = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    dtypes = {
        name.rsplit(".", 1)[1]: entry.properties.dtype
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert [dtypes[name] for name in NAMES[1:]] == [torch.int8, torch.float32, torch.uint8, torch.float32]


# ---- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    model, optimizer = _made("plain")
    model.to(dtype)
    step(optimizer, range(1, 4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    step(optimizer, range(4, 6))
    for _ in range(2):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, again = _made("plain")
        other.to(dtype).load_state_dict(saved["model"])
        again.load_state_dict(saved["optimizer"])
        step(again, range(4, 6))
        assert same(contents(other, again), contents(model, optimizer))


def test_loading_copies() -> None:
    _, optimizer = _made("plain")
    step(optimizer, range(1, 4))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    _, again = _made("plain")
    again.load_state_dict(saved)
    step(again, range(4, 6))
    for number, state in before.items():
        assert all(torch.equal(saved["state"][number][name], state[name]) for name in NAMES)


def test_hooks_see_and_may_change_what_is_loaded() -> None:
    _, optimizer = _made("plain")
    step(optimizer, range(1, 4))
    _, again = _made("plain")
    seen: list[Any] = []

    def before(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(state_dict["state"][0]["exp_avg"].dtype)
        doubled = {**state_dict["state"][0], "step": 2 * state_dict["state"][0]["step"]}
        return {**state_dict, "state": {**state_dict["state"], 0: doubled}}

    again.register_load_state_dict_pre_hook(before)
    again.register_load_state_dict_post_hook(lambda one: seen.append(copy.deepcopy(one.state_dict()["state"])))
    again.load_state_dict(optimizer.state_dict())
    expected = optimizer.state_dict()["state"]
    expected[0]["step"] = 2 * expected[0]["step"]
    assert seen[0] == torch.int8
    for found in (seen[1], again.state_dict()["state"]):
        assert found.keys() == expected.keys()
        for number, state in expected.items():
            assert all(
                (found[number][name].dtype, found[number][name].tolist()) == (value.dtype, value.tolist())
                for name, value in state.items()
            )


def test_a_copy_goes_on_by_itself() -> None:
    model, optimizer = _made("plain")
    step(optimizer, range(1, 4))
    other, again = copy.deepcopy((model, optimizer))
    for one in (optimizer, again):
        step(one, range(4, 6))
    assert same(contents(other, again), contents(model, optimizer))
    assert again.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]


def _altered(name: str, value: Any) -> dict[str, Any]:
    _, optimizer = _made("plain")
    step(optimizer, range(1, 3))
    state = copy.deepcopy(optimizer.state_dict())
    if value is None:
        del state["state"][1][name]
    else:
        state["state"][1][name] = value
    return state


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "exp_avg",
            torch.zeros(70, 100),
            r"exp_avg of first\.weight must be of torch\.int8 and shape \(70, 100\), got",
        ),
        ("exp_avg_sq", torch.zeros(70, 99, dtype=torch.uint8), r"exp_avg_sq of .* got torch\.uint8 and \(70, 99\)"),
        ("exp_avg_scale", torch.zeros(3, 3), r"exp_avg_scale of .* shape \(3, 4\), got torch\.float32 and \(3, 3\)"),
        ("exp_avg_sq_scale", None, r"the state of first\.weight must have exp_avg, .*, step, got exp_avg"),
        ("exp_avg_sq_scale", 3, "exp_avg_sq_scale of .* got int"),
        ("step", 3, "step of .* must be a tensor without dimensions, got int"),
        ("step", torch.ones(2), r"step of .* must be a tensor without dimensions, got torch.float32 and \(2,\)"),
    ],
)
def test_other_states_are_refused(name: str, value: Any, message: str) -> None:
    model, optimizer = _made("plain")
    step(optimizer, range(1, 3))
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(_altered(name, value))
    assert same(contents(model, optimizer), before)


def test_a_parameter_without_a_state_begins_anew() -> None:
    _, optimizer = _made("plain")
    step(optimizer, range(1, 3))
    state = optimizer.state_dict()
    state["state"] = {**state["state"], 1: {}}
    optimizer.load_state_dict(state)
    step(optimizer, range(3, 4))
    assert state["state"][1] == {}
    assert [int(optimizer.state[p]["step"]) for p in optimizer.param_groups[0]["params"][:3]] == [3, 1, 3]


def test_the_state_of_adamw_is_refused() -> None:
    model, optimizer = _made("plain")
    other = torch.optim.AdamW(model.named_parameters())
    model.scale.grad = torch.ones(600)
    other.step()
    with pytest.raises(ValueError, match="not a state of BlockAdam8bit: its groups have amsgrad, betas"):
        optimizer.load_state_dict(other.state_dict())


def _elsewhere(rank: int, world: int) -> None:
    weights = [
        nn.Parameter(RaggedTensor.distribute(torch.ones(64, 8), RaggedShard.from_lengths((64, 8), lengths)))
        for lengths in ([256, 256], [0, 512])
    ]
    optimizers = [sr.optim.BlockAdam8bit([weight]) for weight in weights]
    step(optimizers[0], range(1, 2))
    of_other_blocks = optimizers[0].state_dict()
    of_other_blocks["state"], of_other_blocks["param_groups"][0]["block"] = {}, 64
    with pytest.raises(ValueError, match=r"needs whole blocks of 64 rows, but rank 0 holds elements 0 to 256"):
        optimizers[0].load_state_dict(of_other_blocks)
    assert optimizers[0].param_groups[0]["block"] == 32
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 must be sharded .* torch\.distributed\.checkpoint"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_a_state_that_is_sharded_otherwise_is_refused() -> None:
    run(_elsewhere, 2)
