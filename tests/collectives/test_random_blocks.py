"""Random blocks: which are chosen, against section 12 of docs/wire-formats.md, and their sum, against torch's own."""

from __future__ import annotations

import math
import unittest.mock
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist

import smallreduce as sr
from collectives.compose import inputs
from collectives.test_all_reduce import DTYPES, equal_bits, gathered_equal
from ranks import run
from smallreduce import metrics
from smallreduce._blocks import take
from smallreduce.collectives import _block_reduce, channel_of, engine_for

BACKEND = metrics.register_counting_backend()
CPU = torch.device("cpu")
MASK = (1 << 64) - 1
SIZES = [0, 1, 33, 1000, 40_007]
AVG, SUM = dist.ReduceOp.AVG, dist.ReduceOp.SUM
CASES = [(torch.float32, AVG), (torch.float32, SUM), (torch.bfloat16, AVG), (torch.float16, SUM)]
CODECS = [
    sr.RandomBlocks(0.3),
    sr.RandomBlocks(1e-9),
    sr.RandomBlocks(0.3, block=7),
    sr.RandomBlocks(0.01, block=4096),
    sr.RandomBlocks(1),
]


def mix64(z: int) -> int:
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & MASK
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def transcribed(codec: sr.RandomBlocks, n: int, seed: int, bucket: int, segment: int, step: int) -> list[int]:
    """The elements that section 12 chooses, word for word."""
    if n == 0:
        return []
    key = mix64(mix64(mix64(mix64(seed & MASK) ^ bucket) ^ segment) ^ mix64(step))
    h1, h2 = mix64(key ^ 1), mix64(key ^ 2)
    ratio = Fraction(str(codec.ratio))
    b = math.ceil(n * ratio) if codec.block is None else codec.block
    count = math.ceil(Fraction(n, b))
    m = 1 if codec.block is None else math.ceil(count * ratio)
    u = 1 + h2 % count
    t = next(t for t in [*range(u, count + 1), *range(1, count + 1)] if math.gcd(t, count) == 1)
    blocks = {(h1 % count + j * t) % count for j in range(m)}
    assert len(blocks) == m
    return [i for block in sorted(blocks) for i in range(block * b, min((block + 1) * b, n))]


def chosen_by(codec: sr.RandomBlocks, n: int, *numbers: int) -> list[int]:
    blocks = codec.choose(n, *numbers)
    elements = take([blocks], [torch.arange(n)])
    assert elements.numel() == blocks.numel
    return elements.tolist()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_chosen_are_those_of_the_text(codec: sr.RandomBlocks) -> None:
    for n in [0, 1, 2, 6, 7, 8, 33, 1000, 4097, 9000]:
        for step in range(12):
            numbers = (-5 - step, 1 << 8 | step, step % 3, step)
            assert chosen_by(codec, n, *numbers) == transcribed(codec, n, *numbers)


def test_every_element_is_chosen_equally_often() -> None:
    steps = 4000
    for codec, n, share in (
        (sr.RandomBlocks(0.1), 100, 1 / 10),
        (sr.RandomBlocks(0.3), 100, 1 / 4),  # blocks of 30, 30, 30 and 10
        (sr.RandomBlocks(0.2, block=3), 100, 7 / 34),  # 34 blocks, the last of one element
        (sr.RandomBlocks(0.5, block=4), 48, 6 / 12),  # steps of 1, 5, 7 and 11 blocks
    ):
        counts = torch.zeros(n)
        for step in range(steps):
            counts[chosen_by(codec, n, 7, 3, 0, step)] += 1
        # Binomial if the keys are as good as random: 6 standard deviations are passed once in 5e8 elements.
        expected = steps * share
        assert (counts - expected).abs().max() < 6 * math.sqrt(expected * (1 - share))


def test_steps_segments_buckets_and_seeds_choose_afresh() -> None:
    codec = sr.RandomBlocks(0.01)
    chosen = [
        codec.choose(1 << 20, *numbers).offset
        for base in range(50)
        for numbers in ((base, 0, 0, 0), (0, base + 1, 0, 0), (0, 0, base + 1, 0), (0, 0, 0, base + 1))
    ]
    # Of 100 blocks; 200 drawn at random leave 100 * 0.99 ** 200 = 13 out, give or take 3.
    assert 70 < len(set(chosen)) <= 100
    assert codec.choose(1 << 20, -1, 0, 0, 0).offset == codec.choose(1 << 20, (1 << 64) - 1, 0, 0, 0).offset


def test_impossible_blocks() -> None:
    for make, error, message in (
        (lambda: sr.RandomBlocks(0.0), ValueError, "ratio must be from"),
        (lambda: sr.RandomBlocks(1.5), ValueError, "got 1.5"),
        (lambda: sr.RandomBlocks("0.1"), TypeError, "got str"),  # type: ignore[arg-type]
        (lambda: sr.RandomBlocks(0.1, block=0), ValueError, "at least 1, got 0"),
        (lambda: sr.RandomBlocks(0.1, block=2.0), TypeError, "got float"),  # type: ignore[arg-type]
        (lambda: sr.RandomBlocks(0.1).choose(-1, 0, 0, 0, 0), ValueError, "negative"),
        (lambda: sr.RandomBlocks(0.1, block=1).choose(1 << 31, 0, 0, 0, 0), ValueError, "fewer than 2\\^31"),
    ):
        with pytest.raises(error, match=message):
            make()


