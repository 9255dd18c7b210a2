"""Collectives on two levels: what they give, what they send, how they are laid out and what they refuse."""

from __future__ import annotations

import gc
import os
import random
import unittest.mock
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import smallreduce as sr
from collectives.compose import composed_all_gather, composed_reduce_scatter, dyadic, inputs
from ranks import outcomes, run
from smallreduce import metrics, ops
from smallreduce._layout import Layout
from smallreduce.codecs import PacketCodec
from smallreduce.collectives import _engine
from smallreduce.collectives._engine import cut, stage_seed
from smallreduce.collectives._levels import node_size_of

BACKEND = metrics.register_counting_backend()

# (ranks, ranks of a node)
SHAPES = [(1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3)]
PAIRS = [
    ("int8-hadamard", "int4-hadamard"),
    ("int8:group=32", "int4:group=256"),
    ("int4-hadamard:group=64,rounding=nearest", "int2-hadamard:group=32"),
    ("fp32", "sign"),
    ("bf16", "fp32"),
]


def _packets(pair: tuple[str, str]) -> tuple[PacketCodec, PacketCodec]:
    intra, inter = map(sr.codec, pair)
    assert isinstance(intra, PacketCodec)
    assert isinstance(inter, PacketCodec)
    return intra, inter


def _packet(packets: Tensor, source: Tensor, layout: Layout, seed: int) -> Tensor:
    ops.encode(source, layout, packets, seed=seed)
    return packets


