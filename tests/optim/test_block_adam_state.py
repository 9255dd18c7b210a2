"""BlockAdam8bit's state: kept to the bit, by state dicts and by checkpoints on any number of ranks."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import smallreduce as sr
from optim.sharded_parameters import full, gradient
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


def _step(optimizer: sr.optim.BlockAdam8bit, steps: range) -> None:
    for step in steps:
        for index, p in enumerate(optimizer.param_groups[0]["params"]):
            whole = gradient(step, index, p.shape, p.dtype)
            p.grad = RaggedTensor.distribute(whole, p.placement) if isinstance(p, RaggedTensor) else whole
        optimizer.step()


def _contents(model: nn.Module, optimizer: sr.optim.BlockAdam8bit) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        found[name] = full(p).clone()
        found |= {f"{name}.{key}": full(optimizer.state[p][key]).clone() for key in NAMES}
    return found


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _state(model: nn.Module, optimizer: sr.optim.BlockAdam8bit) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _saves(rank: int, world: int, kind: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = _made(kind)
    _step(optimizer, range(1, 4))
    dcp.save(_state(model, optimizer), checkpoint_id=folder)
    saved = _contents(model, optimizer)
    _step(optimizer, range(4, 6))
    return saved, _contents(model, optimizer)


def _loads(rank: int, world: int, kind: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = _made(kind)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    loaded = _contents(model, optimizer)
    _step(optimizer, range(4, 6))
    return loaded, _contents(model, optimizer)


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
    saved = run(_saves, saved_on, source, str(tmp_path), timeout=120)
    loaded = run(_loads, loaded_on, target, str(tmp_path), timeout=120)
    for of_rank in (*saved, *loaded):
        assert all(_same(one, other) for one, other in zip(of_rank, saved[0], strict=True))
    assert not _same(*saved[0])
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
    _step(optimizer, range(1, 4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    _step(optimizer, range(4, 6))
    for _ in range(2):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, again = _made("plain")
        other.to(dtype).load_state_dict(saved["model"])
        again.load_state_dict(saved["optimizer"])
        _step(again, range(4, 6))
        assert _same(_contents(other, again), _contents(model, optimizer))


def test_loading_copies() -> None:
    _, optimizer = _made("plain")
    _step(optimizer, range(1, 4))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    _, again = _made("plain")
    again.load_state_dict(saved)
    _step(again, range(4, 6))
    for number, state in before.items():
        assert all(torch.equal(saved["state"][number][name], state[name]) for name in NAMES)


def test_a_copy_goes_on_by_itself() -> None:
    model, optimizer = _made("plain")
    _step(optimizer, range(1, 4))
    other, again = copy.deepcopy((model, optimizer))
    for one in (optimizer, again):
        _step(one, range(4, 6))
    assert _same(_contents(other, again), _contents(model, optimizer))
    assert again.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]


def _altered(name: str, value: Any) -> dict[str, Any]:
    _, optimizer = _made("plain")
    _step(optimizer, range(1, 3))
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
    ],
)
def test_other_states_are_refused(name: str, value: Any, message: str) -> None:
    model, optimizer = _made("plain")
    _step(optimizer, range(1, 3))
    before = _contents(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(_altered(name, value))
    assert _same(_contents(model, optimizer), before)


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
    _step(optimizers[0], range(1, 2))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 must be sharded .* torch\.distributed\.checkpoint"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_a_state_that_is_sharded_otherwise_is_refused() -> None:
    run(_elsewhere, 2)
