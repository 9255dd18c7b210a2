"""Top-k through the collectives: both forms of its all-reduce against the same composed in one process, bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import random
import unittest.mock
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist

import smallreduce as sr
from collectives.compose import composed_all_reduce, composed_gather, inputs
from collectives.test_all_reduce import DTYPES, equal_bits
from ranks import run
from smallreduce import metrics
from smallreduce.collectives import AllReduce, _engine, _engine_for, channel_of, engine_for
from smallreduce.collectives._block_reduce import BlockReduce
from smallreduce.collectives._gather_reduce import GatherReduce

BACKEND = metrics.register_counting_backend()
CPU = torch.device("cpu")
CODECS = ["topk:0.05", "topk:0.3,values=bf16", "topk:0.001,values=fp16", "topk:1"]
SIZES = [0, 1, 31, 33, 300, 70_001]
OPS = [dist.ReduceOp.AVG, dist.ReduceOp.SUM]


def form(name: str) -> contextlib.AbstractContextManager[Any]:
    """All sparse packets are gathered, or split, whatever the rule says."""
    return unittest.mock.patch.object(_engine_for, "gathers", return_value=name == "gather")


def test_the_rule() -> None:
    gathers = _engine_for.gathers
    for nbytes in (16, 1 << 40):
        assert all(gathers(nbytes, world) for world in range(2, _engine_for.GATHER_RANKS + 1))
    for world in (5, 8, 1000):
        # What is sent when packets are gathered, less what is sent when they are split.
        more = (world - 1) - Fraction(2 * (world - 1), world)
        most = int(_engine_for.GATHER_NBYTES / more)
        assert gathers(most, world)
        assert not gathers(most + 1, world)


def _which_engine(rank: int, world: int) -> None:
    channel = channel_of(None, CPU)
    segments = [(0, 5000), (6000, 40)]

    def kind(spelling: str) -> type:
        codec = sr.codec(spelling)
        assert codec is not None
        return type(engine_for(segments, codec, torch.float32, channel))

    assert [kind(spelling) for spelling in ("topk:0.1", "random-blocks:0.1", "int4", "bf16")] == [
        GatherReduce,
        BlockReduce,
        AllReduce,
        AllReduce,
    ]
    # The rule is asked about the packet of all segments: 500 + 4 values and 500 + 4 + 2 words.
    nbytes = 16 + 4 * 504 + 1024
    for answer, expected in ((True, GatherReduce), (False, AllReduce)):
        with unittest.mock.patch.object(_engine_for, "gathers", return_value=answer) as asked:
            assert kind("topk:0.1") is expected
        asked.assert_called_once_with(nbytes, world)


def test_the_codec_and_the_rule_choose_the_engine() -> None:
    run(_which_engine, 2)


def _matches_composition(rank: int, world: int, name: str) -> None:
    for spelling in CODECS:
        codec = sr.codec(spelling)
        assert isinstance(codec, sr.TopK)
        for numel in SIZES:
            for dtype, op in itertools.product(DTYPES, OPS if numel < 1000 else OPS[:1]):
                everyones = inputs(numel, world, dtype)
                x = everyones[rank].clone()
                assert sr.all_reduce(x, codec, op=op) is None
                if name == "gather":
                    expected = composed_gather(everyones, codec, op)
                else:
                    expected = composed_all_reduce(everyones, codec, op, seed=0)
                assert equal_bits(x, expected), (spelling, numel, dtype, op)


def _gathered(rank: int, world: int) -> None:
    _matches_composition(rank, world, "gather")


def _split(rank: int, world: int) -> None:
    with form("split"):
        _matches_composition(rank, world, "split")
    # In several chunks, which are counted by the bytes of the packets.
    codec = sr.TopK(0.3)
    with form("split"), unittest.mock.patch.object(_engine, "CHUNK_NUMEL", 4096):
        assert _engine.chunk_count(5000, world, codec) > 2
        everyones = inputs(5000, world, torch.float32)
        x = everyones[rank].clone()
        sr.all_reduce(x, codec)
        assert equal_bits(x, composed_all_reduce(everyones, codec, dist.ReduceOp.AVG, seed=0))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("function", [_gathered, _split])
def test_composition(function: Any, world: int) -> None:
    run(function, world)


def test_a_large_tensor_is_one_chunk_where_its_packets_are_small() -> None:
    for world in (2, 8):
        assert _engine.chunk_count(1 << 28, world, sr.TopK(0.001)) == 1 + (world == 8)
        assert _engine.chunk_count(1 << 28, world, sr.IntQuant(4)) == (64 if world == 2 else 256)


def _segments(rank: int, world: int, name: str) -> None:
    """Each segment is selected from on its own, what lies between them stays, and an engine may be used again."""
    segments = [(0, 1000), (1500, 0), (1500, 77), (1600, 4001)]
    codec = sr.TopK(0.01)
    with form(name):
        engine = engine_for(segments, codec, torch.float32, channel_of(None, CPU))
    worker, server = torch.zeros(engine.worker_numel), torch.zeros(engine.server_numel)
    workers = [torch.zeros(engine.worker_numel) for _ in range(world)]
    servers: dict[int, torch.Tensor] = {}
    outside = torch.ones(6000, dtype=torch.bool)
    for offset, length in segments:
        outside[offset : offset + length] = False
    for step in range(3):
        everyones = inputs(6000, world, torch.float32, seed=step)
        buffer = everyones[rank].clone()
        engine.launch(buffer, dist.ReduceOp.SUM, worker, server).wait()
        if name == "gather":
            expected = _gathered_segments(everyones, codec, segments, workers)
        else:
            expected = composed_all_reduce(everyones, codec, dist.ReduceOp.SUM, 0, segments, workers, servers)
        expected[outside] = everyones[rank][outside]
        assert equal_bits(buffer, expected)
        assert equal_bits(worker, workers[rank])
        mine = [servers[packet] for packet in sorted(servers) if packet % world == rank]
        assert equal_bits(server, torch.cat([torch.empty(0), *mine]))


def _gathered_segments(
    everyones: list[torch.Tensor], codec: sr.TopK, segments: list[tuple[int, int]], workers: list[torch.Tensor]
) -> torch.Tensor:
    """Each segment gathered as a tensor of its own, with what is owed to it added before; replaces what is owed."""
    result = torch.empty_like(everyones[0])
    block = 0
    for offset, length in segments:
        owed = [worker[32 * block :][:length] for worker in workers]
        torch._foreach_add_(owed, [x[offset:][:length] for x in everyones])
        result[offset:][:length] = composed_gather(owed, codec, dist.ReduceOp.SUM)
        for rest in owed:
            rest.sub_(sr.decode(sr.encode(rest, codec), codec, length, torch.float32))
        block += -(-length // 32)
    return result


@pytest.mark.parametrize("name", ["gather", "split"])
def test_segments(name: str) -> None:
    run(_segments, 3, name)


def _shapes(rank: int, world: int) -> None:
    codec = sr.TopK(0.1)
    everyones = inputs(600, world, torch.float32)
    expected = composed_gather(everyones, codec, dist.ReduceOp.AVG)
    # Not contiguous: every other column of a larger tensor, whose other columns stay as they are.
    wide = torch.full((60, 20), 5.0)
    wide[:, ::2] = everyones[rank].view(60, 10)
    sr.all_reduce(wide[:, ::2], codec)
    assert equal_bits(wide[:, ::2].reshape(-1), expected)
    assert equal_bits(wide[:, 1::2], torch.full((60, 10), 5.0))
    leaf = torch.nn.Parameter(everyones[rank].clone().view(2, 3, 100))
    sr.all_reduce(leaf, "topk:0.1")
    assert equal_bits(leaf.detach().view(-1), expected)
    for mode in (True, False):
        with torch.inference_mode(mode):
            x = everyones[rank].clone()
            sr.all_reduce(x, codec)
            assert equal_bits(x, expected)


def test_shapes() -> None:
    run(_shapes, 2)


def _many_in_flight(rank: int, world: int) -> None:
    """Sparse of both forms, dense and torch's own, of one exchange and of two, waited for in any order."""
    spellings = ["topk:0.1", "random-blocks:0.2,block=64", "int4", "topk:0.02,values=bf16", "random-blocks:0.1", None]

    def call(number: int, async_op: bool) -> tuple[torch.Tensor, sr.Work | None]:
        x = inputs([1000, 7, 20_011, 400][number % 4], world, torch.float32, seed=number)[rank]
        return x, sr.all_reduce(x, spellings[number % 6], async_op=async_op, seed=number)

    with unittest.mock.patch.object(_engine_for, "gathers", side_effect=lambda nbytes, world: nbytes < 1000):
        expected = [call(number, async_op=False)[0] for number in range(48)]
        calls = [call(number, async_op=True) for number in range(48)]
    order = list(range(48))
    random.Random(rank).shuffle(order)
    for number in order:
        x, work = calls[number]
        assert work is not None
        work.wait()
        assert equal_bits(x, expected[number]), number


