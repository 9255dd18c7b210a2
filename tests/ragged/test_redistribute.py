"""Redistribution: every rank ends with the range that the target gives it, and nothing travels but what must."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate

from ragged.layouts import SHAPES, uneven
from ranks import run
from smallreduce import metrics
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._redistribute import Redistribution, redistribute, redistribute_many

BACKEND = metrics.register_counting_backend()

WORLDS = [1, 2, 3, 4]

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex64, torch.complex128),
]


def _whole(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random bits, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    size = (math.prod(shape) * dtype.itemsize,)
    values = torch.randint(0, 2 if dtype == torch.bool else 256, size, generator=generator, dtype=torch.uint8)
    return values.view(dtype).view(shape)


def _range(whole: Tensor, placement: RaggedShard, rank: int) -> Tensor:
    begin, end = placement.ranges(whole.shape)[rank]
    return whole.reshape(-1)[begin:end].clone()


def _same(one: Tensor, other: Tensor) -> bool:
    """In bits: NaN equals itself."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


def _moved(source: RaggedShard, target: RaggedShard, shape: tuple[int, ...], rank: int) -> int:
    """Elements of this rank that another shall have."""
    (begin, end), (first, last) = source.ranges(shape)[rank], target.ranges(shape)[rank]
    return end - begin - len(set(range(begin, end)) & set(range(first, last)))


def _between_layouts(rank: int, world: int) -> None:
    rng = random.Random(world)
    for trial in range(40):
        shape = rng.choice(SHAPES)
        source, target = uneven(rng, shape, world), uneven(rng, shape, world)
        if trial % 3 == 0:
            target = RaggedShard.on_root(trial % world, world)
        if trial % 5 == 0:
            source, target = target, source
        whole = _whole(shape, seed=trial)
        local = _range(whole, source, rank)
        metrics.reset()
        moving = redistribute(local, shape, source, target, async_op=True)
        found = moving.wait()
        assert _same(found, _range(whole, target, rank)), (shape, source, target)
        assert moving.wait() is found
        assert moving.bytes_sent == metrics.bytes_sent() == 4 * _moved(source, target, shape, rank)
        stays = source.ranges(shape) == target.ranges(shape)
        assert metrics.sent().get("all_to_all", metrics.Sent()).calls == (0 if stays else 1)
        assert sum(sent.calls for sent in metrics.sent().values()) == (0 if stays else 1)
        assert _same(redistribute(local, shape, source, target), found)
        if stays:
            assert found.data_ptr() == local.data_ptr()
        assert _same(local, _range(whole, source, rank))


@pytest.mark.parametrize("world", WORLDS)
def test_between_layouts(world: int) -> None:
    run(_between_layouts, world, backend=BACKEND)


def _to_all_and_from(rank: int, world: int) -> None:
    rng = random.Random(10 + world)
    for trial in range(30):
        shape = rng.choice(SHAPES)
        numel = math.prod(shape)
        placement = uneven(rng, shape, world)
        if trial % 4 == 0:
            shape, numel = (world, 3), 3 * world
            placement = RaggedShard((0,), (1,) * world)
        whole = _whole(shape, seed=trial)
        local = _range(whole, placement, rank)
        metrics.reset()
        moving = redistribute(local, shape, placement, Replicate(), async_op=True)
        assert _same(moving.wait(), whole), (shape, placement)
        assert moving.bytes_sent == metrics.bytes_sent() == 4 * (world - 1) * local.numel()
        if world > 1 and numel:
            lengths = [end - begin for begin, end in placement.ranges(shape)]
            even = len(set(lengths)) == 1
            calls = {name: sent.calls for name, sent in metrics.sent().items()}
            assert calls == ({"all_gather": 1} if even else {"broadcast": sum(length > 0 for length in lengths)})

        metrics.reset()
        taken = redistribute(whole, shape, Replicate(), placement)
        assert _same(taken, local)
        assert taken.numel() == 0 or taken.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert redistribute(whole, shape, Replicate(), Replicate()) is whole
        assert metrics.bytes_sent() == 0


@pytest.mark.parametrize("world", WORLDS)
def test_to_all_ranks_and_from_them(world: int) -> None:
    run(_to_all_and_from, world, backend=BACKEND)


def _dtypes(rank: int, world: int) -> None:
    rng = random.Random(3)
    shape = (7, 5)
    for seed, dtype in enumerate(DTYPES):
        whole = _whole(shape, dtype, seed)
        source, target = uneven(rng, shape, world), uneven(rng, shape, world)
        local = _range(whole, source, rank)
        assert _same(redistribute(local, shape, source, target), _range(whole, target, rank)), dtype
        assert _same(redistribute(local, shape, source, Replicate()), whole), dtype
        (there,) = redistribute_many([local], [shape], [source], [RaggedShard.on_root(1, world)])
        assert _same(there, whole.reshape(-1) if rank == 1 else whole.reshape(-1)[:0]), dtype


def test_all_dtypes() -> None:
    run(_dtypes, 3)


