"""What SDP4Bit refuses, on all ranks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import smallreduce as sr
from optim.sdp4bit_training import EXACT, Case, batch, loss_of, net, sdp4bit
from ranks import outcomes, run


def _refuses(rank: int, world: int) -> None:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"weights": "topk:0.1"}, ValueError, "all elements"),
        ({"weights": "random-blocks:0.1"}, TypeError, "makes packets"),
        ({"weights": "int5"}, ValueError, "int5"),
        ({"weights": "fp8-e4m3"}, ValueError, "smaller than"),
        ({"gradients": ("int8", "int4", "int2")}, ValueError, "got 3"),
        ({"gradients": (None, "int4")}, ValueError, "none or both"),
        ({"gradients": ("int8", "int4-hadamard"), "node_size": 1}, ValueError, "hadamard"),
        ({"node_size": 3}, ValueError, "node_size must divide"),
        ({"differences": 1}, TypeError, "differences must be a bool"),
        ({"start_step": -1}, ValueError, "start_step"),
        ({"master_dtype": torch.bfloat16}, ValueError, "hold all values"),
        ({"master_dtype": torch.float64, "gradients": None}, ValueError, "need a master"),
        ({"master_dtype": torch.float64, "weights": None}, TypeError, "codecs take gradients of"),
        ({"node_size": 3, "gradients": "int4"}, ValueError, "must divide the group's 2 ranks"),
        ({"bucket_cap_mb": 0}, ValueError, "bucket_cap_mb"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"scaler": 3}, TypeError, "GradScaler"),
        ({"params": [nn.Parameter(torch.ones(2))]}, ValueError, "another"),
        ({"momentun": 0.9}, TypeError, "momentun"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"process_group": 3}, TypeError, "got int"),
    ]
    for options, kind, message in bad:
        options = {"lr": 0.1, "node_size": 1, **options}
        with pytest.raises(kind, match=message):
            sr.optim.SDP4Bit(net(), torch.optim.SGD, **options)
    for model, optimizer, kind, message in (
        (
            nn.parallel.DistributedDataParallel(net()),
            torch.optim.SGD,
            TypeError,
            "as the model is",
        ),
        (nn.Sequential(fully_shard(nn.Linear(4, 4))), torch.optim.SGD, TypeError, "in FSDPModule, as 0 is"),
        (
            nn.Sequential(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))),
            torch.optim.SGD,
            TypeError,
            "in FullyShardedDataParallel, as 0 is",
        ),
        (3, torch.optim.SGD, TypeError, "nn.Module"),
        (net().requires_grad_(False), torch.optim.SGD, ValueError, "requires a gradient"),
        (net(), torch.optim.LBFGS, TypeError, "by itself"),
        (net(), 3, TypeError, "subclass"),
        (net(torch.float64), torch.optim.SGD, ValueError, "hold all values"),
    ):
        with pytest.raises(kind, match=message):
            sr.optim.SDP4Bit(model, optimizer, lr=0.1, node_size=1)  # type: ignore[arg-type]
    # One rank's mistake is an error on all, and the ranks stay in step.
    with pytest.raises((ValueError, RuntimeError), match="start_step"):
        sdp4bit(Case(), net(), node_size=1, start_step=-rank)
    with pytest.raises(RuntimeError, match="do not agree"):
        sdp4bit(Case(), net(), node_size=1, seed=rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if rank else None
    with pytest.raises(RuntimeError, match="no scaler"):
        sr.optim.SDP4Bit(net(), torch.optim.SGD, lr=0.1, scaler=scaler, node_size=1)
    with pytest.raises(RuntimeError, match="lr"):
        sr.optim.SDP4Bit(net(), torch.optim.SGD, lr=0.1 + rank, **EXACT)

    model = net()
    optimizer = sdp4bit(Case(), model, node_size=1)
    for refused in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            refused(optimizer)
    with pytest.raises(ValueError, match="at construction"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match="without any gradient on this rank"):
            call()
    assert optimizer.stats().steps == 0
    with optimizer.no_sync():
        loss_of(model, batch(rank, 0)).backward()
    with pytest.raises(RuntimeError, match="outside of no_sync"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    model.frozen.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="did not require a gradient"):
        optimizer.step()
    model.frozen.weight.requires_grad_(False)
    # A gradient that comes twice.
    x = torch.randn(2, 31, requires_grad=True)
    twice = [torch.utils.checkpoint.checkpoint(model.middle, x, use_reentrant=True).sum() for _ in range(2)]
    with pytest.raises(RuntimeError, match="twice"):
        (sum(twice) * model.scale).backward()
    optimizer.zero_grad()
    # The same where its bucket is on its way already.
    body, head = nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False)
    both = sr.optim.SDP4Bit(
        nn.Sequential(body, head), torch.optim.SGD, lr=0.1, bucket_cap_mb=1e-5, gradients="int8", node_size=1
    )
    assert len(both._buckets) == 2
    x = torch.randn(2, 8, requires_grad=True)
    again = x
    for _ in range(2):
        again = torch.utils.checkpoint.checkpoint(body, again, use_reentrant=True)
    with pytest.raises(RuntimeError, match="twice"):
        head(again).sum().backward()
    both.zero_grad()
    embedding = nn.Embedding(4, 8, sparse=True)
    of_embedding = sr.optim.SDP4Bit(embedding, torch.optim.SGD, lr=0.1, **EXACT)
    with pytest.raises(TypeError, match="dense"):
        embedding(torch.tensor([1])).sum().backward()
    of_embedding.zero_grad()
    loss_of(model, batch(rank, 0)).backward()
    other = net()
    model.load_state_dict(other.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="no longer where"):
        optimizer.step()
    optimizer = sdp4bit(Case(), other, node_size=1)
    loss_of(other, batch(rank, 0)).backward()
    other.double()
    with pytest.raises(RuntimeError, match="no longer where"):
        optimizer.step()


def test_what_is_refused_is_refused_on_all_ranks() -> None:
    run(_refuses, 2)


def _without_a_pass(rank: int, world: int) -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.1, **EXACT)
    (other if rank else model)(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def test_a_rank_that_reduces_nothing_raises() -> None:
    results = outcomes(_without_a_pass, 2, keep=False, group_timeout=2)
    assert "without any gradient on this rank" in results[1].traceback
    assert results[0].error is not None


def _uneven(rank: int, world: int) -> None:
    model = net()
    optimizer = sdp4bit(Case(), model, node_size=1)
    for _ in range(1 + rank):
        loss_of(model, batch(rank, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()


def test_a_rank_with_more_steps_raises() -> None:
    results = outcomes(_uneven, 2, keep=False, group_timeout=2)
    assert results[1].error is not None


def test_one_rank_has_no_nodes() -> None:
    run(_one_node, 1)


def _one_node(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="node_size"):
        sdp4bit(Case(), net(), node_size=3)
