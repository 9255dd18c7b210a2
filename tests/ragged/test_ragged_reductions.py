"""Norms and sums over all ranks, and what stands on them: gradient clipping and the gradient scaler."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ragged.layouts import SHAPES, sharded
from ranks import run
from smallreduce import metrics
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._tensor import RaggedTensor

BACKEND = metrics.register_counting_backend()

ORDERS = [2, 1, math.inf, -math.inf, 0, 3, 0.5, -1]


def _whole(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _same_on_all_ranks(values: list[Tensor]) -> bool:
    mine = [(value.dtype, value.shape, value.view(-1).view(torch.uint8).tolist()) for value in values]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return all(theirs == mine for theirs in everyones)


def _bound(order: float, numel: int, dtype: torch.dtype) -> float:
    """Of the relative error. A term ``|x|**p`` is off by 2 units of rounding at most, where p is not 1, and a sum of n
    by n - 1 more, whatever their order; the root divides that by p, and is itself off by 2 at most. So is each rank's
    norm, and that of the norms, in fp64, adds nothing to speak of; the result is rounded once more."""
    unit = torch.finfo(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype).eps / 2
    if math.isinf(order) or order == 0:
        return torch.finfo(dtype).eps / 2 if order == 0 else 0.0
    return ((numel + 2) / abs(order) + 3) * unit + torch.finfo(dtype).eps / 2


def _norms(rank: int, world: int) -> None:
    rng = random.Random(world)
    for order in ORDERS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            wholes = [_whole(shape, seed).to(dtype) for seed, shape in enumerate(SHAPES) if math.prod(shape)]
            tensors = [sharded(whole, rng) for whole in wholes]
            alone = [torch.linalg.vector_norm(tensor, order) for tensor in tensors]
            metrics.reset()
            together = torch._foreach_norm(tensors, order)
            calls = {name: sent.calls for name, sent in metrics.sent().items()}
            assert calls == {"all_gather": 1}
            assert metrics.bytes_sent() == 8 * len(tensors) * (world - 1)
            assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
            assert _same_on_all_ranks(alone)
            for norm, whole in zip(alone, wholes, strict=True):
                assert type(norm) is Tensor and norm.shape == () and norm.dtype == dtype
                exact = torch.linalg.vector_norm(whole.double(), order).item()
                assert abs(norm.item() - exact) <= _bound(order, whole.numel(), dtype) * exact, (order, dtype)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_norms(world: int) -> None:
    run(_norms, world, backend=BACKEND)


def _forms(rank: int, world: int) -> None:
    rng = random.Random(1)
    whole = _whole((7, 5))
    tensor = sharded(whole, rng)
    norm = torch.linalg.vector_norm(tensor)
    assert torch.equal(tensor.norm(), norm) and torch.equal(torch.norm(tensor, dim=(0, 1)), norm)
    assert torch.linalg.vector_norm(tensor, dtype=torch.float64).dtype == torch.float64
    assert torch.linalg.vector_norm(tensor.half(), dtype=torch.float32).dtype == torch.float32
    plain = _whole((3,))
    one, other, double = torch._foreach_norm([tensor, plain, tensor.double()])
    assert torch.equal(one, norm) and torch.equal(other, plain.norm()) and double.dtype == torch.float64
    complex_whole = torch.complex(whole, -2 * whole)
    found = torch.linalg.vector_norm(RaggedTensor.distribute(complex_whole, tensor.placement))
    assert found.dtype == torch.float32
    exact = complex_whole.to(torch.complex128).norm().item()  # that of the real and the imaginary parts
    assert abs(found.item() - exact) <= _bound(2, 2 * whole.numel(), torch.float32) * exact

    # Values that are not finite, wherever they are.
    for rank_of_it in range(world):
        placement = RaggedShard.on_root(rank_of_it, world)
        for value in (math.inf, math.nan):
            for order in (2, math.inf):
                bad = RaggedTensor.distribute(torch.tensor([1.0, value]), placement)
                assert str(torch.linalg.vector_norm(bad, order).item()) == str(value)

    # Of none at all it is torch's own answer, or refusal, and nothing is sent.
    empty = RaggedTensor.distribute(torch.zeros(0, 4), RaggedShard((), (1,) * world))
    assert torch.linalg.vector_norm(empty) == 0
    with pytest.raises(RuntimeError):
        torch.linalg.vector_norm(empty, math.inf)
    with pytest.raises(RuntimeError):
        torch.linalg.vector_norm(
            RaggedTensor.distribute(torch.ones(2, dtype=torch.int32), RaggedShard.on_root(0, world))
        )
    for function in (
        lambda: torch.linalg.vector_norm(tensor, dim=0),
        lambda: torch.linalg.vector_norm(tensor, keepdim=True),
        lambda: torch.linalg.vector_norm(tensor, out=torch.zeros(())),
        lambda: tensor.sum(0),
        lambda: tensor.sum((0, 1), keepdim=True),
    ):
        with pytest.raises(
            NotImplementedError, match="over some of its dimensions, with keepdim or into a given tensor"
        ):
            function()


def test_forms_and_edges_of_norms() -> None:
    run(_forms, 3)


def _sums(rank: int, world: int) -> None:
    rng = random.Random(world)
    for shape in SHAPES:
        numbers = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(1))
        # Sums of these are exact in all of the types.
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.int64,
            torch.int8,
            torch.bool,
            torch.complex64,
        ):
            whole = numbers.to(dtype)
            found = sharded(whole, rng).sum()
            assert type(found) is Tensor and found.dtype == whole.sum().dtype and torch.equal(found, whole.sum())
        assert torch.equal(sharded(numbers, rng).sum(dtype=torch.float32), numbers.sum(dtype=torch.float32))
        tensor = sharded(_whole(shape), rng)
        found, exact = tensor.sum(tuple(range(len(shape)))), _whole(shape).double().sum().item()
        assert _same_on_all_ranks([found])
        unit = torch.finfo(torch.float32).eps / 2
        assert abs(found.item() - exact) <= (math.prod(shape) + 1) * unit * _whole(shape).double().abs().sum().item()


@pytest.mark.parametrize("world", [1, 3])
def test_sums(world: int) -> None:
    run(_sums, world)


def _truths(rank: int, world: int) -> None:
    rng = random.Random(world)
    for shape in SHAPES:
        for dtype in (torch.bool, torch.float32):
            ones = torch.ones(shape, dtype=dtype)
            wholes = [ones, torch.zeros_like(ones)]
            if ones.numel():
                for odd in (0, ones.numel() // 2, ones.numel() - 1):
                    wholes.append(ones.clone())
                    wholes[-1].view(-1)[odd] = 0
                wholes += [1 - whole.int() for whole in wholes[2:]]
            for whole in wholes:
                tensor = sharded(whole, rng)
                assert torch.equal(tensor.any(), whole.any()) and torch.equal(tensor.all(), whole.all())

    tensor = sharded(torch.ones(7, 5), rng)
    assert tensor.any(dim=(0, -1)) and tensor.sum(dim=(1, 0)) == 35
    with pytest.raises(NotImplementedError, match="over some of its dimensions"):
        tensor.any(dim=())  # which torch takes for none of them
    with pytest.raises(IndexError, match=r"shape \(7, 5\) has no dimension 2"):
        tensor.sum(dim=(0, 2))


@pytest.mark.parametrize("world", [1, 3])
def test_any_and_all(world: int) -> None:
    run(_truths, world)


def _clipping(rank: int, world: int) -> None:
    rng = random.Random(world)
    shapes = [shape for shape in SHAPES if math.prod(shape)]
    numel = sum(map(math.prod, shapes))
    for norm_type in (2.0, 1.0, math.inf):
        ragged = [nn.Parameter(sharded(_whole(shape), rng)) for shape in shapes]
        plain = [nn.Parameter(_whole(shape)) for shape in shapes]
        for number, (one, other) in enumerate(zip(ragged, plain, strict=True)):
            other.grad = _whole(tuple(other.shape), 1 + number)
            one.grad = RaggedTensor.distribute(other.grad, one.placement)
        total = torch.nn.utils.get_total_norm([each.grad for each in ragged], norm_type)
        found = torch.nn.utils.clip_grad_norm_(ragged, 0.5, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(plain, 0.5, norm_type)
        assert torch.equal(found, total)
        # Both are off by what a norm is at most; of the clipped gradients each is off by as much as its factor.
        bound = 2 * _bound(norm_type, numel, torch.float32)
        assert abs(found.item() - expected.item()) <= bound * expected.item()
        for one, other in zip(ragged, plain, strict=True):
            difference = (one.grad.full_tensor() - other.grad).abs()
            assert torch.all(difference <= (bound + 3 * torch.finfo(torch.float32).eps) * other.grad.abs())
        assert _same_on_all_ranks([found, *(one.grad.full_tensor() for one in ragged)])


@pytest.mark.parametrize("world", [1, 3])
def test_clip_grad_norm(world: int) -> None:
    run(_clipping, world)


def _scaler(rank: int, world: int, fused: bool) -> None:
    rng = random.Random(2)
    shapes = [(7, 5), (13,)]
    sides: list[tuple[list[Any], Any, Any]] = []
    placements: list[RaggedShard] = []
    for side in ("ragged", "plain"):
        parameters = [nn.Parameter(sharded(_whole(s), rng) if side == "ragged" else _whole(s)) for s in shapes]
        placements = placements or [each.placement for each in parameters]
        optimizer = torch.optim.SGD(parameters, lr=0.5, fused=fused)
        sides.append((parameters, optimizer, torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)))
    for step in range(6):
        for parameters, optimizer, scaler in sides:
            scaler.scale(torch.zeros((), requires_grad=True)).backward()
            for number, parameter in enumerate(parameters):
                gradient = scaler.get_scale() * _whole(shapes[number], 10 * step + number)
                if step in (1, 4) and number == 1:  # on one rank
                    gradient[(step * 3) % 13] = math.inf if step == 1 else math.nan
                if isinstance(parameter, RaggedTensor):
                    gradient = RaggedTensor.distribute(gradient, placements[number])
                parameter.grad = gradient
            if not fused:  # which unscales as it goes
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        (ragged, _, ours), (plain, _, theirs) = sides
        assert ours.get_scale() == theirs.get_scale()
        # Scales are powers of two, and an SGD step rounds each element once: the cuts do not show.
        assert all(torch.equal(one.full_tensor(), other) for one, other in zip(ragged, plain, strict=True)), step
    assert sides[0][2].get_scale() != 8.0


@pytest.mark.parametrize("world, fused", [(1, False), (2, False), (4, False), (3, True)])
def test_gradient_scaler(world: int, fused: bool) -> None:
    run(_scaler, world, fused)


def _nested(rank: int, world: int, dtype: torch.dtype) -> list[tuple[float, list[float]]]:
    """Pairs of ranks lie in the group of all: what one of a pair finds, all learn, in whatever order tensors come."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    found = []
    for place in (0, 1):
        weights = [
            nn.Parameter(RaggedTensor.distribute(torch.ones(8), RaggedShard((0,), (1,) * world))),
            nn.Parameter(RaggedTensor.distribute(torch.ones(8, dtype=dtype), RaggedShard((0,), (1, 1)), pair)),
        ]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        if rank == 3:
            weights[place].grad.to_local()[0] = math.inf
        optimizer, scaler = torch.optim.SGD(weights), torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(torch.zeros((), requires_grad=True)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append((scaler.get_scale(), [value for weight in weights for value in weight.full_tensor().tolist()]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_scaler_of_groups_in_one_another(dtype: torch.dtype) -> None:
    assert run(_nested, 4, dtype) == [[(1.0, [1.0] * 16)] * 2] * 4
