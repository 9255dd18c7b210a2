"""BlockAdam8bit: the bits of its reference, and those of one rank wherever a parameter was cut."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import smallreduce as sr
from optim.block_adam_reference import BlockAdamReference
from optim.sharded_parameters import Pair, cut, full, give, gradient, pair
from ranks import run
from smallreduce.optim import _block_step
from smallreduce.optim._block_tiles import Tiling
from smallreduce.ragged import RaggedShard, RaggedTensor

BACKEND = sr.metrics.register_counting_backend()
SHAPES: list[tuple[int, ...]] = [
    (70, 50), (64, 96), (33, 1), (5, 3, 40), (200, 7), (600,), (256,), (1,), (), (4, 33), (0, 4), (3, 0), (0,),
]  # fmt: skip
STEPS = 4
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.75, 0.9), "eps": 1e-6, "weight_decay": 0.1}
NAMES = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape])
@pytest.mark.parametrize("block", [32, 8])
def test_bits_are_those_of_the_reference(shape: tuple[int, ...], block: int) -> None:
    weight = nn.Parameter(gradient(0, 0, shape))
    optimizer = sr.optim.BlockAdam8bit([weight], block=block, **OPTIONS)
    reference = BlockAdamReference(weight.detach().numpy(), block, **OPTIONS)
    for step in range(1, STEPS + 1):
        weight.grad = gradient(step, 0, shape)
        optimizer.step()
        reference.step(weight.grad.numpy())
        assert np.array_equal(weight.detach().numpy(), reference.parameter.reshape(shape)), step
        state = optimizer.state[weight]
        assert state["step"] == step
        for name, expected in zip(NAMES, (*reference.exp_avg, *reference.exp_avg_sq), strict=True):
            assert np.array_equal(state[name].numpy().reshape(expected.shape), expected), (step, name)


def test_the_first_step_is_that_of_adamw() -> None:
    """Whose moments are not rounded yet. Each of ten operations, some of which torch makes one of, rounds once."""
    weights = [nn.Parameter(gradient(0, 0, (40, 40))) for _ in range(2)]
    for kind, weight in zip((sr.optim.BlockAdam8bit, torch.optim.AdamW), weights, strict=True):
        weight.grad = gradient(1, 0, (40, 40))
        kind([weight], **OPTIONS).step()
    update = (weights[1] - gradient(0, 0, (40, 40))).abs().max()
    scale = weights[1].detach().abs() + update
    assert ((weights[0] - weights[1]).abs() <= 10 * 2.0**-24 * scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    """Moments are those of an fp32 parameter that has the same gradients."""
    weight = nn.Parameter(gradient(0, 0, (40, 40), dtype))
    wide = nn.Parameter(weight.detach().to(torch.promote_types(dtype, torch.float32)))
    optimizers = [sr.optim.BlockAdam8bit([one], **OPTIONS) for one in (weight, wide)]
    for step in range(1, STEPS + 1):
        wide.data.copy_(weight)
        weight.grad = gradient(step, 0, (40, 40), dtype)
        wide.grad = weight.grad.to(wide.dtype)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(weight, wide.to(dtype))
        for name in NAMES:
            assert torch.equal(optimizers[0].state[weight][name], optimizers[1].state[wide][name])


@pytest.mark.parametrize("numel", [1, 3000, 1 << 20])
def test_bits_do_not_depend_on_how_much_is_computed_at_a_time(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(gradient(0, 0, (200, 50))) for _ in range(2)]
    for at, weight in enumerate(weights):
        if at:
            monkeypatch.setattr(_block_step, "_CPU_NUMEL", numel)
        optimizer = sr.optim.BlockAdam8bit([weight], **OPTIONS)
        for step in (1, 2, 3):
            weight.grad = gradient(step, 0, (200, 50))
            optimizer.step()
    assert torch.equal(*weights)


def test_memory_that_is_not_contiguous() -> None:
    plain = nn.Parameter(gradient(0, 0, (40, 50)))
    turned = nn.Parameter(plain.detach().T.contiguous().T)
    assert not turned.is_contiguous()
    for weight in (plain, turned):
        weight.grad = gradient(1, 0, (40, 50))
        sr.optim.BlockAdam8bit([weight], **OPTIONS).step()
    assert torch.equal(plain, turned)


# ---- sharded ---------------------------------------------------------------------------------------------------------


def _pairs(world: int, seed: int) -> list[Pair]:
    rng = random.Random(seed)
    pairs = []
    for index, shape in enumerate(SHAPES):
        tiling = Tiling.of(shape, 32)
        pairs.append(pair(index, shape, cut(rng, shape, max(1, tiling.height * tiling.cols), world)))
    return pairs


def _sharded(rank: int, world: int) -> None:
    sr.metrics.reset()
    for seed in range(3):
        pairs = _pairs(world, seed)
        optimizers = [sr.optim.BlockAdam8bit([one[side] for one in pairs], **OPTIONS) for side in (0, 1)]
        for step in range(1, STEPS + 1):
            for index, one in enumerate(pairs):
                give(one, step, index)
                if (step + index) % 5 == 0:
                    one[0].grad = one[1].grad = None
            for optimizer in optimizers:
                optimizer.step()
        assert sr.metrics.bytes_sent() == 0
        for plain, sharded in pairs:
            assert torch.equal(full(sharded), plain)
            states = [optimizer.state[p] for optimizer, p in zip(optimizers, (plain, sharded), strict=True)]
            for name in NAMES:
                assert isinstance(states[1][name], RaggedTensor)
                assert torch.equal(full(states[1][name]), states[0][name]), name
            assert states[1]["exp_avg"].placement == sharded.placement  # type: ignore[attr-defined]
        sr.metrics.reset()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_bits_do_not_depend_on_how_a_parameter_was_cut(world: int) -> None:
    run(_sharded, world, backend=BACKEND)


def _fully_sharded(rank: int, world: int) -> int:
    """With its granularity, beside a copy that is given the same gradients; returns the bytes of this rank's state."""
    torch.manual_seed(0)
    layers = [nn.Linear(100, 70), nn.LayerNorm(70), nn.Linear(70, 300), nn.Conv2d(3, 40, 5)]
    copies = copy.deepcopy(layers)
    for layer in layers:
        sr.ragged.fully_shard(layer, granularity=sr.optim.BlockAdam8bit.granularity)
    sharded, plain = ([p for layer in of for p in layer.parameters()] for of in (layers, copies))
    optimizers = [sr.optim.BlockAdam8bit(parameters, **OPTIONS) for parameters in (sharded, plain)]
    for step in (1, 2, 3):
        for index, (a, b) in enumerate(zip(sharded, plain, strict=True)):
            give((b, a), step, index)
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(full(a), b) for a, b in zip(sharded, plain, strict=True))
    return _nbytes(optimizers[0])


