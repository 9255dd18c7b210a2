"""Wrong use: an error that says what to do, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import smallreduce as sr
from fsdp.training import Model, fsdp_modules, loss_of, sharded
from ranks import run


def _arguments(rank: int, world: int) -> None:
    model = sharded()
    group = dist.group.WORLD
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "int5", {"gradients": "int5"}),
        (TypeError, "codec", {"gradients": 4}),
        (TypeError, "makes no packets", {"gradients": sr.RandomBlocks(0.1)}),
        (ValueError, "a pair of codecs", {"gradients": ("int8", "int4", "int2")}),
        (ValueError, "hadamard or neither", {"gradients": ("int8-hadamard", "int4"), "node_size": 1}),
        (ValueError, "dense", {"gradients": ("int8", "topk:0.1"), "node_size": 1}),
        (ValueError, "gradients: sign is biased", {"gradients": "sign"}),
        (ValueError, "gradients: topk:0.01 is biased", {"gradients": "topk:0.01"}),
        (ValueError, "gradients: sign is biased", {"gradients": ("int8", "sign"), "node_size": 1}),
        (ValueError, "node_size must divide", {"gradients": ("int8", "int4"), "node_size": 3}),
        (ValueError, "node_size is for a pair", {"node_size": 2}),
        (ValueError, "IntQuant or Cast", {"weights": "sign"}),
        (ValueError, "feedback must be", {"feedback": "fp32"}),
        (ValueError, "needs a codec", {"gradients": None, "feedback": "full"}),
        (ValueError, "takes one codec", {"gradients": ("int8", "int4"), "node_size": 1, "feedback": "full"}),
        (ValueError, "needs replicate_group", {"replicate_gradients": "int8"}),
        (ValueError, "weights is None", {"keep_packets": True}),
        (TypeError, "keep_packets must be a bool", {"weights": "int8", "keep_packets": 1}),
        (ValueError, "differences is for compressed weights", {"differences": True}),
        (TypeError, "differences must be a bool", {"weights": "int8", "differences": "yes"}),
        (ValueError, "not both", {"weights": "int8", "differences": True, "keep_packets": True}),
        (ValueError, "without the Hadamard transform", {"weights": "int4-hadamard", "differences": True}),
        (ValueError, "differences take IntQuant", {"weights": "fp8-e4m3", "differences": True}),
        (ValueError, "beta", {"beta": 1.0}),
        (TypeError, "beta", {"beta": "0.8"}),
        (ValueError, "reset_every", {"reset_every": 0}),
        (TypeError, "seed", {"seed": 0.5}),
    ]
    for kind, match, arguments in wrong:
        with pytest.raises(kind, match=match):
            sr.fsdp.compress(model, **arguments)
        # One rank alone: the others are told.
        alone = rank == world - 1
        with pytest.raises(kind if alone else RuntimeError, match=match):
            sr.fsdp.compress(model, **(arguments if alone else {}))
    with pytest.raises(RuntimeError, match=r"gradients int8.*gradients int4"):
        sr.fsdp.compress(model, "int8" if rank == 0 else "int4")
    with pytest.raises(RuntimeError, match=r"the ranks do not agree.*trainable"):
        sr.fsdp.compress(sharded(freeze=rank == 1))
    with pytest.raises(TypeError, match="ProcessGroup or a DeviceMesh"):
        sr.fsdp.compress(model, replicate_group=2)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"replicate_group of 1 ranks.*replicate_group of 2 ranks"):
        sr.fsdp.compress(model, replicate_group=None if rank == 0 else group)
    with pytest.raises(TypeError if rank == 0 else RuntimeError, match="ProcessGroup or a DeviceMesh"):
        sr.fsdp.compress(model, replicate_group=2 if rank == 0 else None)  # type: ignore[arg-type]
    for other in (nn.Linear(2, 2), Model(), 3):
        with pytest.raises(TypeError, match="fully_shard"):
            sr.fsdp.compress(other)  # type: ignore[arg-type]
    halves = sharded(policy="fp16-reduce", mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("r", "s"))["s"])
    for arguments in ({}, {"replicate_gradients": "int8"}):
        with pytest.raises(ValueError, match=r"reduces in fp16, .* may overflow: give reduce_dtype=torch.float32"):
            sr.fsdp.compress(halves, replicate_group=group, **arguments)
    with pytest.raises(ValueError, match="replicate_gradients: sign is biased"):
        sr.fsdp.compress(halves, replicate_group=group, replicate_gradients="sign")
    # None of this is in the way of what is right.
    state = sr.fsdp.compress(model)
    loss_of(model, rank, 0).backward()
    assert state.stats().gradients.calls == 3
    with pytest.raises(ValueError, match="call compress once"):
        sr.fsdp.compress(model)


def test_impossible_arguments() -> None:
    run(_arguments, 2)


def _models(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match=r"two-dimensional \(HSDP\).*replicate_group="):
        sr.fsdp.compress(sharded(mesh=mesh))
    with pytest.raises(ValueError, match=r"mesh\['replicate'\]"):
        sr.fsdp.compress(sharded(mesh=mesh["shard"]), replicate_group=mesh)

    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16().requires_grad_(False))
    fully_shard(mixed)
    with pytest.raises(ValueError, match=r"bfloat16, torch.float32 together.*a module of their own"):
        sr.fsdp.compress(mixed, "int4", "int8")

    extended = nn.Linear(4, 4, bias=False)
    fully_shard(extended)
    extended.weight._local_tensor.fsdp_pre_all_gather = None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="fsdp_pre_all_gather"):
        sr.fsdp.compress(extended)

    allocating = sharded()
    allocating.set_allocate_memory_from_process_group_for_comm(True)
    with pytest.raises(ValueError, match="set_allocate_memory_from_process_group_for_comm"):
        sr.fsdp.compress(allocating)

    divided = sharded()
    state = sr.fsdp.compress(divided)
    for module in fsdp_modules(divided):
        module.set_gradient_divide_factor(3.0)
    named = r"reduces with PREMUL_SUM, as .* set_force_sum_reduction_for_comms\(True\) on every FSDP module"
    with pytest.raises(ValueError, match=named):
        loss_of(divided, rank, 0).backward()
    assert all(steps == [0, 0] for steps in state.state_dict()["steps"].values())

    # What it says to do does it.
    divided = sharded()
    sr.fsdp.compress(divided)
    for module in fsdp_modules(divided):
        module.set_gradient_divide_factor(3.0)
        module.set_force_sum_reduction_for_comms(True)
    loss_of(divided, rank, 0).backward()

    # No codec takes fp64: torch's own collectives, counted as such.
    exact = nn.Linear(8, 8).double()
    fully_shard(exact, mp_policy=MixedPrecisionPolicy())
    state = sr.fsdp.compress(exact, "int4", "int8")
    exact(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    stats = state.stats()
    assert stats.gradients.exact_calls == stats.gradients.calls > 0
    assert stats.weights.exact_calls == stats.weights.calls > 0


def test_models_that_cannot_be_compressed() -> None:
    run(_models, 2)


def _int_reshard(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="reshard_after_forward is an int"):
        sr.fsdp.compress(sharded(reshard_after_forward=2), "int4", "int8")
    model = sharded(reshard_after_forward=2)
    sr.fsdp.compress(model, "int4")
    loss_of(model, rank, 0).backward()


def test_resharding_to_a_smaller_mesh() -> None:
    run(_int_reshard, 4)
