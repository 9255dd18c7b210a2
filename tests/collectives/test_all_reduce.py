"""all_reduce against the same composed from one-process operators: exact equality of bits, on every rank."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

import smallreduce as sr
from collectives.compose import composed_all_reduce, inputs
from ranks import run

CODECS = ["int8", "int4", "int2:group=64", "int4-hadamard", "sign:group=64", "bf16", "fp16", "fp8-e4m3", "fp8-e5m2"]
SIZES = [0, 1, 31, 33, 129, 1000, 40_007]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gathered_equal(x: torch.Tensor) -> bool:
    """Whether all ranks hold these bits."""
    mine = x.detach().contiguous().view(-1).view(torch.uint8)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    return all(torch.equal(mine, other) for other in everyones)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def _matches_composition(rank: int, world: int, codecs: list[str], sizes: list[int]) -> None:
    for spelling in codecs:
        codec = sr.codec(spelling)
        assert codec is not None
        for numel in sizes:
            for dtype in DTYPES:
                for op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
                    everyones = inputs(numel, world, dtype)
                    x = everyones[rank].clone()
                    assert sr.all_reduce(x, spelling, op=op, seed=7) is None
                    expected = everyones[rank] if world == 1 else composed_all_reduce(everyones, codec, op, seed=7)
                    assert equal_bits(x, expected), (spelling, numel, dtype, op)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_composition(world: int) -> None:
    run(_matches_composition, world, CODECS if world == 2 else ["int4", "int4-hadamard"], SIZES)


def _several_chunks(rank: int, world: int) -> None:
    numel = 5_000_001
    everyones = inputs(numel, world, torch.float32)
    x = everyones[rank].clone()
    sr.all_reduce(x, "int4", seed=3)
    from smallreduce.collectives._engine import chunk_count

    codec = sr.IntQuant(4)
    assert chunk_count(numel, world, codec) > 1
    assert equal_bits(x, composed_all_reduce(everyones, codec, dist.ReduceOp.AVG, seed=3))


@pytest.mark.parametrize("world", [2, 3])
def test_several_chunks(world: int) -> None:
    run(_several_chunks, world)


def _inference_mode_then_not(rank: int, world: int) -> None:
    """What is kept from one call for the next serves in either mode."""
    everyones = inputs(1000, world, torch.float32)
    expected = composed_all_reduce(everyones, sr.IntQuant(4), dist.ReduceOp.AVG, seed=3)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            x = everyones[rank].clone()
            sr.all_reduce(x, "int4", seed=3)
            assert equal_bits(x, expected)


@pytest.mark.parametrize("world", [2, 3])
def test_inference_mode(world: int) -> None:
    run(_inference_mode_then_not, world)


def _plain_is_torchs_own(rank: int, world: int) -> None:
    for codec in (None, "fp32"):
        x = inputs(1001, world, torch.float32)[rank]
        expected = x.clone()
        expected.mul_(1.0 / world)
        dist.all_reduce(expected)
        sr.all_reduce(x, codec)
        assert equal_bits(x, expected)
    counts = torch.arange(5) + rank
    sr.all_reduce(counts, None, op=dist.ReduceOp.SUM)
    assert counts.tolist() == [world * i + sum(range(world)) for i in range(5)]
    strided = torch.arange(12.0).view(3, 4).t()
    sr.all_reduce(strided, None, op=dist.ReduceOp.SUM)
    assert torch.equal(strided, world * torch.arange(12.0).view(3, 4).t())


def test_no_codec_is_torchs_own() -> None:
    run(_plain_is_torchs_own, 3)


def _shapes(rank: int, world: int) -> None:
    everyones = inputs(600, world, torch.float32)
    expected = composed_all_reduce(everyones, sr.IntQuant(8), dist.ReduceOp.AVG, seed=1)
    x = everyones[rank].clone().view(2, 3, 100)
    sr.all_reduce(x, sr.IntQuant(8), seed=1)
    assert torch.equal(x.view(-1), expected)
    # Not contiguous: every other column of a larger tensor, whose other columns stay as they are.
    wide = torch.full((60, 20), 5.0)
    wide[:, ::2] = everyones[rank].view(60, 10)
    sr.all_reduce(wide[:, ::2], "int8", seed=1)
    assert torch.equal(wide[:, ::2].reshape(-1), expected)
    assert torch.equal(wide[:, 1::2], torch.full((60, 10), 5.0))
    leaf = torch.nn.Parameter(everyones[rank].clone())
    sr.all_reduce(leaf, "int8", seed=1)
    assert torch.equal(leaf.detach(), expected)
    scalar = torch.tensor(float(rank))
    sr.all_reduce(scalar, "fp16")
    assert scalar.shape == ()
    assert scalar.item() == (world - 1) / 2


def test_shapes() -> None:
    run(_shapes, 2)


def _subgroups(rank: int, world: int) -> None:
    # Overlapping groups, first used in an order in which each rank knows of a different number of groups.
    low = dist.new_group([0, 1])
    high = dist.new_group([1, 2])
    everyones = inputs(1000, world, torch.float32)
    for group, members in ((high, [1, 2]), (low, [0, 1])):
        if rank in members:
            x = everyones[rank].clone()
            sr.all_reduce(x, "int4", group=group, seed=5)
            chosen = [everyones[member] for member in members]
            assert equal_bits(x, composed_all_reduce(chosen, sr.IntQuant(4), dist.ReduceOp.AVG, seed=5))
        else:
            with pytest.raises(ValueError, match="not a member"):
                sr.all_reduce(everyones[rank].clone(), "int4", group=group)
    x = everyones[rank].clone()
    sr.all_reduce(x, "int4", seed=5)
    assert equal_bits(x, composed_all_reduce(everyones, sr.IntQuant(4), dist.ReduceOp.AVG, seed=5))


def test_overlapping_subgroups() -> None:
    run(_subgroups, 3)


def _fresh_seeds(rank: int, world: int) -> list[torch.Tensor]:
    results = []
    for _ in range(3):
        x = inputs(1000, world, torch.float32)[rank]
        sr.all_reduce(x, "int4")
        assert gathered_equal(x)
        results.append(x)
    return results


def test_calls_without_a_seed_round_differently() -> None:
    first, second, third = run(_fresh_seeds, 2)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def _non_finite(rank: int, world: int) -> None:
    for codec in ("int4", "int4-hadamard", "sign", "fp16", "fp8-e4m3", "topk:0.01", "topk:0.01,values=fp16"):
        for value in (float("nan"), float("inf"), float("-inf")):
            x = inputs(2048, world, torch.float32)[rank]
            if rank == 1:
                x[700] = value
            sr.all_reduce(x, codec)
            assert gathered_equal(x)
            assert not x[700].isfinite()
            assert x[1024:].isfinite().all()


def test_non_finite_values_reach_every_rank() -> None:
    run(_non_finite, 2)


def _future(rank: int, world: int) -> None:
    everyones = inputs(5000, world, torch.float32)
    expected = composed_all_reduce(everyones, sr.IntQuant(4), dist.ReduceOp.AVG, seed=2)
    x = everyones[rank].clone().view(50, 100)
    work = sr.all_reduce(x, "int4", async_op=True, seed=2)
    assert isinstance(work, sr.Work)
    doubled = work.get_future().then(lambda future: future.value() * 2)
    assert work.wait()
    assert work.is_completed()
    assert torch.equal(x.view(-1), expected)
    assert work.get_future().wait() is x
    assert torch.equal(doubled.wait().view(-1), expected * 2)


def test_work_and_future() -> None:
    run(_future, 2)


def _destroyed_and_made_again(rank: int, world: int, folder: str) -> None:
    from smallreduce.collectives import shutdown

    x = torch.ones(100)
    group = dist.new_group([0, 1])
    for _ in range(2):
        sr.all_reduce(x, "fp16", group=group)
        shutdown(group)
    sr.all_reduce(x, "fp16")
    shutdown()
    for attempt in range(3):
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{attempt}", world), rank=rank, world_size=world)
        sr.all_reduce(x, "fp16", op=dist.ReduceOp.SUM)
    assert torch.equal(x, torch.full((100,), float(world**3)))


def test_groups_come_and_go(tmp_path: object) -> None:
    run(_destroyed_and_made_again, 2, str(tmp_path))


def _subgroup_leaves_nothing(rank: int, world: int) -> None:
    sr.all_reduce(torch.ones(100), "fp16")
    groups, threads = len(c10d._world.pg_map), threading.active_count()
    group: dist.ProcessGroup | None = dist.new_group([0, 1])
    sr.all_reduce(torch.ones(100), "fp16", group=group)
    dist.destroy_process_group(group)
    group = None
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "smallreduce-destroy":
            thread.join()
    assert len(c10d._world.pg_map) == groups
    assert all(not thread.name.startswith("smallreduce") for thread in threading.enumerate()[threads:])
    sr.all_reduce(torch.ones(100), "fp16")


def test_a_destroyed_subgroup_leaves_no_groups_behind() -> None:
    run(_subgroup_leaves_nothing, 2)


def _outlier_errors(rank: int, world: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(128 * 1000, generator=generator).view(1000, 128)
    x[torch.arange(1000), torch.randint(128, (1000,), generator=generator)] = 100.0
    exact = x.clone()
    dist.all_reduce(exact)
    exact /= world
    errors = {}
    for codec in ("int4", "int4-hadamard"):
        y = x.clone()
        sr.all_reduce(y, codec, seed=0)
        errors[codec] = ((y - exact).norm() / exact.norm()).item()
    return errors


def test_hadamard_spreads_outliers() -> None:
    errors = run(_outlier_errors, 2)[0]
    # Stochastic rounding to steps of s errs by s * E|x| = 0.8 s in the square where |x| is far below s, by s**2 / 6
    # where it is above. int4: s = 100 / 7, so 11.4. Hadamard spreads 100 over its block as 100 / sqrt(32) = 17.7, to
    # which come 3 sigma: s = 3, so 1.5: a factor of 2.8 in the norm. In the second stage outliers are smaller, two to a
    # group, and the factor too.
    assert errors["int4-hadamard"] < errors["int4"] / 2
