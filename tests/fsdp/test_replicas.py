"""HSDP: shards inside, replicas outside, each leg with a codec of its own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import smallreduce as sr
from fsdp.training import equal, fsdp_modules, gradients, loss_of, same_on_all_ranks, sharded, shards
from ranks import run

BACKEND = sr.metrics.register_counting_backend()


def _exact(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    native, ours = sharded(mesh=mesh), sharded(mesh=mesh["shard"])
    state = sr.fsdp.compress(ours, None, replicate_group=mesh["replicate"])
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, foreach=False) for m in (native, ours)]
    for step in range(5):
        for model, optimizer in zip((native, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            optimizer.step()
        assert equal(gradients(ours), gradients(native)), step
        assert equal(shards(ours), shards(native)), step
    leg = state.stats().between_replicas
    assert leg.exact_calls == leg.calls == 15 and leg.bytes_sent == leg.uncompressed_bytes > 0


def test_without_codecs_as_torchs_own() -> None:
    run(_exact, 4)


def _compressed(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for group in (mesh["replicate"], mesh["replicate"].get_group()):
        model = sharded(mesh=mesh["shard"])
        sr.metrics.reset()
        state = sr.fsdp.compress(model, "int4-hadamard", "int8", replicate_group=group, replicate_gradients="int4")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, 0, 0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        stats = state.stats()
        assert stats.replicas == 2 and stats.world_size == world // 2
        assert stats.between_replicas.calls == stats.gradients.calls == 18
        assert stats.between_replicas.wire_ratio > 3
        assert stats.bytes_sent == sr.metrics.bytes_sent()
        for module in fsdp_modules(model):
            module.unshard()
        assert same_on_all_ranks(list(model.parameters()))
        for module in fsdp_modules(model):
            module.reshard()
    assert dist.get_world_size() == world


def test_compressed_between_replicas() -> None:
    run(_compressed, 4, backend=BACKEND)
