"""HSDP: shards inside, replicas outside, each leg with a codec of its own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import smallreduce as sr
from collectives.compose import composed_all_reduce, composed_reduce_scatter, dyadic
from fsdp.composed import at
from fsdp.training import Given, equal, fsdp_modules, gradients, loss_of, same_on_all_ranks, sharded, shards
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


def _dyadic(shape: tuple[int, ...], rank: int, step: int) -> Tensor:
    """Multiples of 1/16 below 4, whose sums and means over powers of two are exact."""
    return dyadic(torch.Size(shape).numel(), rank, seed=step).view(shape)


def _composition(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    shard = rank % (world // 2)
    seed = 5
    for codec in (sr.IntQuant(4), sr.IntQuant(8, group=64, rounding="nearest")):
        # Between the replicas: each has the exact mean of its shards' gradients, and groups restart at parameters.
        shapes: list[tuple[int, ...]] = [(64, 3), (34,)]
        model = fully_shard(Given(shapes), mesh=mesh["shard"])
        state = sr.fsdp.compress(model, None, replicate_group=mesh["replicate"], replicate_gradients=codec, seed=seed)
        for step in range(3):
            model([_dyadic(shape, rank, step) for shape in shapes]).backward()
            found = torch.cat([parameter.grad.to_local().reshape(-1) for parameter in model.parameters()])
            model.zero_grad()
            parts = []
            for first in (0, world // 2):
                means = [sum(_dyadic(s, first + r, step) for r in range(world // 2)) / (world // 2) for s in shapes]
                parts.append(torch.cat([mean.chunk(world // 2)[shard].reshape(-1) for mean in means]))
            with at(step, number=2):
                expected = composed_all_reduce(
                    parts, codec, dist.ReduceOp.AVG, seed ^ shard << 32, segments=[(0, 96), (96, 17)]
                )
            assert torch.equal(found, expected), (codec, step)
        assert state.stats().between_replicas.exact_calls == 0

        # Between the shards: each replica rounds with bits of its own, and the exact mean is of what they gave.
        model = fully_shard(Given([(200,)]), mesh=mesh["shard"])
        sr.fsdp.compress(model, codec, replicate_group=mesh["replicate"], seed=seed)
        for step in range(3):
            model([_dyadic((200,), rank, step)]).backward()
            of_replicas = []
            for other, first in enumerate((0, world // 2)):
                everyones = [_dyadic((200,), first + r, step) for r in range(world // 2)]
                with at(step, number=1):
                    of_replicas.append(
                        composed_reduce_scatter(everyones, codec, dist.ReduceOp.AVG, seed ^ other << 32)[shard]
                    )
            assert torch.equal(model.weights[0].grad.to_local(), (of_replicas[0] + of_replicas[1]) / 2), (codec, step)
            model.zero_grad()


def test_the_operators_give_the_same() -> None:
    run(_composition, 4)


def _compressed(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for group in (mesh["replicate"], mesh["replicate"].get_group()):
        model = sharded(mesh=mesh["shard"])
        sr.metrics.reset()
        state = sr.fsdp.compress(model, "int4-hadamard", "int8", replicate_group=group, replicate_gradients="int4")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
        losses = []  # this rank's own, whose data are the same in every step
        for _ in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, rank, 0)
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