@pytest.mark.parametrize("world", [2, 3])
def test_many_in_flight(world: int) -> None:
    run(_many_in_flight, world)


def _counted(rank: int, world: int) -> None:
    for name in ("gather", "split"):
        for numel in (0, 1, 5000):
            with form(name):
                x = inputs(numel, world, torch.float32)[rank]
                sr.all_reduce(x, "topk:0.01", async_op=True).wait()  # a channel's first call makes its groups
                metrics.reset()
                work = sr.all_reduce(x, "topk:0.01", async_op=True)
                assert work is not None
                work.wait()
                assert work.bytes_sent == metrics.bytes_sent()
            nbytes = sr.TopK(0.01).packet_nbytes(numel)
            if name == "gather":
                assert work.bytes_sent == (world - 1) * (nbytes + 8)  # and 8 bytes of agreement
            elif numel == 5000:
                # Less than twice a packet, but for the rounding up in each of its W parts: by a header of 16 bytes, a
                # value, two words and 2 * 15 bytes of padding.
                assert work.bytes_sent < 2 * (nbytes + world * (16 + 4 + 4 + 30)) + (world - 1) * 8


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_are_those_counted_at_the_process_group(world: int) -> None:
    run(_counted, world, backend=BACKEND)


def _another_form(rank: int, world: int) -> None:
    """Residuals of one form are not taken for those of the other: the server's would be lost."""
    states = {}
    for name in ("gather", "split"):
        sr.shutdown()
        feedback = sr.ErrorFeedback()
        with form(name):
            sr.all_reduce(inputs(1000, world, torch.float32)[rank], "topk:0.1", feedback=feedback)
        states[name] = feedback.state_dict()
        assert (states[name]["server"].numel() > 0) == (name == "split")
    for name, other in (("gather", "split"), ("split", "gather")):
        sr.shutdown()
        feedback = sr.ErrorFeedback()
        feedback.load_state_dict(states[name])
        x = torch.ones(1000)
        with form(other), pytest.raises(ValueError, match=r"blocks of the server's.*not to"):
            sr.all_reduce(x, "topk:0.1", feedback=feedback)
        assert torch.equal(x, torch.ones(1000))


def test_feedback_of_another_form_is_refused() -> None:
    run(_another_form, 2)