# ---- all_reduce -----------------------------------------------------------------------------------------------------


def summed(x: torch.Tensor, chosen: list[int], op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """What torch's own all-reduce of the chosen elements gives; zeros elsewhere."""
    index = torch.tensor(chosen, dtype=torch.int64)
    packed = x[index].float()
    if op == AVG:
        packed.mul_(1 / dist.get_world_size())
    dist.all_reduce(packed)
    result = torch.zeros_like(x)
    result[index] = packed.to(x.dtype)
    return result


def _matches_torch(rank: int, world: int) -> None:
    for codec in CODECS:
        for numel in SIZES:
            chosen = transcribed(codec, numel, numel, 0, 0, 0)
            for dtype, op in CASES:
                mine = inputs(numel, world, dtype)[rank]
                x = mine.clone()
                assert sr.all_reduce(x, codec, op=op, seed=numel) is None
                assert equal_bits(x, summed(mine, chosen, op)), (codec, numel, dtype, op)
                assert gathered_equal(x)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_sum_is_torchs(world: int) -> None:
    run(_matches_torch, world)


def _in_tiles(rank: int, world: int, function: Callable[[int, int], None], tile: int) -> None:
    """With segments that are read in several tiles."""
    with unittest.mock.patch.object(_block_reduce, "_TILE", tile):
        function(rank, world)


def _segments(rank: int, world: int) -> None:
    """Each segment has its own blocks, gaps stay as they are, residuals are in block order, bytes are counted."""
    segments = [(3, 1000), (1500, 0), (1500, 77), (1600, 4001)]
    codec = sr.RandomBlocks(0.1, block=24)
    for dtype in DTYPES:
        engine = engine_for(segments, codec, dtype, channel_of(None, CPU))
        assert engine.server_numel == 0
        assert engine.packet_blocks == []
        worker = torch.zeros(engine.worker_numel)
        sent = set()
        for step in range(6):
            mine = inputs(6000, world, dtype, seed=step)[rank]
            buffer, before = mine.clone(), worker.clone()
            metrics.reset()
            at = torch.tensor(step) if step % 2 else step
            work = engine.launch(buffer, AVG, worker, seed=5, bucket=2, step=at)
            work.wait()
            assert work.bytes_sent == engine.bytes_sent == metrics.bytes_sent()
            sent.add(work.bytes_sent)
            chosen = [transcribed(codec, length, 5, 2, number, step) for number, (_, length) in enumerate(segments)]
            block = 0
            expected, packed, owing = mine.clone(), [], worker.clone()
            for (offset, length), indices in zip(segments, chosen, strict=True):
                owed = before[32 * block :][:length] + mine[offset:][:length]
                packed.append(owed[indices] * (1 / world))
                owed[indices] = 0
                owing[32 * block :][:length] = owed
                expected[offset:][:length] = 0
                block += -(-length // 32)
            together = torch.cat(packed)
            dist.all_reduce(together)
            values = iter(together.to(dtype))
            for (offset, _), indices in zip(segments, chosen, strict=True):
                for i in indices:
                    expected[offset + i] = next(values)
            assert equal_bits(buffer, expected)
            assert torch.equal(worker, owing)
        # Some last blocks are shorter than others.
        assert len(sent) > 1


@pytest.mark.parametrize("world", [2, 3])
def test_segments_and_residuals(world: int) -> None:
    run(_in_tiles, world, _segments, 999, backend=BACKEND)


def _in_place(rank: int, world: int) -> None:
    """A single slice of fp32 is summed in the tensor itself; bf16, and what is not contiguous, in a copy."""
    for x, copied in (
        (torch.ones(1000), False),
        (torch.ones(1000, dtype=torch.bfloat16), True),
        (torch.ones(1000, 2)[:, 0], True),
    ):
        with unittest.mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spied:
            sr.all_reduce(x, "random-blocks:0.1")
        ((packed,), _) = spied.call_args
        assert (packed.dtype, packed.numel()) == (torch.float32, 100)
        assert (x.data_ptr() <= packed.data_ptr() < x.data_ptr() + x.nbytes) != copied
        assert int((x == 1).sum()) == 100
        assert int((x == 0).sum()) == 900


def test_a_single_slice_is_not_copied() -> None:
    run(_in_place, 2)


def _non_finite(rank: int, world: int) -> None:
    """Wherever it is, it reaches every rank, in its own segment; residuals keep what is owed, and what was not sent."""
    codec = sr.RandomBlocks(0.25, block=10)
    segments = [(0, 100), (100, 60)]
    engine = engine_for(segments, codec, torch.float32, channel_of(None, CPU))
    for step in range(8):
        (first, *_), others = (transcribed(codec, n, 0, 0, number, step) for number, n in ((0, 100), (1, 60)))
        chosen = transcribed(codec, 100, 0, 0, 0, step)
        for value in (torch.nan, torch.inf, -torch.inf):
            for place in (3, chosen[5], first):
                buffer = torch.arange(160.0) + 1
                worker = torch.full((engine.worker_numel,), 0.5)
                expected_owed = torch.full_like(worker, 0.5)
                expected_owed[:100] += buffer[:100]
                expected_owed[128:188] += buffer[100:]
                expected_owed[chosen] = 0
                expected_owed[[128 + i for i in others]] = 0
                if rank == 1:
                    buffer[place] = value
                    expected_owed[first] = 0.5 + first + 1  # NaN was sent in its place
                    expected_owed[place] = 0.5
                engine.launch(buffer, AVG, worker, step=step).wait()
                assert gathered_equal(buffer)
                assert buffer[first].isnan()
                lost = {first, place} if place in chosen else {first}
                assert {i for i in range(160) if not buffer[i].isfinite()} == lost
                assert torch.equal(worker, expected_owed)


def test_non_finite_values_reach_every_rank() -> None:
    run(_in_tiles, 2, _non_finite, 16)


def _saturates(rank: int, world: int) -> None:
    """A finite result beyond a narrow type's range becomes its largest; so does a finite input with what it is owed."""
    x = torch.tensor([40000.0, -40000.0, 1.0], dtype=torch.float16)
    sr.all_reduce(x, "random-blocks:1", op=SUM)
    assert x.tolist() == [65504.0, -65504.0, 2.0]
    x = torch.tensor([torch.inf, 1.0], dtype=torch.float16)
    sr.all_reduce(x, sr.RandomBlocks(1, block=1), op=SUM)
    assert x[0].isnan() and x[1] == 2.0

    largest = torch.finfo(torch.float32).max
    feedback = sr.ErrorFeedback()
    sr.all_reduce(torch.zeros(2), sr.RandomBlocks(0.5, block=1), feedback=feedback, seed=0)
    assert feedback.worker is not None
    feedback.worker[:2] = largest
    x = torch.full((2,), largest)
    sr.all_reduce(x, sr.RandomBlocks(0.5, block=1), feedback=feedback)
    assert sorted(x.tolist()) == [0.0, largest]
    assert sorted(feedback.worker[:2].tolist()) == [0.0, largest]


def test_finite_values_stay_finite() -> None:
    run(_saturates, 2)


def _refused(rank: int, world: int) -> None:
    codec = sr.RandomBlocks(0.1)
    message = "random-blocks:0.1 makes no packets: it is for all_reduce"
    for call in (
        lambda codec: sr.reduce_scatter(torch.empty(5), torch.ones(10), codec),
        lambda codec: sr.all_gather(torch.empty(20), torch.ones(10), codec),
    ):
        with pytest.raises(TypeError, match=message):
            call(codec)
        error, text = (TypeError, message) if rank == 0 else (RuntimeError, f"rank 0 refused: .*{message}")
        with pytest.raises(error, match=text):
            call(codec if rank == 0 else "int4")
    with pytest.raises(TypeError, match=message):
        sr.encode(torch.ones(10), codec)
    # Ranks that disagree find it out before the tensor is touched.
    x = torch.ones(10)
    with pytest.raises(RuntimeError, match="do not agree"):
        sr.all_reduce(x, codec if rank == 0 else sr.RandomBlocks(0.2))
    assert torch.equal(x, torch.ones(10))
    with pytest.raises(RuntimeError, match=r"rank 0: .* of seed 0 in step 0 .*rank 1: .* of seed 1 in step 0"):
        sr.all_reduce(x, codec, seed=rank)
    ahead = sr.ErrorFeedback()
    ahead.step = rank
    with pytest.raises(RuntimeError, match=r"rank 0: .* of seed 0 in step 0 .*rank 1: .* of seed 0 in step 1"):
        sr.all_reduce(x, codec, seed=0, feedback=ahead)
    assert torch.equal(x, torch.ones(10))
    sr.all_reduce(x, sr.RandomBlocks(1, block=3))
    assert torch.equal(x, torch.ones(10))


def test_what_needs_packets_refuses_it_on_every_rank() -> None:
    run(_refused, 2, group_timeout=10)


def _inference_mode(rank: int, world: int) -> None:
    for codec in (sr.RandomBlocks(0.1), sr.RandomBlocks(0.1, block=8)):
        results = []
        for mode in (True, False):
            with torch.inference_mode(mode):
                feedback = sr.ErrorFeedback()
                x = inputs(1000, world, torch.float32)[rank]
                sr.all_reduce(x, codec, seed=1, feedback=feedback)
                results.append(x.clone())
        assert torch.equal(*results)


def test_inference_mode() -> None:
    run(_inference_mode, 3)
