"""Compressed weights and gradients: what the operators give, the same weights on all ranks, and honest figures."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import smallreduce as sr
from fsdp.training import Given, equal, fsdp_modules, gradients, loss_of, same_on_all_ranks, sharded, shards
from ranks import run
from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import PacketCodec
from smallreduce.collectives._engine import stage_seed

BACKEND = sr.metrics.register_counting_backend()


SHAPES: list[tuple[int, ...]] = [(13, 9), (5,), (64, 33), (2, 7)]


def _given(rank: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _parts(tensors: list[torch.Tensor], world: int) -> torch.Tensor:
    """Each rank's part of a bucket: of every tensor its chunk of rows, padded."""
    rows = []
    for tensor in tensors:
        count = -(-len(tensor) // world)
        whole = torch.zeros(count * world, *tensor.shape[1:])
        whole[: len(tensor)] = tensor
        rows.append(whole.view(world, -1))
    return torch.cat(rows, dim=1)


def _segments(world: int) -> list[tuple[int, int]]:
    segments, offset = [], 0
    for shape in SHAPES:
        length = -(-shape[0] // world) * torch.Size(shape[1:]).numel()
        segments.append((offset, length))
        offset += length
    return segments


def _composed(
    everyones: list[torch.Tensor], codec: PacketCodec, factor: float, step: int, number: int
) -> list[torch.Tensor]:
    """Each rank's part of the reduction of rank-major buffers, from the operators alone."""
    world, numel = len(everyones), everyones[0].shape[1]
    segments = _segments(world)
    layout = Layout.build(
        [(r * numel + o, n) for r in range(world) for o, n in segments], codec.format, torch.float32, world,
        [r for r in range(world) for _ in segments],
    )  # fmt: skip
    sent = []
    for rank, buffer in enumerate(everyones):
        packets = torch.zeros(world, layout.stride, dtype=torch.uint8)
        seed = stage_seed(0, number, rank, 0)
        ops.encode(buffer.reshape(-1), layout, packets, None, seed, torch.tensor(step))
        sent.append(packets)
    shard = Layout.build(segments, codec.format, torch.float32)
    results = []
    for owner in range(world):
        out = torch.zeros(numel)
        ops.reduce(torch.stack([p[owner] for p in sent]), layout.stride, world, factor, shard, out)
        results.append(out)
    return results


def _gathered(everyones: list[torch.Tensor], codec: PacketCodec, world: int, step: int, number: int) -> torch.Tensor:
    layout = Layout.build(_segments(world), codec.format, torch.float32)
    decoded = []
    for rank, part in enumerate(everyones):
        packet, out = torch.zeros(layout.stride, dtype=torch.uint8), torch.zeros_like(part)
        ops.encode(part, layout, packet, None, stage_seed(0, number, rank, 0), torch.tensor(step))
        ops.decode(packet, layout, out)
        decoded.append(out)
    return torch.stack(decoded)


def _composition(rank: int, world: int) -> None:
    for codec in (sr.IntQuant(4, hadamard=True), sr.IntQuant(8, group=64, rounding="nearest"), sr.Cast(torch.bfloat16)):
        for force_sum in (False, True):
            model = Given(SHAPES)
            weights = [p.detach().clone() for p in model.weights]
            fully_shard(model, reshard_after_forward=False)
            model.set_force_sum_reduction_for_comms(force_sum)
            state = sr.fsdp.compress(model, codec, codec)
            for step in range(3):
                mine = _given(rank, step)
                model(mine).backward()
                # torch divides a sum itself.
                factor = 1.0 if force_sum else 1 / world
                everyones = [_parts(_given(r, step), world) for r in range(world)]
                expected = _composed(everyones, codec, factor, step, 1)[rank]
                expected = expected / world if force_sum else expected
                for (offset, length), parameter in zip(_segments(world), model.parameters(), strict=True):
                    local = parameter.grad.to_local().reshape(-1)
                    assert torch.equal(local, expected[offset : offset + length][: len(local)]), (codec, force_sum)
                model.zero_grad()
            model.unshard()
            parts = _gathered(list(_parts(weights, world)), codec, world, 3, 0)
            for (offset, length), parameter, weight in zip(_segments(world), model.parameters(), weights, strict=True):
                assert torch.equal(
                    parameter.reshape(-1), parts[:, offset : offset + length].reshape(-1)[: weight.numel()]
                )
            model.reshard()
            assert state.stats().partial_reductions == 0


@pytest.mark.parametrize("world", [2, 3])
def test_the_operators_give_the_same(world: int) -> None:
    run(_composition, world)


def _part_of(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """The rows that a rank has, in torch's own way to shard."""
    rows = torch.chunk(tensor, world)
    return rows[rank] if rank < len(rows) else tensor[:0]


def _missing_gradients(rank: int, world: int) -> None:
    for feedback in (None, "full"):
        model = Given(SHAPES)
        fully_shard(model)
        state = sr.fsdp.compress(model, "int8", feedback=feedback)
        for step in range(2):
            given: list[torch.Tensor | None] = list(_given(rank, step))
            if step == 1:
                given[1] = None
            model(given).backward()
        # Two steps of eight bits accumulate in .grad: an error of half a unit of each, and of the rounding.
        for index, parameter in enumerate(model.parameters()):
            steps = (0, 1) if index != 1 else (0,)
            mean = sum(torch.stack([_given(r, s)[index] for r in range(world)]).mean(0) for s in steps)
            local = parameter.grad.to_local()
            expected = _part_of(mean, rank, world)
            # In each step an element is within a unit of its group's largest on each rank, 1/127 of it, in bf16 rounded
            # up; a group is no larger than the rank's part of this tensor, or, where one is missing, of all that are
            # not. Then three fp32 sums of means below 8.
            bound = 3 * 8 * 2**-24
            for step in steps:
                for r in range(world):
                    whole = _given(r, step)
                    those = [whole[i] for i in (0, 2, 3)] if step == 1 else [whole[index]]
                    units = [_part_of(t, rank, world).abs().max() for t in those if len(_part_of(t, rank, world))]
                    bound += float(max(units, default=torch.zeros(()))) * (1 + 2**-7) / 127 / world
            assert len(local) == len(expected) and bool(((local - expected).abs() <= bound).all()), (feedback, index)
        assert state.stats().partial_reductions == 1


def test_parameters_without_a_gradient() -> None:
    run(_missing_gradients, 2)


def _train(rank: int, world: int) -> dict[str, list[float]]:
    """Losses over the same data of all ranks, for each way; the rest is asserted on the way."""
    losses: dict[str, list[float]] = {}
    sent: dict[str, int] = {}
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "stock": ({}, {"gradients": None}),
        "both": ({}, {"gradients": "int4-hadamard", "weights": "int8"}),
        "kept": ({"reshard_after_forward": False}, {"gradients": None, "weights": "int8"}),
        "bf16": ({"policy": "bf16"}, {"weights": "int8"}),
        "bf16-reduce": ({"policy": "bf16-reduce", "checkpoint": True}, {"gradients": "int8", "weights": "int4"}),
        "fp16-reduce": ({"policy": "fp16-reduce"}, {"gradients": "int8"}),
        "frozen": ({"freeze": True}, {"weights": "int8", "feedback": "int8"}),
        "sign": ({}, {"gradients": "sign:group=32", "feedback": "full"}),
        "topk": ({}, {"gradients": "topk:0.1", "feedback": "full"}),
        "offloaded": ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {"weights": "int8"}),
        "differences": ({}, {"gradients": None, "weights": "int4", "differences": True}),
        "differences, offloaded": (
            {"offload_policy": CPUOffloadPolicy(pin_memory=False), "policy": "bf16"},
            {"weights": "int4", "differences": True},
        ),
        "differences, two levels": (
            {"checkpoint": True},
            {"gradients": ("int8", "int4"), "weights": "int4", "node_size": world // 2, "differences": True},
        ),
        "packets": ({}, {"gradients": "int4-hadamard", "weights": "int8", "keep_packets": True}),
        "packets, checkpoint": ({"checkpoint": True}, {"weights": "int8", "keep_packets": True}),
        "two levels, packets": (
            {},
            {"gradients": ("int8", "int4"), "weights": "int8", "node_size": world // 2, "keep_packets": True},
        ),
        "two levels": ({}, {"gradients": ("int8-hadamard", "int4-hadamard"), "node_size": 2 if world == 4 else 1}),
    }
    for way, (options, arguments) in ways.items():
        model = sharded(**options)
        sr.metrics.reset()
        state = sr.fsdp.compress(model, **arguments)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
        losses[way] = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, rank, 0)
            loss.backward()
            optimizer.step()
            losses[way].append(loss.item())
        stats = state.stats()
        if way != "stock":
            assert stats.bytes_sent == sr.metrics.bytes_sent(), way
            assert stats.gradients.wire_ratio > 1.3 or way in ("kept", "differences"), (way, str(stats))
        sent[way] = stats.weights.bytes_sent
        for module in fsdp_modules(model):
            module.unshard()
        assert same_on_all_ranks(list(model.parameters())), way
    # The same bits, and half of the weights: all modules but the root, which torch does not reshard, gather twice.
    assert losses["packets"] == losses["both"]
    assert sent["both"] / 2 <= sent["packets"] < sent["both"]
    return losses


@pytest.mark.parametrize("world", [2, 4])
def test_training_and_figures(world: int) -> None:
    ranks = run(_train, world, timeout=120, backend=BACKEND)
    for way in ranks[0]:
        # Of the data of all ranks, which are the same in every step.
        first, last = (sum(losses[way][step] for losses in ranks) for step in (0, -1))
        assert last < first, way


def _overlap(rank: int, world: int) -> None:
    # The root's weights are there when the backward pass begins; what it prefetches first is the last block's, which no
    # thread decodes here before the root has computed a gradient.
    decode, computed = ops.decode, threading.Event()
    before = []

    def late(*args: Any, **kwargs: Any) -> None:
        before.append(computed.is_set())
        assert computed.wait(20), "the backward pass waits for a gather that it does not need yet"
        decode(*args, **kwargs)

    def watch(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: computed.set())

    model = sharded()
    sr.fsdp.compress(model, "int8", "int8")
    model.norm.register_forward_hook(watch)
    loss = loss_of(model, rank, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "decode", late)
        loss.backward()
    assert len(before) == 2  # the two blocks


def test_what_is_prefetched_in_backward_is_not_waited_for() -> None:
    run(_overlap, 2)


def _replays(rank: int, world: int) -> None:
    """The same seed gives the same run; another one another. Forward and backward see the same weights."""
    results = []
    for seed in (0, 0, 1):
        model = sharded()
        sr.fsdp.compress(model, "int4", "int4", seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            optimizer.step()
        results.append(shards(model))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])

    seen: list[torch.Tensor] = []
    model = sharded(checkpoint=True)
    sr.fsdp.compress(model, "int4", "int4")
    block = model.blocks[0]
    block.wide.register_forward_hook(lambda module, args, output: seen.append(module.weight.detach().clone()))  # type: ignore[union-attr]
    for step in range(2):
        loss_of(model, rank, step).backward()
    forward, recomputed, second, again = seen
    assert torch.equal(forward, recomputed) and torch.equal(second, again)
    assert not torch.equal(forward, second)


def test_steps_can_be_replayed() -> None:
    run(_replays, 2)


def _compiled(rank: int, world: int) -> None:
    results = []
    for compiled in (False, True):
        model = sharded()
        sr.fsdp.compress(model, "int8", "int8")
        called = torch.compile(model, backend="aot_eager") if compiled else model
        loss_of(called, rank, 0).backward()
        results.append(gradients(model))
    assert equal(*results)  # aot_eager runs the same kernels


def test_compiled_model() -> None:
    run(_compiled, 2, timeout=120)


def _shard_of_one(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh=mesh["shard"])
    state = sr.fsdp.compress(model, "int4", "int4", replicate_group=mesh["replicate"], replicate_gradients="int8")
    loss_of(model, rank, 0).backward()
    stats = state.stats()
    assert stats.world_size == 1 and stats.replicas == world
    assert stats.weights.calls == stats.gradients.calls == 0 < stats.between_replicas.calls
    assert "nothing but what goes between replicas is compressed" in str(stats)
    assert same_on_all_ranks([gradient for gradient in gradients(model) if gradient is not None])


def test_a_shard_group_of_one_rank() -> None:
    run(_shard_of_one, 2)
