"""Error feedback on ragged shards: all of it is there, and it is that of whole parameters."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import smallreduce as sr
from fsdp.seen import Product
from fsdp.training import Given, loss_of
from ragged.owing import Composed, Units, dyadic, everyones, gradients_of, shard_units
from ragged.sharding import ragged
from ranks import run
from smallreduce.codecs import PacketCodec

SHAPES: list[tuple[int, ...]] = [(13, 9), (5,), (64, 3), (700,), (0, 4)]
UNITS = [SHAPES, [(40, 64)], [(7,), (3, 50, 11)]]

pytestmark = pytest.mark.filterwarnings("ignore::smallreduce.fsdp.ResidualMemory")


def _missing(step: int, index: int) -> bool:
    """Whether a parameter has no gradient in a step, on no rank."""
    return step % 2 == 1 and index % 3 != 0


def _given(rank: int, step: int, partial: bool) -> list[list[Tensor | None]]:
    return [
        [
            None if partial and _missing(step, i) else dyadic(shape, rank, 10 * step + u)
            for i, shape in enumerate(shapes)
        ]
        for u, shapes in enumerate(UNITS)
    ]


def _telescopes(rank: int, world: int, chunk: int, granularity: Any) -> None:
    steps = 3
    for codec in ("int8", "int4:group=32", "int4-hadamard", "topk:0.2", "bf16"):
        for partial in (False, True):
            model = shard_units(Units(UNITS), granularity=granularity, gradients=codec, feedback="full")
            state = sr.ragged.state(model)
            with mock.patch("smallreduce.collectives._engine.CHUNK_NUMEL", chunk):
                for step in range(steps):
                    model(_given(rank, step, partial)).backward()
            assert state.stats().partial_reductions == 2 * partial  # of a module where all lack one, there is none
            owed = everyones(state.state_dict()["residuals"])
            found = gradients_of(model)
            for u, shapes in enumerate(UNITS):
                for i, shape in enumerate(shapes):
                    name = f"units.{u}.weights.{i}"
                    inputs = [_given(r, s, partial)[u][i] for r in range(world) for s in range(steps)]
                    given = torch.stack([x.double() for x in inputs if x is not None]).sum(0)
                    left = torch.stack([one[name].double().view(shape) for one in owed]).sum(0)
                    sent = found[name].double() * world
                    if world in (2, 4):
                        assert torch.equal(sent + left, given), (codec, name)
                        continue
                    # Each of three means, below 9, is a sum times a third: two roundings by 2^-24 of it. The second
                    # and the third are added, which rounds values below 27.
                    bound = world * (3 * 2 * 9 + 2 * 27) * 2**-24
                    assert torch.allclose(sent + left, given, rtol=0, atol=bound), (codec, name)


@pytest.mark.parametrize(
    ("world", "chunk", "granularity"), [(2, 1 << 22, "group"), (3, 64, "rows"), (4, 256, "matrix")]
)
def test_outputs_and_residuals_are_the_inputs(world: int, chunk: int, granularity: Any) -> None:
    run(_telescopes, world, chunk, granularity, timeout=240)


def _composed(rank: int, world: int, spelling: str, feedback: str, granularity: Any) -> None:
    codec = sr.codec(spelling)
    assert isinstance(codec, PacketCodec)
    loco: dict[str, Any] = {} if feedback == "full" else {"beta": 0.75, "reset_every": 3}
    model = shard_units(Units(UNITS), granularity=granularity, gradients=codec, feedback=feedback, **loco)
    state = sr.ragged.state(model)
    expected = {
        f"units.{u}.weights.{i}": Composed(shape, world, codec.with_feedback(), **loco)
        for u, shapes in enumerate(UNITS)
        for i, shape in enumerate(shapes)
    }
    own_steps = [0] * len(UNITS)
    for step in range(6):
        model.zero_grad()
        model(_normal(rank, step)).backward()
        found, owed = gradients_of(model), state.state_dict()["residuals"]
        for u, shapes in enumerate(UNITS):
            if all(x is None for x in _normal(rank, step)[u]):
                continue
            for i in range(len(shapes)):
                name = f"units.{u}.weights.{i}"
                mean = expected[name].reduce([_normal(r, step)[u][i] for r in range(world)], own_steps[u])
                assert (mean is None) == (name not in found)
                assert mean is None or torch.equal(found[name], mean), (step, name)
                assert torch.equal(owed[name], expected[name].owed[rank]), (step, name)
            own_steps[u] += 1


def _normal(rank: int, step: int) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [
        [None if _missing(step, i) else torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)]
        for shapes in UNITS
    ]


@pytest.mark.parametrize("feedback", ["full", "int8"])
@pytest.mark.parametrize(("world", "spelling", "granularity"), [
    (2, "int4", "group"), (3, "int4-hadamard", "rows"), (3, "sign:group=32", "group"), (2, "fp8-e4m3", 2),
])  # fmt: skip
def test_the_operators_give_the_same(world: int, spelling: str, feedback: str, granularity: Any) -> None:
    run(_composed, world, spelling, feedback, granularity)


class _Turns(nn.Module):
    """Has a weight for each of two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 2.0]).repeat(100)) for _ in range(2))

    def forward(self, x: Tensor, is_first: bool) -> Tensor:
        return Product.apply(x, self.first if is_first else self.second, [])


