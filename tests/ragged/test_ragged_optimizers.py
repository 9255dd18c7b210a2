"""The elementwise optimizers of torch.optim on RaggedTensors, against the same on whole tensors.

torch's vector loops may round differently in their remainder, where a multiplication and an addition may be fused or
not: its fused optimizers do. So a shard's bits are those of the whole where the cuts are at multiples of 64 elements,
twice the widest vectors; and those of the optimizer on a plain tensor of the shard's elements wherever they are.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ragged.layouts import uneven
from ranks import run
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._tensor import RaggedTensor

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    "AMSGrad": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}),
    "AdamW with a tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.1)}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "centered": True}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.1}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "t0": 2}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.1}),
}

MODES: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}

SHAPES: list[tuple[int, ...]] = [(40, 8), (257,), (3, 64), (130, 2), (5,), (0, 4)]


def _has_mode(name: str, mode: str) -> bool:
    if mode == "foreach":
        return name != "AdamW with a tensor lr"  # which torch refuses
    return mode == "default" or OPTIMIZERS[name][0] in (
        *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad),
    )


def _aligned(rng: random.Random, shape: tuple[int, ...], world: int) -> RaggedShard:
    """Cuts at multiples of 64 elements."""
    numel = torch.Size(shape).numel()
    cuts = [0, *sorted(64 * rng.randint(0, numel // 64) for _ in range(world - 1)), numel]
    return RaggedShard.from_lengths(shape, [end - begin for begin, end in pairwise(cuts)])


def _gradient(shape: tuple[int, ...], number: int, step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * number + step))


def _train(parameters: list[nn.Parameter], gradients: Any, kind: Any, options: dict[str, Any]) -> Any:
    optimizer = kind(parameters, **options)
    for step in range(4):
        for number, parameter in enumerate(parameters):
            parameter.grad = gradients(number, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return optimizer


def _optimizers(rank: int, world: int, name: str) -> None:
    kind, options = OPTIMIZERS[name]
    rng = random.Random(world)
    for mode in filter(lambda mode: _has_mode(name, mode), MODES):
        given = {**options, **MODES[mode]}
        for layout in (_aligned, uneven):
            shapes = SHAPES if layout is _aligned else [*SHAPES, *([()] if name != "Rprop" else [])]
            placements = [layout(rng, shape, world) for shape in shapes]
            wholes = [_gradient(shape, number, -1) for number, shape in enumerate(shapes)]

            def shard(number: int, whole: Tensor, placements: list[RaggedShard] = placements) -> RaggedTensor:
                return RaggedTensor.distribute(whole, placements[number])

            ragged = [nn.Parameter(shard(number, whole)) for number, whole in enumerate(wholes)]
            locals = [nn.Parameter(each.to_local().clone()) for each in ragged]
            memory = [each.to_local().data_ptr() for each in ragged]

            def gradient(number: int, step: int, shapes: list[Any] = shapes) -> Tensor:
                return _gradient(shapes[number], number, step)

            ours = _train(ragged, lambda n, s: shard(n, gradient(n, s)), kind, given)
            theirs = _train(locals, lambda n, s: shard(n, gradient(n, s)).to_local(), kind, given)
            assert memory == [each.to_local().data_ptr() for each in ragged]
            for one, other in zip(ragged, locals, strict=True):
                assert torch.equal(one.to_local(), other), (mode, layout, one)
                assert ours.state[one].keys() == theirs.state[other].keys()
                for key, value in theirs.state[other].items():
                    found = ours.state[one][key]
                    if isinstance(value, Tensor) and value.shape == other.shape and value.dim():
                        assert isinstance(found, RaggedTensor) and found.placement == one.placement, key
                        found = found.to_local()
                    same = torch.equal(found, value) if isinstance(value, Tensor) else found == value
                    assert same, (mode, key)
            if layout is _aligned:
                plain = [nn.Parameter(each.clone()) for each in wholes]
                _train(plain, gradient, kind, given)
                for one, other in zip(ragged, plain, strict=True):
                    assert torch.equal(one.full_tensor(), other), (mode, one.placement)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_optimizers(name: str) -> None:
    run(_optimizers, 3, name)


class _Lion(torch.optim.Optimizer):
    """As one writes it by hand (arXiv:2302.06675)."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                average, (one, other) = state["exp_avg"], group["betas"]
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(average * one + p.grad * (1 - one)), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - other)


def _lion(rank: int, world: int) -> None:
    rng = random.Random(8)
    whole = _gradient((40, 8), 0, -1)
    placement = _aligned(rng, (40, 8), world)
    ragged, plain = nn.Parameter(RaggedTensor.distribute(whole, placement)), nn.Parameter(whole.clone())
    _train([ragged], lambda n, s: RaggedTensor.distribute(_gradient((40, 8), n, s), placement), _Lion, {})
    _train([plain], lambda n, s: _gradient((40, 8), n, s), _Lion, {})
    assert torch.equal(ragged.full_tensor(), plain)


def test_one_written_by_hand() -> None:
    run(_lion, 2)


def _sharded_and_plain(rank: int, world: int) -> None:
    """In one parameter group, as where some parameters are kept whole."""
    rng = random.Random(9)
    whole = _gradient((40, 8), 0, -1)
    placement = _aligned(rng, (40, 8), world)
    for mode in MODES.values():
        mixed = [nn.Parameter(RaggedTensor.distribute(whole, placement)), nn.Parameter(whole[0].clone())]
        plain = [nn.Parameter(whole.clone()), nn.Parameter(whole[0].clone())]

        def gradient(number: int, step: int) -> Tensor:
            return _gradient((8,) if number else (40, 8), number, step)

        def of_mixed(number: int, step: int) -> Tensor:
            return gradient(1, step) if number else RaggedTensor.distribute(gradient(0, step), placement)

        _train(mixed, of_mixed, torch.optim.AdamW, mode)
        _train(plain, gradient, torch.optim.AdamW, mode)
        assert torch.equal(mixed[0].full_tensor(), plain[0]) and torch.equal(mixed[1], plain[1])


def test_sharded_and_plain_parameters() -> None:
    run(_sharded_and_plain, 2)


def test_accelerators_choose_foreach() -> None:
    """torch's own choice, of which the CPU has none, is made by type."""
    from torch.optim.optimizer import _foreach_supported_types as optimizers
    from torch.utils._foreach_utils import _foreach_supported_types as clipping

    assert optimizers.count(RaggedTensor) == 1 and clipping.count(RaggedTensor) == 1  # type: ignore[arg-type, comparison-overlap]