def composed_sums(
    everyones: list[Tensor], codecs: tuple[PacketCodec, PacketCodec], node_size: int, seed: int, spans: list
) -> list[Tensor]:
    """For each span, the packets of the nodes' sums that come together on the rank whose span it is.

    Args:
        spans: The elements of every rank's part: its segments.
    """
    world, dtype = len(everyones), everyones[0].dtype
    of = [part for part, segments in enumerate(spans) for _ in segments]
    flat = [span for segments in spans for span in segments]
    first, second = (Layout.build(flat, codec.format, dtype, len(spans), of) for codec in codecs)
    sent = []
    for rank, x in enumerate(everyones):
        packets = torch.zeros(len(spans), first.stride, dtype=torch.uint8)
        sent.append(_packet(packets, x, first, stage_seed(seed, 0, rank, 0)))
    sums = []
    for part in range(len(spans)):
        local = part % world % node_size
        of_nodes = torch.zeros(world // node_size, second.stride, dtype=torch.uint8)
        for node, packet in enumerate(of_nodes):
            received = torch.stack([sent[node * node_size + mate][part] for mate in range(node_size)])
            ops.reduce_encode(
                received, first.stride, node_size, 1.0, first.select([part]), packet,
                seed=stage_seed(seed, 0, node * node_size + local, 1), into=second.select([part]),
            )  # fmt: skip
        sums.append(of_nodes)
    return sums


def composed_two_level_scatter(
    everyones: list[Tensor], pair: tuple[str, str], node_size: int, op: dist.ReduceOp.RedOpType, seed: int
) -> list[Tensor]:
    """Each rank's part of the sum."""
    codecs, world, dtype = _packets(pair), len(everyones), everyones[0].dtype
    numel, factor = everyones[0].numel() // world, 1 / world if op == dist.ReduceOp.AVG else 1.0
    if node_size in (1, world):
        return composed_reduce_scatter(everyones, codecs[node_size == 1], op, seed)
    sums = composed_sums(everyones, codecs, node_size, seed, [[(r * numel, numel)] for r in range(world)])
    shard = Layout.build([(0, numel)], codecs[1].format, dtype)
    results = [torch.empty(numel, dtype=dtype) for _ in range(world)]
    for packets, out in zip(sums, results, strict=True):
        ops.reduce(packets, packets.shape[1], len(packets), factor, shard, out)
    return results


def composed_two_level_all_reduce(
    everyones: list[Tensor], pair: tuple[str, str], node_size: int, op: dist.ReduceOp.RedOpType, seed: int
) -> Tensor:
    """The all-reduce, in one chunk."""
    codecs, world, dtype = _packets(pair), len(everyones), everyones[0].dtype
    factor = 1 / world if op == dist.ReduceOp.AVG else 1.0
    grain = max(codec.format.group for codec in codecs)  # of PAIRS each divides the other
    spans = cut([(0, everyones[0].numel())], world, grain)
    sums = composed_sums(everyones, codecs, node_size, seed, spans)
    flat = [span for segments in spans for span in segments]
    whole = Layout.build(flat, codecs[1].format, dtype, world, range(world))
    reduced = torch.zeros(world, whole.stride, dtype=torch.uint8)
    for rank, packets in enumerate(sums):
        ops.reduce_encode(
            packets, packets.shape[1], len(packets), factor, whole.select([rank]), reduced[rank],
            seed=stage_seed(seed, 0, world + rank, 0),
        )  # fmt: skip
    result = everyones[0].clone()
    ops.decode(reduced, whole, result)
    return result


def _matches_composition(rank: int, world: int, node_size: int) -> None:
    nodes = sr.two_level(node_size=node_size)
    assert (nodes.nodes, nodes.node, nodes.local_rank) == (world // node_size, rank // node_size, rank % node_size)
    cases = [(pair, numel, torch.float32) for pair in PAIRS for numel in (0, 1, 33, 1001)]
    cases += [(PAIRS[0], 129, torch.bfloat16), (PAIRS[1], 4001, torch.float16)]
    for pair, numel, dtype in cases:
        for op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            case = (pair, numel, dtype, op)
            everyones = inputs(world * numel, world, dtype)
            out, x = torch.empty(numel, dtype=dtype), everyones[rank].clone()
            assert nodes.reduce_scatter(out, x, pair, op, seed=9) is None
            assert torch.equal(x, everyones[rank])
            parts = composed_two_level_scatter(everyones, pair, node_size, op, 9) if world > 1 else [x]
            assert torch.equal(out, parts[rank]), case
            assert nodes.all_reduce(x, pair, op, seed=9) is None
            if world == 1:
                expected = everyones[0]
            elif nodes.is_flat:
                expected = everyones[rank].clone()
                sr.all_reduce(expected, pair[node_size == 1], op, seed=9)
            else:
                expected = composed_two_level_all_reduce(everyones, pair, node_size, op, 9)
            assert torch.equal(x, expected), case
        shards = [x[:numel] for x in everyones]
        gathered = torch.empty(world * numel, dtype=dtype)
        assert nodes.all_gather(gathered, shards[rank], pair[1], seed=9) is None
        codec = _packets(pair)[1]
        plain = pair[1] == "fp32" and dtype == torch.float32
        expected = torch.cat(shards) if world == 1 or plain else composed_all_gather(shards, codec, seed=9)
        assert torch.equal(gathered, expected), case


@pytest.mark.parametrize(("world", "node_size"), SHAPES)
def test_composition(world: int, node_size: int) -> None:
    run(_matches_composition, world, node_size)


def _exact(rank: int, world: int, node_size: int) -> None:
    # Multiples of 1/16 below 4 and the sums of six are exact in fp16, so nothing is rounded anywhere.
    nodes = sr.two_level(node_size=node_size)
    everyones = [dyadic(world * 1000, r) for r in range(world)]
    total = torch.stack(everyones).sum(0)
    out, gathered, x = torch.empty(1000), torch.empty(world * 1000), everyones[rank].clone()
    nodes.reduce_scatter(out, x, ("fp16", "fp16"), dist.ReduceOp.SUM)
    assert torch.equal(out, total[1000 * rank :][:1000])
    nodes.all_gather(gathered, out, "fp16")
    assert torch.equal(gathered, total)
    nodes.all_reduce(x, "fp16", dist.ReduceOp.SUM)
    assert torch.equal(x, total)
    # torch's own.
    x = everyones[rank].clone()
    nodes.all_reduce(x, None, dist.ReduceOp.SUM)
    assert torch.equal(x, total)
    nodes.reduce_scatter(out, everyones[rank], (None, "fp32"), dist.ReduceOp.SUM)
    assert torch.equal(out, total[1000 * rank :][:1000])


@pytest.mark.parametrize(("world", "node_size"), [(4, 2), (6, 3)])
def test_what_is_exact_stays_exact(world: int, node_size: int) -> None:
    run(_exact, world, node_size)


def _in_flight(rank: int, world: int) -> None:
    nodes, in_chunks = sr.two_level(node_size=2), sr.two_level(node_size=2, chunks=3)
    pair = PAIRS[0]
    works, results, expected = [], [], []
    for number in range(40):
        numel = (1000, 7, 9011, 400)[number % 4]
        kind, route = number % 5, (nodes, in_chunks)[number // 5 % 2]
        everyones = inputs(world * numel, world, torch.float32, seed=number)
        x, out = everyones[rank].clone(), torch.empty(numel)
        if kind < 2:
            works.append(route.reduce_scatter(out, x, pair, async_op=number % 10 != 5, seed=number))
            results.append(out)
            op = dist.ReduceOp.AVG
            expected.append(composed_two_level_scatter(everyones, pair, 2, op, number)[rank])
        elif kind == 2:
            gathered = torch.empty(world * numel)
            works.append(route.all_gather(gathered, x[:numel], "int4", async_op=True, seed=number))
            results.append(gathered)
            expected.append(composed_all_gather([x[:numel] for x in everyones], sr.IntQuant(4), seed=number))
        elif kind == 3:
            # Multiples of 1/16 below 4, whose sums and means are exact in fp16.
            everyones = [dyadic(world * numel, r, seed=number) for r in range(world)]
            x.copy_(everyones[rank])
            works.append(route.all_reduce(x, "fp16", async_op=True))
            results.append(x)
            expected.append(torch.stack(everyones).mean(0))
        else:  # on one level, between the others
            works.append(sr.reduce_scatter(out, x, "int4", async_op=True, seed=number))
            results.append(out)
            codec = sr.IntQuant(4)
            expected.append(composed_reduce_scatter(everyones, codec, dist.ReduceOp.AVG, seed=number)[rank])
    order = list(range(40))
    random.Random(rank).shuffle(order)
    for number in order:
        work = works[number]
        if work is not None:
            work.wait()
        assert torch.equal(results[number], expected[number]), number


def _in_flight_in_chunks(rank: int, world: int) -> None:
    with unittest.mock.patch.object(_engine, "CHUNK_NUMEL", 2048):
        _in_flight(rank, world)


@pytest.mark.parametrize("function", [_in_flight, _in_flight_in_chunks])
def test_many_in_flight(function) -> None:
    run(function, 4)


def _bytes(rank: int, world: int) -> None:
    nodes = sr.two_level(node_size=2, chunks=1)
    numel, (intra, inter) = 1 << 14, _packets(PAIRS[0])
    out, gathered, x = torch.empty(numel), torch.empty(world * numel), torch.randn(world * numel)

    def sent(work: sr.Work | None) -> int:
        assert work is not None
        work.wait()
        counted = metrics.bytes_sent()
        metrics.reset()
        assert counted == work.bytes_sent
        return counted

    metrics.reset()
    agreement = 8 * (world - 1)
    first, second = intra.packet_nbytes(numel), inter.packet_nbytes(numel)
    mates, others = nodes.node_size - 1, nodes.nodes - 1
    nbytes = mates * nodes.nodes * first + others * second
    assert sent(nodes.reduce_scatter(out, x, PAIRS[0], async_op=True)) == nbytes + agreement
    gathering = others * second + mates * nodes.nodes * second
    assert sent(nodes.all_gather(gathered, out, inter, async_op=True)) == gathering + agreement
    assert sent(nodes.all_reduce(x, PAIRS[0], async_op=True)) == nbytes + gathering + agreement


@pytest.mark.parametrize("world", [4, 6])
def test_what_is_sent(world: int) -> None:
    run(_bytes, world, backend=BACKEND)


def _from_torchrun(rank: int, world: int) -> None:
    nodes = sr.two_level()
    assert (nodes.node_size, nodes.nodes) == (2, 2)
    row = dist.new_group([0, 1] if rank < 2 else [2, 3], use_local_synchronization=True)
    assert sr.two_level(row).node_size == 2
    column = dist.new_group([rank % 2, rank % 2 + 2], use_local_synchronization=True)
    assert sr.two_level(column).node_size == 1
    x = torch.full((100,), float(rank))
    sr.two_level(column).all_reduce(x, "fp16", dist.ReduceOp.SUM)
    assert torch.equal(x, torch.full((100,), float(2 * (rank % 2) + 2)))


def test_the_layout_of_torchrun() -> None:
    run(_from_torchrun, 4, environment={"LOCAL_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("members", "given", "local", "expected"),
    [
        (range(6), None, "3", 3),
        ([2, 3, 6, 7], None, "4", 2),
        ([0, 4, 8], None, "4", 1),
        (range(4), 2, "", 2),
        (range(4), 3, "", "divide the 4 ranks of the group, got 3"),
        (range(4), 0, "2", "divide the 4 ranks of the group, got 0"),
        (range(4), None, "", "LOCAL_WORLD_SIZE, which torchrun sets, is not set"),
        (range(4), None, "two", "'two'"),
        (range(5), None, "2", "on nodes 0, 0, 1, 1, 2"),
        ([0, 2, 1, 3], None, "2", "on nodes 0, 1, 0, 1"),
    ],
)
def test_node_size(members, given, local, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    if isinstance(expected, int):
        assert node_size_of(members, given) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            node_size_of(members, given)


def _refusals(rank: int, world: int) -> None:
    nodes = sr.two_level(node_size=2)
    out, x = torch.empty(8), torch.ones(8 * world)
    for codecs, error, message in [
        (("topk:0.1", "int4"), ValueError, "dense codecs, got a sparse one for intra"),
        (("int8-hadamard", "int4"), ValueError, "both with hadamard or neither, got int8-hadamard and int4"),
        (("int8", None), ValueError, "None for both, got int8 and None"),
        (("int8",), ValueError, "two, inside the node and between nodes, got 1"),
        ("random-blocks:0.1", TypeError, "makes no packets"),
        (("int8", "int3"), ValueError, "unknown codec 'int3'"),
    ]:
        with pytest.raises(error, match=message):
            nodes.reduce_scatter(out, x, codecs)
        with pytest.raises(error, match=message):
            nodes.all_reduce(x, codecs)
    # On one level a pair is no codec.
    for call in (lambda: sr.all_reduce(x, PAIRS[0]), lambda: sr.reduce_scatter(out, x, PAIRS[0])):
        with pytest.raises(TypeError, match="got tuple"):
            call()
    # What one rank alone has wrong is told to the others, which stay in step.
    with pytest.raises((ValueError, RuntimeError), match=r"9$|refused"):
        nodes.reduce_scatter(torch.empty(9 if rank == 1 else 8), x, "int8")
    with pytest.raises(RuntimeError, match="do not agree"):
        nodes.reduce_scatter(out, x, ("int8", "int4") if rank == 1 else ("int4", "int4"))
    with pytest.raises(RuntimeError, match="do not agree"):
        (nodes if rank == 1 else sr).all_reduce(x, "int8")
    nodes.reduce_scatter(out, x, "fp16")
    assert torch.equal(out, torch.ones(8))
    with pytest.raises((ValueError, RuntimeError), match=r"divide|refused"):
        sr.two_level(node_size=3 if rank == 2 else 2)
    with pytest.raises((TypeError, RuntimeError), match=r"chunks must be an int|refused"):
        sr.two_level(node_size=2, chunks="all" if rank == 0 else None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="do not agree"):
        sr.two_level(node_size=4 if rank == 2 else 2)


def test_what_is_refused() -> None:
    run(_refusals, 4)


def _dies(rank: int, world: int) -> str:
    nodes = sr.two_level(node_size=2)
    x = torch.ones(1000)
    nodes.all_reduce(x, "fp16")
    if rank == 3:
        os._exit(7)
    with pytest.raises(RuntimeError) as caught:
        nodes.all_reduce(x, "fp16")
    with pytest.raises(RuntimeError, match="destroy the process group"):
        nodes.all_reduce(x, "fp16")
    return str(caught.value)


def test_a_rank_that_dies_fails_the_others() -> None:
    results = outcomes(_dies, 4, group_timeout=5, keep=False)
    assert results[3].exitcode == 7
    assert all(result.error is None and result.value for result in results[:3]), results


def _goes(rank: int, world: int) -> None:
    group = dist.new_group(list(range(world)))
    nodes = sr.two_level(group, node_size=2)
    x, out = torch.ones(64), torch.empty(16)
    nodes.all_reduce(x, "fp16")
    nodes.reduce_scatter(out, x)
    nodes.all_gather(x, out, "int8")
    gone = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="has been destroyed"):
        _ = nodes.group


def test_it_does_not_keep_its_group() -> None:
    run(_goes, 4)