def _many(rank: int, world: int) -> None:
    rng = random.Random(20 + world)
    for trial in range(20):
        shapes = [rng.choice(SHAPES) for _ in range(rng.randint(1, 6))]
        sources = [uneven(rng, shape, world) for shape in shapes]
        roots = [RaggedShard.on_root(rng.randrange(world), world) for _ in shapes]
        targets = [uneven(rng, shape, world) for shape in shapes] if trial % 2 else roots
        wholes = [_whole(shape, torch.bfloat16, seed) for seed, shape in enumerate(shapes)]
        locals = [_range(whole, source, rank) for whole, source in zip(wholes, sources, strict=True)]
        metrics.reset()
        moving = redistribute_many(locals, shapes, sources, targets, async_op=True)
        found = moving.wait()
        expected = [_range(whole, target, rank) for whole, target in zip(wholes, targets, strict=True)]
        assert all(_same(one, other) for one, other in zip(found, expected, strict=True)), (shapes, sources, targets)
        triples = zip(sources, targets, shapes, strict=True)
        assert moving.bytes_sent == metrics.bytes_sent() == 2 * sum(_moved(*triple, rank) for triple in triples)
        assert sum(sent.calls for sent in metrics.sent().values()) <= 1
        back = redistribute_many(found, shapes, targets, sources)
        assert all(_same(one, other) for one, other in zip(back, locals, strict=True))
    assert redistribute_many([], [], [], []) == []


@pytest.mark.parametrize("world", WORLDS)
def test_many_at_once(world: int) -> None:
    run(_many, world, backend=BACKEND)


def _where_it_arrived(rank: int, world: int) -> None:
    """What comes back from roots is not copied again: each tensor has one sender."""
    shapes = [(8, 3), (5,), (4, 4)]
    spread = [RaggedShard.from_lengths(shape, [math.prod(shape) - 2, 2]) for shape in shapes]
    roots = [RaggedShard.on_root(index % world, world) for index in range(len(shapes))]
    wholes = [_whole(shape) for shape in shapes]
    held = [_range(whole, root, rank) for whole, root in zip(wholes, roots, strict=True)]
    back = redistribute_many(held, shapes, roots, spread)
    assert len({tensor.untyped_storage().data_ptr() for tensor in back}) == 1
    assert all(_same(one, _range(whole, s, rank)) for one, whole, s in zip(back, wholes, spread, strict=True))


def test_a_tensor_from_one_rank_stays_where_it_arrived() -> None:
    run(_where_it_arrived, 2)


def _in_flight(rank: int, world: int) -> None:
    """Several at a time, waited for in another order; in a group that is not the default one."""
    group = dist.new_group(list(range(1, world)))
    dist.barrier()
    if rank == 0:
        return
    rng = random.Random(5)
    shape, ranks = (64, 3), world - 1
    source = uneven(rng, shape, ranks)
    targets = [uneven(rng, shape, ranks) for _ in range(4)]
    wholes = [_whole(shape, seed=seed) for seed in range(4)]
    moving: list[Redistribution[Tensor]] = [
        redistribute(_range(whole, source, rank - 1), shape, source, target, group, async_op=True)
        for whole, target in zip(wholes, targets, strict=True)
    ]
    gathering = redistribute(_range(wholes[0], source, rank - 1), shape, source, Replicate(), group, async_op=True)
    assert _same(gathering.wait(), wholes[0])
    for one, whole, target in reversed(list(zip(moving, wholes, targets, strict=True))):
        assert _same(one.wait(), _range(whole, target, rank - 1))


def test_several_in_flight_in_a_group() -> None:
    run(_in_flight, 4)


def _refused(rank: int, world: int) -> None:
    even, odd = RaggedShard((0,), (1, 1)), RaggedShard((0,), (1, 3))
    local = torch.zeros(8)

    def refused(error: type[Exception], message: str, *args: object) -> None:
        with pytest.raises(error, match=message):
            redistribute(*args)  # type: ignore[call-overload]

    refused(ValueError, r"must be this rank's 8 elements, .* got shape \(7,\)", local[:7], (4, 4), even, odd)
    refused(ValueError, r"1-D and contiguous, got shape \(2, 4\)", local.view(2, 4), (4, 4), even, odd)
    refused(ValueError, r"strides \(2,\)", torch.zeros(16)[::2], (4, 4), even, odd)
    refused(ValueError, "for 3 ranks, but the group has 2", local, (4, 4), even, RaggedShard((0,), (1, 1, 2)))
    refused(ValueError, "for 3 ranks, but the group has 2", local, (4, 4), RaggedShard((0,), (1, 1, 2)), Replicate())
    refused(ValueError, "do not divide into the 4 units", torch.zeros(3), (6,), RaggedShard((0,), (1, 1)), odd)
    refused(ValueError, "must be the whole tensor, of shape", local, (4, 4), Replicate(), even)
    refused(TypeError, "source must be a RaggedShard or Replicate", local, (4, 4), (1, 1), even)
    refused(TypeError, "target must be a RaggedShard or Replicate", local, (4, 4), even, 0)
    refused(TypeError, "local must be a tensor, got list", [0.0] * 8, (4, 4), even, odd)
    refused(TypeError, "local must be a tensor, got list", [0.0] * 8, (4, 4), Replicate(), odd)
    refused(TypeError, "must be a torch.distributed.ProcessGroup or None, got str", local, (4, 4), even, odd, "x")

    shapes, two = [(4, 4), (4, 4)], [even, even]
    with pytest.raises(ValueError, match="equally many, got 2, 2, 1 and 2"):
        redistribute_many([local, local], shapes, [even], two)
    with pytest.raises(TypeError, match="of one dtype"):
        redistribute_many([local, local.half()], shapes, two, [odd, odd])
    with pytest.raises(ValueError, match="of one device"):
        redistribute_many([local, local.to("meta")], shapes, two, [odd, odd])
    with pytest.raises(TypeError, match="targets must be RaggedShards, got Replicate"):
        redistribute_many([local, local], shapes, two, [odd, Replicate()])  # type: ignore[list-item]
    dist.barrier()  # nothing was sent: neither rank may leave while the other still connects


def test_bad_arguments() -> None:
    run(_refused, 2)
