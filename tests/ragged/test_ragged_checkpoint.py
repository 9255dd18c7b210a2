"""RaggedTensors through torch.distributed.checkpoint: one tensor under its name, whatever holds it on either side."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from ragged.layouts import uneven
from ranks import run
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._tensor import RaggedTensor

SHAPES: dict[str, tuple[int, ...]] = {"cube": (4, 3, 5), "rows": (7, 5), "vector": (13,), "one": (1,), "none": (0, 4)}


class _Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def _shard(module: nn.Module, rng: random.Random) -> None:
    for name, parameter in list(module.named_parameters()):
        placement = uneven(rng, parameter.shape, dist.get_world_size())
        module.register_parameter(name, nn.Parameter(RaggedTensor.distribute(parameter, placement)))


def _make(kind: str, seed: int) -> _Model:
    model = _Model(seed)
    if kind == "ragged":
        _shard(model, random.Random(seed + dist.get_world_size()))
    elif kind == "fsdp2":
        fully_shard(model)
    return model


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def _contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = _full(parameter.detach())
        found |= {f"{name}.{key}": _full(value) for key, value in optimizer.state[parameter].items()}
    return found


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, RaggedTensor):
            parameter.grad = RaggedTensor.distribute(gradient, parameter.placement)
        elif hasattr(parameter, "full_tensor"):
            parameter.grad = torch.distributed.tensor.distribute_tensor(gradient, parameter.device_mesh)
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        else:
            parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _save(rank: int, world: int, kind: str, folder: str) -> dict[str, Tensor]:
    model = _make(kind, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        _step(model, optimizer, step)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    assert list(of_model) == list(SHAPES)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    return _contents(model, optimizer)


def _load(rank: int, world: int, kind: str, folder: str) -> dict[str, Tensor]:
    model = _make(kind, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    memory = [each.to_local().data_ptr() for each in model.parameters() if isinstance(each, RaggedTensor)]
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert memory == [each.to_local().data_ptr() for each in model.parameters() if isinstance(each, RaggedTensor)]
    assert optimizer.param_groups[0]["lr"] == 0.1
    for parameter in model.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert type(optimizer.state[parameter][key]) in (type(parameter), Tensor)
            if isinstance(parameter, RaggedTensor):
                assert optimizer.state[parameter][key].placement == parameter.placement
    return _contents(model, optimizer)


@pytest.mark.parametrize(
    "saved, loaded",
    [
        (("ragged", 4), ("ragged", 2)),
        (("ragged", 4), ("ragged", 3)),
        (("ragged", 4), ("ragged", 4)),
        (("ragged", 4), ("plain", 1)),
        (("ragged", 3), ("fsdp2", 2)),
        (("fsdp2", 3), ("ragged", 2)),
        (("plain", 1), ("ragged", 4)),
        (("ragged", 1), ("ragged", 3)),
        (("ragged", 2), ("ragged", 1)),
    ],
    ids=lambda side: f"{side[0]} on {side[1]}",
)
def test_a_training_run(saved: tuple[str, int], loaded: tuple[str, int], tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    there = run(_save, saved[1], saved[0], folder, timeout=120)
    here = run(_load, loaded[1], loaded[0], folder, timeout=120)
    for found in (*there, *here):
        assert found.keys() == there[0].keys() and len(found) == 4 * len(SHAPES)
        assert all(torch.equal(found[name], value) for name, value in there[0].items())


def _continues(rank: int, world: int, folder: str) -> None:
    """A run that was saved, and one that loads it, go on alike."""
    model, other = _make("ragged", 0), _make("ragged", 0)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1) for each in (model, other)]
    _step(model, optimizers[0], 0)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizers[0])}, checkpoint_id=folder)
    _step(other, optimizers[1], 5)
    state = {"optimizer": get_optimizer_state_dict(other, optimizers[1])}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(other, optimizers[1], model_state_dict=model.state_dict(), optim_state_dict=state["optimizer"])
    for one, optimizer in zip((model, other), optimizers, strict=True):
        _step(one, optimizer, 1)
    expected = _contents(model, optimizers[0])
    assert all(torch.equal(value, expected[name]) for name, value in _contents(other, optimizers[1]).items())


def test_a_loaded_run_continues(tmp_path: Path) -> None:
    run(_continues, 3, str(tmp_path / "checkpoint"), timeout=120)


def _parts(rank: int, world: int, folder: str) -> None:
    """What is written: a box for each part of a range that rows and planes cut it into, the element types kept."""
    placement = RaggedShard.from_lengths((4, 3, 5), [7, 0, 53])
    whole = torch.arange(60.0).view(4, 3, 5)
    tensors: dict[str, Any] = {"cube": RaggedTensor.distribute(whole, placement)}
    assert len(tensors["cube"].__create_chunk_list__()) == (2, 0, 3)[rank]
    for shape, placed in ((), RaggedShard((), (0, 1, 0))), ((0, 4), RaggedShard((), (1, 1, 1))):
        tensors[str(shape)] = RaggedTensor.distribute(torch.full(shape, 2.0, dtype=torch.bfloat16), placed)
    tensors["bytes"] = RaggedTensor.distribute(torch.arange(9, dtype=torch.int8), RaggedShard((0,), (4, 4, 1)))
    dcp.save(dict(tensors), checkpoint_id=folder)
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {name: (tuple(each.size), each.properties.dtype) for name, each in metadata.items()} == {
        name: (tuple(each.shape), each.dtype) for name, each in tensors.items()
    }
    assert len(metadata["cube"].chunks) == 5 and len(metadata["(0, 4)"].chunks) == 1
    into = {name: torch.zeros_like(each) for name, each in tensors.items()}
    dcp.load(into, checkpoint_id=folder)
    for name, each in tensors.items():
        assert torch.equal(into[name].to_local(), each.to_local()), name

    # Through the whole tensors of one process each, and through a RaggedTensor that is not there yet.
    plain = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in tensors.items()}
    dcp.load(plain, checkpoint_id=folder)
    assert all(torch.equal(plain[name], each.full_tensor()) for name, each in tensors.items())
    absent = {"cube": tensors["cube"].to("meta")}
    dcp.load(absent, checkpoint_id=folder)
    assert torch.equal(absent["cube"].full_tensor(), whole)

    with pytest.raises(CheckpointException, match=r"Size mismatch between saved torch.Size\(\[4, 3, 5\]\)"):
        dcp.load({"cube": RaggedTensor.distribute(whole[0], RaggedShard((), (1, 0, 0)))}, checkpoint_id=folder)
    with pytest.raises(ValueError, match=r"cube has no part at torch.Size\(\[3, 3, 3\]\) on this rank"):
        tensors["cube"].__get_tensor_shard__(MetadataIndex("cube", torch.Size((3, 3, 3))))


def test_what_is_written(tmp_path: Path) -> None:
    run(_parts, 3, str(tmp_path / "checkpoint"), timeout=120)


def _asynchronously(rank: int, world: int, folder: str) -> None:
    for number, options in enumerate(({}, {"async_stager": BlockingAsyncStager()})):
        model = _make("ragged", 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        _step(model, optimizer, 0)
        # Several parameters in one buffer, as sharded training has them, are staged with it.
        buffer = torch.zeros(100)
        end = 0
        for parameter in model.parameters():
            begin, end = end, end + parameter.to_local().numel()
            buffer[begin:end] = parameter.to_local()
            parameter.data = RaggedTensor(buffer[begin:end], parameter.shape, parameter.placement)
        expected = _contents(model, optimizer)
        of_model, of_optimizer = get_state_dict(model, optimizer)
        saving = dcp.async_save(
            {"model": of_model, "optimizer": of_optimizer}, checkpoint_id=f"{folder}{number}", **options
        )
        with torch.no_grad():
            for parameter in model.parameters():  # training goes on
                parameter.fill_(-1)
                optimizer.state[parameter]["exp_avg"].fill_(-1)
        saving.result()
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(state, checkpoint_id=f"{folder}{number}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert all(torch.equal(value, expected[name]) for name, value in _contents(model, optimizer).items())


def test_async_save(tmp_path: Path) -> None:
    run(_asynchronously, 2, str(tmp_path / "checkpoint"), timeout=120)


def _on_the_cpu(rank: int, world: int) -> None:
    model = _make("ragged", 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    of_model, _ = get_state_dict(model, optimizer, options=StateDictOptions(cpu_offload=True))
    for name, value in of_model.items():
        assert isinstance(value, RaggedTensor) and torch.equal(value.full_tensor(), _Model(0).get_parameter(name))
    # A whole tensor is not silently cut: what is loaded must be sharded first.
    with pytest.raises(RuntimeError, match=r"takes RaggedTensors beside .* RaggedTensor\.distribute\(\)"):
        model.load_state_dict(_Model(1).state_dict())
    whole = _Model(1).state_dict()
    model.load_state_dict({name: RaggedTensor.distribute(whole[name], own.placement) for name, own in of_model.items()})
    assert all(torch.equal(each.full_tensor(), whole[name]) for name, each in model.named_parameters())


def test_state_dicts_in_memory() -> None:
    run(_on_the_cpu, 2)
