"""Many collectives in flight: they neither cross nor deadlock, whatever the order in which ranks wait for them."""

from __future__ import annotations

import random
import unittest.mock
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import smallreduce as sr
from collectives.compose import composed_all_gather, composed_all_reduce, composed_reduce_scatter, inputs
from ranks import run
from smallreduce.collectives import _engine

_SIZES = [1000, 7, 20_011, 400]


def _eighty(rank: int, world: int) -> None:
    codec = sr.IntQuant(4)
    works, results, expected = [], [], []
    torchs_own = []
    for number in range(80):
        numel = _SIZES[number % len(_SIZES)]
        kind = number % 5
        if kind < 3:
            everyones = inputs(numel, world, torch.float32, seed=number)
            x = everyones[rank].clone()
            works.append(sr.all_reduce(x, codec, async_op=number % 10 != 7, seed=number))
            results.append(x)
            expected.append(composed_all_reduce(everyones, codec, dist.ReduceOp.AVG, seed=number))
        elif kind == 3:
            everyones = inputs(world * numel, world, torch.float32, seed=number)
            out = torch.empty(numel)
            works.append(sr.reduce_scatter(out, everyones[rank], codec, async_op=True, seed=number))
            results.append(out)
            expected.append(composed_reduce_scatter(everyones, codec, dist.ReduceOp.AVG, seed=number)[rank])
        else:
            everyones = inputs(numel, world, torch.float32, seed=number)
            out = torch.empty(world * numel)
            works.append(sr.all_gather(out, everyones[rank], codec, async_op=True, seed=number))
            results.append(out)
            expected.append(composed_all_gather(everyones, codec, seed=number))
        if number % 4 == 0:
            counts = torch.full((50,), float(number))
            torchs_own.append((number, counts, dist.all_reduce(counts, async_op=True)))
        if number % 16 == 0:
            barrier = torch.ones(1)
            dist.all_reduce(barrier)
            assert barrier.item() == world
    order = list(range(80))
    random.Random(rank).shuffle(order)
    for number in order:
        work = works[number]
        if work is not None:
            work.wait()
        assert torch.equal(results[number], expected[number]), number
    for number, counts, own in reversed(torchs_own):
        own.wait()
        assert torch.equal(counts, torch.full((50,), float(number * world)))


def _eighty_in_chunks(rank: int, world: int) -> None:
    with unittest.mock.patch.object(_engine, "CHUNK_NUMEL", 8192):
        assert _engine.chunk_count(max(_SIZES), world, sr.IntQuant(4)) > 2
        _eighty(rank, world)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("function", [_eighty, _eighty_in_chunks])
def test_eighty_in_flight(function: Callable[[int, int], None], world: int) -> None:
    run(function, world)


def _gaps_between_segments(rank: int, world: int) -> None:
    from smallreduce.collectives import AllReduce, channel_of

    segments = [(0, 1000), (1500, 0), (1500, 77), (1600, 4001)]
    total = 6000
    everyones = inputs(total, world, torch.float32)
    engine = AllReduce(segments, sr.IntQuant(8), torch.float32, channel_of(None, torch.device("cpu")))
    buffer = everyones[rank].clone()
    worker, server = torch.zeros(engine.worker_numel), torch.zeros(engine.server_numel)
    for _ in range(2):
        buffer.copy_(everyones[rank])
        engine.launch(buffer, dist.ReduceOp.AVG, worker, server, seed=1, bucket=2).wait()
    inside = torch.zeros(total, dtype=torch.bool)
    for offset, length in segments:
        inside[offset : offset + length] = True
    assert torch.equal(buffer[~inside], everyones[rank][~inside])
    exact = sum(everyones) / world
    # Two roundings, each by less than a step, 1.01/127 of the largest magnitude, and as much owed from the call before.
    step = 1.01 * max(x.abs().max() for x in everyones) / 127
    assert (buffer - exact)[inside].abs().max() < 4.1 * step


def test_gaps_between_segments_stay() -> None:
    run(_gaps_between_segments, 3)
