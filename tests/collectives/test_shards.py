"""reduce_scatter and all_gather against the same composed from one-process operators."""

from __future__ import annotations

import unittest.mock

import pytest
import torch
import torch.distributed as dist

import smallreduce as sr
from collectives.compose import composed_all_gather, composed_reduce_scatter, dyadic, inputs
from collectives.test_two_level import composed_sums
from ranks import run
from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import PacketCodec
from smallreduce.collectives import Route, _engine, all_gather_for, channel_of, reduce_scatter_for
from smallreduce.collectives._engine import PerRank, Segments, chunk_count, stage_seed

SIZES = [0, 1, 33, 129, 4001]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _matches_composition(rank: int, world: int, codecs: list[str]) -> None:
    for spelling in codecs:
        codec = sr.codec(spelling)
        assert codec is not None
        for numel in SIZES:
            for dtype in DTYPES:
                everyones = inputs(world * numel, world, dtype)
                for op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
                    out = torch.empty(numel, dtype=dtype)
                    x = everyones[rank].clone()
                    assert sr.reduce_scatter(out, x, codec, op=op, seed=9) is None
                    assert torch.equal(x, everyones[rank])
                    expected = x if world == 1 else composed_reduce_scatter(everyones, codec, op, seed=9)[rank]
                    assert torch.equal(out, expected), (spelling, numel, dtype, op)
                shards = [x[:numel] for x in everyones]
                out = torch.empty(world * numel, dtype=dtype)
                assert sr.all_gather(out, shards[rank], codec, seed=9) is None
                expected = shards[0] if world == 1 else composed_all_gather(shards, codec, seed=9)
                assert torch.equal(out, expected), (spelling, numel, dtype)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_composition(world: int) -> None:
    run(_matches_composition, world, ["int4", "int8:group=32", "int4-hadamard", "sign", "bf16", "topk:0.1"])


def _several_chunks(rank: int, world: int) -> None:
    numel = 3_000_007
    codec = sr.IntQuant(4)
    assert chunk_count(world * numel, world, codec) > 1
    everyones = inputs(world * numel, world, torch.float32)
    out = torch.empty(numel)
    sr.reduce_scatter(out, everyones[rank], codec, seed=4)
    assert torch.equal(out, composed_reduce_scatter(everyones, codec, dist.ReduceOp.AVG, seed=4)[rank])
    shards = [x[:numel] for x in everyones]
    gathered = torch.empty(world * numel)
    gathered[rank * numel :][:numel] = shards[rank]
    # In place, as FSDP2 has it: the input is this rank's part of the output.
    sr.all_gather(gathered, gathered[rank * numel :][:numel], codec, seed=4)
    assert torch.equal(gathered, composed_all_gather(shards, codec, seed=4))


@pytest.mark.parametrize("world", [2, 3])
def test_several_chunks(world: int) -> None:
    run(_several_chunks, world)


def _shapes(rank: int, world: int) -> None:
    everyones = inputs(world * 60, world, torch.float32)
    expected = composed_reduce_scatter(everyones, sr.IntQuant(8), dist.ReduceOp.AVG, seed=1)[rank]
    out = torch.zeros(20, 6)
    work = sr.reduce_scatter(out[:, ::2], everyones[rank].view(world * 20, 3).t().contiguous().t(), "int8",
                             async_op=True, seed=1)  # fmt: skip
    assert work is not None
    work.wait()
    assert torch.equal(out[:, ::2].reshape(-1), expected)
    assert not out[:, 1::2].any()
    gathered = torch.zeros(world * 20, 6)
    work = sr.all_gather(gathered[:, 1::2], out[:, ::2], "fp32", async_op=True)
    assert work is not None
    assert work.get_future().wait().shape == (world * 20, 3)
    parts = composed_reduce_scatter(everyones, sr.IntQuant(8), dist.ReduceOp.AVG, seed=1)
    assert torch.equal(gathered[:, 1::2].reshape(-1), torch.cat(parts))
    assert not gathered[:, ::2].any()


