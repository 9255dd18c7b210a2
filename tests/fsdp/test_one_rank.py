"""One rank alone, on the CPU and on a GPU: the engines over a group of one, FSDP2, ragged sharding, and SDP4Bit.

On NCCL this is as far as one GPU goes: every stage of a collective runs, on its stream, but nothing crosses a wire.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import smallreduce as sr
from ranks import run
from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import PacketCodec
from smallreduce.collectives import all_gather_for, channel_of, engine_for, reduce_scatter_for
from smallreduce.collectives._engine import stage_seed

SEGMENTS, NUMEL = [(0, 5000), (5024, 77), (5200, 0), (5200, 30_011)], 36_000
ON = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]


def _run_on(device: str, function) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run(function, 1, device, backend="gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", keep=False, timeout=240)


def _engines(rank: int, world: int, name: str) -> None:
    device = torch.device("cpu") if name == "cpu" else torch.device("cuda", 0)
    channel = channel_of(None, device)
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))
    for spelling in ("int4", "int8-hadamard", "sign", "fp16"):
        codec = sr.codec(spelling)
        assert isinstance(codec, PacketCodec)
        for dtype in (torch.float32, torch.bfloat16):
            given = x.to(dtype)
            layout = Layout.build(SEGMENTS, codec.format, dtype)
            packet = torch.zeros(layout.stride, dtype=torch.uint8)

            ops.encode(given, layout, packet, seed=stage_seed(5, 2, 0, 0))
            expected = torch.zeros_like(given)
            ops.decode(packet, layout, expected)
            found = torch.zeros_like(given, device=device)
            all_gather_for(SEGMENTS, NUMEL, codec, dtype, channel).launch(found, given.to(device), 5, 2).wait()
            assert torch.equal(found.cpu(), expected)

            # An fp32 shard, rounded by the encoder.
            ops.encode(x.to(dtype), layout, packet, seed=stage_seed(5, 2, 0, 0))
            gather = all_gather_for(SEGMENTS, NUMEL, codec, dtype, channel)
            gather.launch(found, x.to(device), 5, 2).wait()
            assert torch.equal(found.cpu(), expected)

            ops.encode_difference(x.flip(0), expected, layout, packet, seed=stage_seed(6, 2, 0, 0))
            gather = all_gather_for(SEGMENTS, NUMEL, codec, dtype, channel)
            gather.launch(found, x.flip(0).to(device), 6, 2, base=found).wait()
            ops.decode_add(packet, layout, expected)
            assert torch.equal(found.cpu(), expected)

            ops.encode(given, layout, packet, seed=stage_seed(7, 0, 0, 0))
            reduced, found = torch.zeros_like(given), torch.zeros_like(given, device=device)
            ops.reduce(packet, layout.stride, 1, 1.0, layout, reduced)
            scatter = reduce_scatter_for(SEGMENTS, NUMEL, codec, dtype, channel)
            scatter.launch(found, given.to(device), dist.ReduceOp.AVG, seed=7).wait()
            assert torch.equal(found.cpu(), reduced)

            again = torch.zeros_like(packet)
            ops.reduce_encode(packet, layout.stride, 1, 1.0, layout, again, seed=stage_seed(7, 0, 0, 1))
            twice, found = given.clone(), given.to(device)
            ops.decode(again, layout, twice)
            engine_for(SEGMENTS, codec, dtype, channel).launch(found, dist.ReduceOp.SUM, seed=7).wait()
            assert torch.equal(found.cpu(), twice)


@pytest.mark.parametrize("device", ON)
def test_engines_over_a_group_of_one(device: str) -> None:
    _run_on(device, _engines)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> list[Tensor]:
    for step in range(5):
        x = torch.randn(8, 33, generator=torch.Generator().manual_seed(step)).to(device)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(optimizer, sr.optim.SDP4Bit):
        optimizer.synchronize()
    whole = (DTensor, sr.ragged.RaggedTensor)
    return [p.full_tensor() if isinstance(p, whole) else p for p in (p.detach() for p in model.parameters())]


def _models(rank: int, world: int, device: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(33, 70), nn.Tanh(), nn.Linear(70, 5)).to(device)
    stock, compressed, ragged, other = (copy.deepcopy(plain) for _ in range(4))
    mesh = init_device_mesh(device, (1,))
    for model in (stock, compressed):
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    state = sr.fsdp.compress(compressed, gradients="int4-hadamard", weights="int8")
    expected = _trained(stock, torch.optim.AdamW(stock.parameters(), lr=1e-2), device)
    found = _trained(compressed, torch.optim.AdamW(compressed.parameters(), lr=1e-2), device)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "nothing is compressed" in str(state.stats())
    assert state.stats().bytes_sent == 0
    for module in (ragged[0], ragged):
        sr.ragged.fully_shard(module, mesh=mesh, granularity="rows", gradients="int4-hadamard", weights="int8")
    found = _trained(ragged, torch.optim.AdamW(ragged.parameters(), lr=1e-2), device)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Elementwise, so it does not matter that SDP4Bit gives its optimizer flat slices.
    expected = _trained(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), device)
    found = _trained(other, sr.optim.SDP4Bit(other, torch.optim.AdamW, lr=1e-2), device)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", ON)
def test_sharded_training_on_one_rank(device: str) -> None:
    _run_on(device, _models)
