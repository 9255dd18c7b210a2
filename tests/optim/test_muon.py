"""Muon: the bits of torch.optim.Muon, wherever matrices were cut, at the cost of one Newton-Schulz each."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import smallreduce as sr
from optim.sharded_parameters import Pair, cut, full, give, gradient, pair
from ranks import run
from smallreduce.ragged import RaggedTensor

SHAPES = [(64, 96), (96, 64), (3, 40), (40, 3), (33, 17), (80, 80), (2, 2), (1, 50), (50, 1), (128, 65), (0, 7)]
STEPS = 5

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.3, "weight_decay": 0.0, "momentum": 0.5, "nesterov": False},
    {"adjust_lr_fn": "match_rms_adamw", "lr": torch.tensor(0.01)},
    {"adjust_lr_fn": "original", "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3, "momentum": 0.0},
]

# What stays whole, in elements: nothing, a row, three rows, a matrix.
BLOCKS: list[Callable[[tuple[int, int]], int]] = [
    lambda shape: 1,
    lambda shape: shape[1],
    lambda shape: 3 * shape[1],
    lambda shape: shape[0] * shape[1] or 1,
]


# Without nesterov torch divides the very momentum of bf16 parameters: test_momentum_is_not_written_to.
CASES = [
    (options, dtype)
    for options in OPTIONS
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype != torch.bfloat16 or options.get("nesterov", True)
]


@pytest.mark.parametrize(("options", "dtype"), CASES)
def test_plain_tensors_have_the_bits_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    parameters = [[nn.Parameter(gradient(0, i, shape, dtype)) for i, shape in enumerate(SHAPES)] for _ in range(2)]
    optimizers = [kind(ps, **options) for kind, ps in zip((sr.optim.Muon, torch.optim.Muon), parameters, strict=True)]
    for step in range(1, STEPS + 1):
        for ps, optimizer in zip(parameters, optimizers, strict=True):
            for index, p in enumerate(ps):
                p.grad = gradient(step, index, p.shape, dtype)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True)), step
    before = [gradient(0, index, shape, dtype) for index, shape in enumerate(SHAPES)]
    assert not any(a.numel() and torch.equal(a, b) for a, b in zip(parameters[0], before, strict=True))


def test_momentum_is_not_written_to() -> None:
    weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = sr.optim.Muon([weight], nesterov=False, momentum=0.5)
    weight.grad = gradient(1, 0, (8, 8), torch.bfloat16)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], weight.grad * 0.5)


def _pairs(rng: random.Random, world: int, blocks: list[int], dtype: torch.dtype = torch.float32) -> list[Pair]:
    return [
        pair(i, shape, cut(rng, shape, BLOCKS[blocks[i % len(blocks)]](shape), world), dtype)
        for i, shape in enumerate(SHAPES)
    ]


def _groups(parameters: list[nn.Parameter], options: list[dict[str, Any]]) -> list[dict[str, Any]]:
    each = len(options)
    return [{"params": parameters[at::each], **given} for at, given in enumerate(options)]


def _equal_to_torch(rank: int, world: int, blocks: list[int], dtype: torch.dtype) -> None:
    for seed, options in enumerate([OPTIONS[:1], OPTIONS[1:2], OPTIONS]):
        pairs = _pairs(random.Random(seed), world, blocks, dtype)
        plain, sharded = ([one[side] for one in pairs] for side in (0, 1))
        ours = sr.optim.Muon(_groups(sharded, options), batch_cap_mb=0.02)
        theirs = torch.optim.Muon(_groups(plain, options))
        for step in range(1, STEPS + 1):
            for index, one in enumerate(pairs):
                give(one, step, index)
                if (step + index) % 5 == 0:  # some have no gradient
                    one[0].grad = one[1].grad = None
            ours.step()
            theirs.step()
            for index, (a, b) in enumerate(pairs):
                assert torch.equal(full(b), a), (seed, step, SHAPES[index])
        for a, b in pairs:
            assert torch.equal(full(ours.state[b]["momentum_buffer"]), theirs.state[a]["momentum_buffer"])
            assert isinstance(ours.state[b]["momentum_buffer"], RaggedTensor)
        assert ours.stats().steps == STEPS


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [[0], [1], [2], [3], [0, 1, 2, 3]])
def test_sharded_matrices_have_the_bits_of_torch(world: int, blocks: list[int]) -> None:
    run(_equal_to_torch, world, blocks, torch.float32, timeout=120)


def test_sharded_matrices_of_doubles_have_the_bits_of_torch() -> None:
    run(_equal_to_torch, 3, [0, 1], torch.float64, timeout=120)


def _sixteen_bits(rank: int, world: int, dtype: torch.dtype) -> None:
    """Rounded once: the product and the sum of fp32 numbers, wherever the matrix was cut."""
    rng = random.Random(0)
    shape = (40, 24)
    plain, sharded = pair(0, shape, cut(rng, shape, 1, world), dtype)
    optimizer = sr.optim.Muon([sharded], lr=0.02, weight_decay=0.25)
    momentum = torch.zeros(shape, dtype=dtype)
    expected = plain.detach().clone()
    for step in range(1, STEPS + 1):
        give((plain, sharded), step, 0)
        assert plain.grad is not None
        optimizer.step()
        momentum.lerp_(plain.grad, 1 - 0.95)
        orthogonal = torch.optim._muon._zeropower_via_newtonschulz(
            plain.grad.lerp(momentum, 0.95), (3.4445, -4.7750, 2.0315), 5, 1e-7
        )
        expected.mul_(1 - 0.02 * 0.25)
        expected = expected.float().add(orthogonal.float().contiguous(), alpha=-0.02 * (40 / 24) ** 0.5).to(dtype)
        assert torch.equal(full(sharded), expected), step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [1, 3])
def test_sharded_matrices_of_16_bits_are_rounded_once(world: int, dtype: torch.dtype) -> None:
    run(_sixteen_bits, world, dtype)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1"),
        ({"lr": float("nan")}, ValueError, "lr must be at least 0, got nan"),
        ({"lr": "1"}, TypeError, "lr must be a number, got str"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be one number, got a tensor of shape \(2,\)"),
        ({"momentum": 1.5}, ValueError, "momentum must be from 0 to 1, got 1.5"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"eps": -1e-7}, ValueError, "eps must be at least 0"),
        ({"nesterov": 1}, TypeError, "nesterov must be a bool, got int"),
        ({"ns_coefficients": 3.0}, TypeError, "ns_coefficients must be three numbers, got 3.0"),
        ({"ns_coefficients": (1.0, 2.0)}, ValueError, "ns_coefficients must be three numbers, got 2"),
        ({"ns_steps": 100}, ValueError, "ns_steps must be from 0 to 99, got 100"),
        ({"ns_steps": 2.5}, TypeError, "ns_steps must be an int, got float"),
        (
            {"adjust_lr_fn": "mean"},
            ValueError,
            "adjust_lr_fn must be 'original', 'match_rms_adamw' or None, got 'mean'",
        ),
        ({"batch_cap_mb": 0}, ValueError, "batch_cap_mb must be above 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sr.optim.Muon([nn.Parameter(torch.ones(2, 2))], **options)
    if "batch_cap_mb" not in options:
        optimizer = sr.optim.Muon([nn.Parameter(torch.ones(2, 2))])
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], **options})
        assert len(optimizer.param_groups) == 1


def test_parameters_that_are_no_matrices_are_refused() -> None:
    for shape in ((3,), (2, 3, 4), ()):
        with pytest.raises(ValueError, match=r"parameter 1 has shape .*second optimizer, such as torch\.optim\.AdamW"):
            sr.optim.Muon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(shape))])
    with pytest.raises(ValueError, match=r"but norm\.bias has shape"):
        sr.optim.Muon([("norm.bias", nn.Parameter(torch.ones(3)))])
    with pytest.raises(TypeError, match="complex"):
        sr.optim.Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


def _unlike(rank: int, world: int, what: str) -> list[str]:
    pairs = [pair(i, shape, cut(random.Random(i), shape, 1, world)) for i, shape in enumerate(SHAPES[:3])]
    optimizer = sr.optim.Muon([(f"weight{i}", sharded) for i, (_, sharded) in enumerate(pairs)])
    messages = []
    for step in (1, 2):
        for index, one in enumerate(pairs):
            give(one, step, index)
        if step == 2 and rank == 1:
            if what == "gradient":
                pairs[1][1].grad = None
            elif what == "kind":
                pairs[1][1].grad = torch.ones(SHAPES[1])
            elif what == "cap":
                optimizer._batch_cap_nbytes = 7
            elif what == "lr of a tensor":
                optimizer.param_groups[0]["lr"] = torch.tensor([0.0010001])
            else:
                optimizer.param_groups[0]["lr"] = 0.5
        before = [full(sharded) for _, sharded in pairs]
        try:
            optimizer.step()
        except RuntimeError as error:
            messages.append(str(error))
            assert all(torch.equal(full(b), a) for (_, b), a in zip(pairs, before, strict=True))
    return messages


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("gradient", ["ranks 0, 2: weight1: a gradient, shape (96, 64)", "rank 1: weight1: no gradient"]),
        ("kind", ["rank 1: weight1: a gradient, shape (96, 64), RaggedShard", ", gradient shape (96, 64)"]),
        ("cap", ["ranks 0, 2: batches of 26214400 bytes", "rank 1: batches of 7 bytes"]),
        ("lr of a tensor", ["ranks 0, 2: group 0: lr=0.001,", "rank 1: group 0: lr=0.001000100"]),
        ("lr", ["ranks 0, 2: group 0: lr=0.001,", "rank 1: group 0: lr=0.5,"]),
    ],
)
def test_ranks_that_differ_are_an_error_on_all(what: str, parts: list[str]) -> None:
    for (message,) in run(_unlike, 3, what):
        assert all(part in message for part in parts), message


def _prepared(rank: int, world: int, how: str) -> str:
    """As torch.distributed.checkpoint prepares an optimizer, on a device for which ranks do not compare every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smallreduce.optim._muon._READ_AT_ONCE", ())
        both = pair(0, SHAPES[1], cut(random.Random(0), SHAPES[1], 1, world))
        _, sharded = both
        optimizer = sr.optim.Muon([sharded], lr=0.0 if how == "lr" else 0.1)
        give(both, 1, 0)
        optimizer.step()
        if how != "lr":
            before = optimizer.stats().collectives
            optimizer.step()
            assert optimizer.stats().collectives == before + 2  # there and back
        optimizer.param_groups[0]["lr"] = 0.1
        if how == "load":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif how == "add":
            optimizer.add_param_group({"params": [pair(1, SHAPES[0], cut(random.Random(1), SHAPES[0], 1, world))[1]]})
        if rank == 1:
            sharded.grad = None
        with pytest.raises(RuntimeError) as refused:
            optimizer.step()
        return str(refused.value)