def test_shapes() -> None:
    run(_shapes, 2)


def _plain(rank: int, world: int) -> None:
    everyones = inputs(world * 100, world, torch.float64)
    for op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
        out = torch.empty(100, dtype=torch.float64)
        sr.reduce_scatter(out, everyones[rank], None, op=op)
        expected = torch.empty_like(out)
        dist.reduce_scatter(expected, list(everyones[rank].chunk(world)), op=op)
        assert torch.equal(out, expected)
    gathered = torch.empty(world * 100, dtype=torch.float64)
    sr.all_gather(gathered, out, None)
    assert torch.equal(gathered[100 * rank :][:100], out)


def test_no_codec_is_torchs_own() -> None:
    run(_plain, 2)


def _feedback(rank: int, world: int, spelling: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    feedback = sr.ErrorFeedback()
    total, given = torch.zeros(512, dtype=torch.float64), torch.zeros(world * 512, dtype=torch.float64)
    for step in range(10):
        x = dyadic(world * 512, rank, seed=step)
        given += x
        out = torch.empty(512)
        sr.reduce_scatter(out, x, spelling, feedback=feedback)
        total += out
    assert feedback.worker is not None
    assert feedback.server is not None
    assert feedback.server.numel() == 0
    return total, given, feedback.worker.double()


@pytest.mark.parametrize("spelling", ["int4", "topk:0.1,values=bf16"])
def test_feedback_loses_nothing(spelling: str) -> None:
    # Exact, as in test_feedback.py: the parts are whole blocks, so the residual is in the order of the elements.
    ranks = run(_feedback, 2, spelling)
    outputs = torch.cat([total for total, _, _ in ranks])
    assert torch.equal(outputs + sum(owed for _, _, owed in ranks) / 2, sum(given for _, given, _ in ranks) / 2)


SEGMENTS = [(0, 100), (128, 77), (300, 0), (310, 400), (710, 1)]
NUMEL = 720  # elements of a part, the gaps between its segments included
RAGGED: list[Segments] = [((5, 700),), ((0, 0),), ((0, 129), (400, 320)), ((719, 1),)]  # of each rank's part


def _routes(world: int) -> list[Route]:
    return [channel_of(None, torch.device("cpu"))] + ([sr.two_level(node_size=2)] if world == 4 else [])


def _of_all(segments: list[Segments], codec: PacketCodec, dtype: torch.dtype) -> Layout:
    """The segments of all parts, a packet for each part."""
    spans = [(rank * NUMEL + offset, length) for rank, part in enumerate(segments) for offset, length in part]
    packet_of = [rank for rank, part in enumerate(segments) for _ in part]
    return Layout.build(spans, codec.format, dtype, len(segments), packet_of)


def _segments(rank: int, world: int, chunk_numel: int, ragged: bool) -> None:
    parts = RAGGED[:world] if ragged else [SEGMENTS] * world
    given = PerRank(tuple(map(tuple, parts))) if ragged else SEGMENTS
    inside = torch.zeros(world, NUMEL, dtype=torch.bool)
    for r, part in enumerate(parts):
        for offset, length in part:
            inside[r, offset : offset + length] = True
    for spelling in ("int4", "int4-hadamard:group=64", "sign:group=32", "fp16"):
        codec = sr.codec(spelling)
        assert isinstance(codec, PacketCodec)
        for dtype in DTYPES:
            everyones = inputs(world * NUMEL, world, dtype)
            layout = _of_all(parts, codec, dtype)
            shards = [Layout.build(part, codec.format, dtype) for part in parts]
            for route in _routes(world):
                engine = all_gather_for(given, NUMEL, codec, dtype, route)
                assert (engine.chunks > 1) == (chunk_numel < NUMEL)
                mine = slice(rank * NUMEL, (rank + 1) * NUMEL)

                # What is between the segments stays.
                gathered, expected = everyones[0].clone(), everyones[0].clone()
                packets = torch.zeros(world, layout.stride, dtype=torch.uint8)
                for r, x in enumerate(everyones):
                    seed = stage_seed(5, 2, r, 0)
                    ops.encode(x[r * NUMEL :][:NUMEL], shards[r], packets[r], seed=seed)
                ops.decode(packets, layout, expected)
                engine.launch(gathered, everyones[rank][mine], seed=5, bucket=2).wait()
                assert torch.equal(gathered, expected)
                assert torch.equal(gathered.view(world, -1)[~inside], everyones[0].view(world, -1)[~inside])

                # New values of each rank's part, by the differences from what all have.
                target = inputs(world * NUMEL, 1, torch.float32, seed=7)[0]
                for r in range(world):
                    seed = stage_seed(6, 2, r, 0)
                    theirs = slice(r * NUMEL, (r + 1) * NUMEL)
                    ops.encode_difference(target[theirs], expected[theirs], shards[r], packets[r], seed=seed)
                ops.decode_add(packets, layout, expected)
                engine.launch(gathered, target[mine], seed=6, bucket=2, base=gathered[mine]).wait()
                assert torch.equal(gathered, expected)

            engine = reduce_scatter_for(given, NUMEL, codec, dtype, _routes(world)[0])
            out, kept = torch.full((NUMEL,), 3.0, dtype=dtype), torch.zeros(engine.worker_numel)
            engine.launch(out, everyones[rank], dist.ReduceOp.SUM, kept, seed=5).wait()
            received = torch.zeros(world, layout.stride, dtype=torch.uint8)
            for r, x in enumerate(everyones):
                residual = torch.zeros(32 * layout.origin_end)
                packets = torch.zeros(world, layout.stride, dtype=torch.uint8)
                ops.encode(x, layout, packets, residual, seed=stage_seed(5, 0, r, 0))
                received[r] = packets[rank]
                assert r != rank or torch.equal(kept, residual)
            expected = torch.full((NUMEL,), 3.0, dtype=dtype)
            ops.reduce(received, layout.stride, world, 1.0, shards[rank], expected)
            assert torch.equal(out, expected)

            # On two levels, as FSDP has its gradients reduced, with the codec of this turn between the nodes.
            for route in _routes(world)[1:]:
                pair = (sr.IntQuant(8, hadamard=codec.format.hadamard), codec)
                out = torch.full((NUMEL,), 3.0, dtype=dtype)
                both = reduce_scatter_for(given, NUMEL, pair, dtype, route)
                both.launch(out, everyones[rank], dist.ReduceOp.SUM, seed=5).wait()
                spans = [[(r * NUMEL + offset, length) for offset, length in part] for r, part in enumerate(parts)]
                sums = composed_sums(everyones, pair, 2, 5, spans)[rank]
                expected = torch.full((NUMEL,), 3.0, dtype=dtype)
                ops.reduce(sums, sums.shape[1], len(sums), 1.0, shards[rank], expected)
                assert torch.equal(out, expected), (spelling, dtype)


def _segments_in_chunks(rank: int, world: int, chunk_numel: int, ragged: bool) -> None:
    with unittest.mock.patch.object(_engine, "CHUNK_NUMEL", chunk_numel):
        _segments(rank, world, chunk_numel, ragged)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("chunk_numel", [500, 1 << 20])
@pytest.mark.parametrize("world", [2, 4])
def test_segments_and_differences(world: int, chunk_numel: int, ragged: bool) -> None:
    run(_segments_in_chunks, world, chunk_numel, ragged)


def _too_few_parts(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="segments for each of 2 ranks, got 1"):
        all_gather_for(PerRank((((0, 5),),)), 5, sr.IntQuant(4), torch.float32, _routes(world)[0])


def test_there_are_segments_for_every_rank() -> None:
    run(_too_few_parts, 2)