def _nbytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        (value.to_local() if isinstance(value, RaggedTensor) else value).nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )


def test_its_granularity_is_what_fully_shard_needs() -> None:
    shares = run(_fully_sharded, 3)
    shapes = [(70, 100), (300, 70), (40, 3, 5, 5)]
    tiles = 3 * 4 + 10 * 3 + 40 * 3 * 5 // 32 + 1
    assert 40 * 3 * 5 % 32
    vectors = [70, 70, 70, 300, 40]
    expected = 2 * sum(int(np.prod(shape)) for shape in shapes) + 8 * tiles
    expected += 2 * sum(vectors) + 8 * sum(-(-numel // 256) for numel in vectors)
    assert sum(shares) == expected
    assert max(shares) < expected  # no rank has all of it


def test_state_takes_two_bytes_and_eight_for_each_block() -> None:
    weights = [nn.Parameter(torch.randn(256, 512)), nn.Parameter(torch.randn(1024))]
    optimizer = sr.optim.BlockAdam8bit(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert _nbytes(optimizer) == 256 * 512 * (2 + 8 / 1024) + 1024 * (2 + 8 / 256)


# ---- use -------------------------------------------------------------------------------------------------------------


def test_learns() -> None:
    """Least squares, to within a hundredth of where it began."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 40)
    targets = inputs @ torch.randn(40, 40)
    weight = nn.Parameter(torch.zeros(40, 40))
    optimizer = sr.optim.BlockAdam8bit([weight], lr=torch.tensor(0.05), weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (inputs @ weight - targets).square().mean()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(200)]
    assert losses[-1] < losses[0] / 100


def test_groups_have_options_of_their_own() -> None:
    shape = (40, 40)
    options: list[dict[str, Any]] = [OPTIONS, {"lr": 0.1, "betas": (0.5, 0.5), "block": 16}]
    together, apart = ([nn.Parameter(gradient(0, index, shape)) for index in range(2)] for _ in range(2))
    groups = [{"params": [weight], **given} for weight, given in zip(together, options, strict=True)]
    optimizers = [sr.optim.BlockAdam8bit(groups)]
    optimizers += [sr.optim.BlockAdam8bit([weight], **given) for weight, given in zip(apart, options, strict=True)]
    for step in (1, 2, 3):
        for index, weight in enumerate((*together, *apart)):
            weight.grad = gradient(step, index % 2, shape)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1"),
        ({"lr": torch.ones(3)}, ValueError, "lr must be one number"),
        ({"betas": 0.9}, ValueError, r"betas must be two numbers, got 0\.9"),
        ({"betas": (0.9,)}, ValueError, r"betas must be two numbers, got \(0\.9,\)"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be below 1, got 1\.0"),
        ({"betas": (0.9, "0.5")}, TypeError, "betas must be a number, got str"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be at least 0, got inf"),
        ({"block": 0}, ValueError, "block must be at least 1, got 0"),
        ({"block": 2.0}, TypeError, "block must be an int, got float"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sr.optim.BlockAdam8bit([nn.Parameter(torch.ones(2, 2))], **options)


def _refusals(rank: int, world: int) -> None:
    def refused(shape: tuple[int, ...], lengths: list[int], message: str, **options: Any) -> None:
        placement = RaggedShard.from_lengths(shape, lengths)
        weight = nn.Parameter(RaggedTensor.distribute(torch.ones(shape), placement))
        with pytest.raises(ValueError, match=message):
            sr.optim.BlockAdam8bit([("head.weight", weight)], **options)

    hint = r"fully_shard\(granularity=BlockAdam8bit\.granularity\)"
    refused((64, 8), [100, 412], rf"blocks of 32 rows, but rank 0 holds elements 0 to 100 of head\.weight.*{hint}")
    refused((64, 8), [31 * 8, 33 * 8], "blocks of 32 rows, but rank 0 holds elements 0 to 248")
    refused((64, 8), [32 * 8, 32 * 8], "blocks of 48 rows", block=48)
    refused((600,), [300, 300], "blocks of 256 elements, but rank 0 holds elements 0 to 300")

    placements = [RaggedShard.on_root(root, 2) for root in (0, 1)]
    weight = nn.Parameter(RaggedTensor.distribute(torch.ones(4, 4), placements[0]))
    optimizer = sr.optim.BlockAdam8bit([("head.weight", weight)])
    weight.grad = RaggedTensor.distribute(torch.ones(4, 4), placements[1])
    with pytest.raises(ValueError, match=r"head\.weight is sharded by RaggedShard.* but its gradient by RaggedShard"):
        optimizer.step()

    elsewhere = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Replicate()])
    with pytest.raises(TypeError, match="takes plain tensors and RaggedTensors, but parameter 0 is a DTensor"):
        sr.optim.BlockAdam8bit([nn.Parameter(elsewhere)])


def test_parameters_that_were_cut_elsewhere_are_refused_on_all_ranks() -> None:
    run(_refusals, 2)


def test_parameters_and_gradients_of_other_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match=r"parameter 0 is of torch\.complex64"):
        sr.optim.BlockAdam8bit([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = sr.optim.BlockAdam8bit(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of parameter 0 must be dense, got torch\.sparse_coo"):
        optimizer.step()


def test_granularity_of_other_blocks() -> None:
    matrix, vector = torch.ones(3, 3), torch.ones(3)
    granularity = functools.partial(sr.optim.BlockAdam8bit.granularity, block=64)
    assert (granularity("", matrix), granularity("", vector)) == (64, 256)
    assert (
        sr.optim.BlockAdam8bit.granularity("", matrix.view(3, 3, 1)),
        sr.optim.BlockAdam8bit.granularity("", vector),
    ) == (32, 256)