@pytest.mark.parametrize("how", ["lr", "load", "add"])
def test_ranks_compare_the_first_real_step_on_every_device(how: str) -> None:
    for message in run(_prepared, 2, how):
        assert "rank 1: parameter 0: no gradient" in message


def _plain_state(rank: int, world: int) -> str:
    both = pair(0, SHAPES[1], cut(random.Random(0), SHAPES[1], 1, world))
    _, sharded = both
    optimizer, plain = sr.optim.Muon([sharded]), torch.optim.Muon([nn.Parameter(torch.ones(SHAPES[1]))])
    plain.param_groups[0]["params"][0].grad = torch.ones(SHAPES[1])
    plain.step()
    optimizer.load_state_dict(plain.state_dict())
    give(both, 1, 0)
    before = full(sharded)
    with pytest.raises(ValueError, match="the momentum of parameter 0 must be shape") as refused:
        optimizer.step()
    assert torch.equal(full(sharded), before)
    return str(refused.value)


def test_momentum_of_another_kind_is_refused_on_all_ranks() -> None:
    assert len(set(run(_plain_state, 2))) == 1


def test_closure_is_called_with_gradients() -> None:
    weight = nn.Parameter(gradient(0, 0, (4, 6)))
    optimizer = sr.optim.Muon([weight])
    before = weight.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == before.square().sum().item()
    assert not torch.equal(weight, before)