class _Twice(nn.Module):
    """Goes through one module two times. In a backward pass it is reduced two times, each for one of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Turns()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x, True), False).sum()


def _two_reductions(rank: int, world: int) -> None:
    for feedback in ("full", "int8"):
        loco: dict[str, Any] = {} if feedback == "full" else {"beta": 0.5, "reset_every": 3}
        model = _Twice()
        weight = model.inner.first.detach().clone()
        for module in (model.inner, model):
            sr.ragged.fully_shard(module, gradients="int8", feedback=feedback, **loco)
        state = sr.ragged.state(model)
        codec = sr.IntQuant(8, rounding="nearest")
        composed = {f"inner.{name}": Composed((400,), world, codec, **loco) for name in ("second", "first")}
        for step in range(4):
            inputs = [dyadic((400,), r, step) for r in range(world)]
            model(inputs[rank].requires_grad_()).backward()
            # d/d second is first * x, and d/d first is second * x, which is the same. That of the second use is first.
            given = [(x * weight).detach() for x in inputs]
            found = gradients_of(model)
            for turn, name in enumerate(composed):
                for other, one in composed.items():
                    mean = one.reduce(given if other == name else [None] * world, 2 * step + turn)
                    assert mean is None or torch.equal(found[name], mean), (feedback, step, name)
            owed = state.state_dict()["residuals"]
            assert owed.keys() == composed.keys()
            assert all(torch.equal(owed[name], one.owed[rank]) for name, one in composed.items()), (feedback, step)
            model.zero_grad()
        assert state.stats().gradients.calls == state.stats().partial_reductions == 8


def test_a_module_that_is_reduced_twice_in_a_pass() -> None:
    run(_two_reductions, 2)


def _interrupted(rank: int, world: int) -> None:
    """A pass that ends with an exception has given back what it has borrowed."""
    for feedback in ("full", "int8"):
        model = ragged(gradients="int4", feedback=feedback)
        state = sr.ragged.state(model)
        loss_of(model, rank, 0).backward()
        before = state.state_dict()

        def fail(*args: object) -> None:
            raise ArithmeticError("on purpose")

        handle = model.blocks[0].register_full_backward_pre_hook(fail)  # when the second block is being reduced
        with pytest.raises(ArithmeticError, match="on purpose"):
            loss_of(model, rank, 1).backward()
        handle.remove()
        model.reset_iter_state()
        after = state.state_dict()
        assert {name: steps[0] for name, steps in after["steps"].items()} == {"": 1, "blocks.0": 1, "blocks.1": 2}
        for name, residual in after["residuals"].items():
            assert torch.equal(residual, before["residuals"][name]) != name.startswith("blocks.1."), name
        model.zero_grad()
        loss_of(model, rank, 2).backward()
        found = everyones({name: gradient.sum().item() for name, gradient in gradients_of(model).items()})
        assert all(one == found[0] for one in found)
        assert state.stats().partial_reductions == 0


def test_a_pass_that_is_interrupted() -> None:
    run(_interrupted, 2)


def _frozen_later(rank: int, world: int) -> None:
    shapes: list[tuple[int, ...]] = [(32, 8), (8,), (16, 4)]
    for feedback in ("full", "int8"):
        model, other = (
            sr.ragged.fully_shard(Given(shapes), gradients="int4", feedback=feedback) for _ in range(2)
        )  # of the other nothing is frozen
        state, unfrozen = sr.ragged.state(model), sr.ragged.state(other)
        given = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for shape in shapes]
        zeros = [torch.zeros(shape) for shape in shapes]
        for each in (model, other):
            each(given).backward()
            each.zero_grad()
        before = state.stats().residual_nbytes
        model.weights[0].requires_grad_(False)
        model([None, *zeros[1:]]).backward()
        other(zeros).backward()
        mine, theirs = gradients_of(model), gradients_of(other)
        for name in ("weights.1", "weights.2"):
            assert mine[name].any()
            assert torch.equal(mine[name], theirs[name])
            owed = state.state_dict()["residuals"]
            assert torch.equal(owed[name], unfrozen.state_dict()["residuals"][name])
            assert "weights.0" not in owed
        assert state.stats().residual_nbytes < before
        assert state.stats().partial_reductions == 0
        model.zero_grad()
        model.weights[0].requires_grad_(True)
        model(zeros).backward()  # what the frozen one owed is forgotten
        assert not gradients_of(model)["weights.0"].any()
        assert state.stats().residual_nbytes == before


def test_parameters_frozen_and_unfrozen() -> None:
    run(_frozen_later, 2)


def _without(rank: int, world: int) -> None:
    """Where nothing is compressed, nothing is owed: doubles, which no codec takes."""
    model = sr.ragged.fully_shard(Given([(40, 8)]).double(), gradients="int4", feedback="full")
    state = sr.ragged.state(model)
    model([dyadic((40, 8), rank, 0).double()]).backward()
    mean = torch.stack([dyadic((40, 8), r, 0).double() for r in range(world)]).mean(0)
    assert torch.equal(gradients_of(model)["weights.0"], mean)
    assert state.stats().residual_nbytes == 0
    assert state.state_dict()["residuals"] == {}


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_is_owed_where_nothing_is_compressed(world: int) -> None:
    run(_without, world)


def _units_as_before(model: nn.Module) -> bool:
    return not isinstance(model, sr.ragged.RaggedModule) and all(type(p) is nn.Parameter for p in model.parameters())


def _refused(rank: int, world: int) -> None:
    model = Given([(40, 8)])
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "feedback must be None, 'int8' or 'full', got 'fp32'", {"gradients": "int4", "feedback": "fp32"}),
        (ValueError, "needs a codec for gradients", {"feedback": "full"}),
        (ValueError, "takes one codec", {"gradients": ("int8", "int4"), "node_size": 1, "feedback": "full"}),
        (ValueError, "sign is biased", {"gradients": "sign"}),
        (ValueError, "beta must be at least 0 and below 1, got 1.0", {"beta": 1.0}),
        (TypeError, "beta must be a float, got str", {"beta": "0.8"}),
        (ValueError, "reset_every must be at least 1, got 0", {"reset_every": 0}),
        (TypeError, "reset_every", {"reset_every": 1.5}),
    ]
    for kind, match, arguments in wrong:
        with pytest.raises(kind, match=match):
            sr.ragged.fully_shard(model, **arguments)
        assert _units_as_before(model)
    with pytest.raises(RuntimeError, match=r"feedback int8 \(beta 0.5, reset_every 1024\)"):
        sr.ragged.fully_shard(copy.deepcopy(model), gradients="int4", feedback="int8", beta=0.5 + 0.25 * rank)


def test_impossible_feedback() -> None:
    run(_refused, 2)


def _warned(rank: int, world: int) -> None:
    for feedback in ("full", "int8"):
        model = Given(SHAPES)
        model.weights[2].requires_grad_(False)
        # Where filters make an error of it, it is one everywhere, before anything is sharded.
        with warnings.catch_warnings():
            warnings.simplefilter("error", sr.fsdp.ResidualMemory)
            with pytest.raises(sr.fsdp.ResidualMemory if rank == 0 else RuntimeError, match=r"bytes .* of residuals"):
                sr.ragged.fully_shard(model, gradients="topk:0.1", feedback=feedback)
        assert _units_as_before(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sr.ragged.fully_shard(model, gradients="topk:0.1", feedback=feedback)
        assert len(caught) == (rank == 0)
        if rank == 0:
            assert caught[0].filename == __file__
            nbytes, elements = re.findall(r"(\d+) (?:bytes|trainable)", str(caught[0].message))
            assert int(nbytes) == sr.ragged.state(model).stats().residual_nbytes
            assert int(elements) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_warning_that_is_an_error_is_one_on_every_rank() -> None:
    run(_warned, 3)
