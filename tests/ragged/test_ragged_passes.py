"""What a pass leaves behind, whatever way it took: gradients, freed parameters, and what was gathered ahead."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import smallreduce as sr
from fsdp.training import loss_of
from ragged.sharding import full, full_gradients, full_parameters, ragged
from ragged.test_ragged_exact import SGD, same
from ranks import run
from smallreduce.codecs import PacketCodec
from smallreduce.ragged._unit import unit_of


class _Tower(nn.Module):
    """One branch is computed only sometimes, and another has its activations computed again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.seldom = nn.Linear(8, 8)
        self.again = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.last = nn.Linear(8, 8)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor, seldom: bool) -> torch.Tensor:
        x = self.first(x)
        if seldom:
            x = x + self.seldom(x)
        x = x + checkpoint(self.again, x, use_reentrant=self.reentrant)
        return self.last(torch.tanh(x)) + self.last(x)  # twice


def _branches(rank: int, world: int, reentrant: bool) -> None:
    models = []
    for shard, options in ((sr.ragged.fully_shard, {"granularity": "rows"}), (fully_shard, {})):
        torch.manual_seed(1)
        model: Any = _Tower(reentrant)
        for child in (model.first, model.seldom, model.again, model.last):
            shard(child, **options)
        models.append(shard(model, **options))
    ours, stock = models
    optimizers = [torch.optim.SGD(model.parameters(), **SGD) for model in models]
    for step in range(8):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            # Two forward passes before two backward passes, the second time the other way round.
            losses = [model(x * scale, step % 3 == 0).square().mean() for scale in (1.0, 0.5)]
            losses = losses[:: 1 if step % 2 else -1]
            # Of what a backward pass computes again and comes to twice, torch's own loses a gradient; see below.
            for loss in losses if reentrant else [sum(losses)]:
                loss.backward()
            if step == 4:
                with torch.no_grad():
                    model(x, True)
        assert same(full_gradients(ours), full_gradients(stock)), step
        assert (ours.seldom.weight.grad is None) == (step % 3 != 0)
        for optimizer in optimizers:
            optimizer.step()
        assert same(full_parameters(ours), full_parameters(stock)), step


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_branches_and_passes_in_any_order(world: int, reentrant: bool) -> None:
    run(_branches, world, reentrant)


@dataclass
class _Out:
    hidden: torch.Tensor
    losses: list[torch.Tensor]


class _Nested(nn.Module):
    """A unit in a unit, which is used once more without a gradient; its values go about in a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.outer = nn.Linear(8, 8)

    def forward(self, given: _Out) -> _Out:
        with torch.no_grad():
            shift = self.inner(given.hidden)
        hidden = given.hidden + self.inner(self.outer(given.hidden) + shift)
        given.losses.append(hidden.mean())
        return _Out(hidden, given.losses)


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Nested() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _Out(x, [])
        for block in self.blocks:
            out = block(out)
        return self.head(out.hidden).square().mean() + sum(out.losses)


def _nested(rank: int, world: int, codecs: dict[str, Any]) -> None:
    """Against the model alone, on the same data on all ranks; and what every layer computes with, against the weights
    that there are."""
    codec = sr.codec(codecs.get("weights")) if world > 1 else None
    seen: list[tuple[str, torch.Tensor]] = []
    expected: dict[str, torch.Tensor] = {}
    models: list[Any] = []
    for sharded_too in (False, True):
        torch.manual_seed(0)
        model = _Chain()
        if sharded_too:
            for block in model.blocks:
                sr.ragged.fully_shard(block.inner, granularity="rows", **codecs)
                sr.ragged.fully_shard(block, granularity="rows", **codecs)
            sr.ragged.fully_shard(model, granularity="rows", **codecs)
        models.append(model)
    for name, layer in models[1].named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda m, _, name=name: seen.append((f"{name}.weight", m.weight.clone())))
    optimizers = [torch.optim.SGD(model.parameters(), **SGD) for model in models]
    for step in range(6):
        for name, whole in full_parameters(models[1]).items():
            expected[name] = whole
            if isinstance(codec, PacketCodec):
                packet = sr.encode(whole, codec)
                expected[name] = sr.decode(packet, codec, whole.numel(), whole.dtype).view(whole.shape)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x)
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert len(seen) == 3 * 5 + 1
        for name, weight in seen:
            assert torch.equal(weight, expected[name]), (step, name)
        seen.clear()
        if codec is None:  # the mean of two equal numbers is exact
            assert torch.equal(*losses), step
    for module in models[1].modules():
        unit = unit_of(module)
        for bucket in [] if unit is None else unit.buckets:
            assert not bucket.is_gathering
            assert not bucket.is_unsharded


@pytest.mark.parametrize("codecs", [{}, {"gradients": "int8", "weights": "int8:rounding=nearest"}])
@pytest.mark.parametrize("world", [1, 2])
def test_units_in_units_and_uses_without_gradient(world: int, codecs: dict[str, Any]) -> None:
    run(_nested, world, codecs)


def _collected(rank: int, world: int) -> None:
    model: Any = sr.ragged.fully_shard(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    (bucket,) = unit_of(model).buckets  # type: ignore[union-attr]
    left = [weakref.ref(thing) for thing in (model, bucket, bucket.slots[0].unsharded)]
    del model, bucket
    gc.collect()
    assert [thing() for thing in left] == [None] * 3


def test_a_model_is_collected() -> None:
    run(_collected, 2)


class _Again(nn.Module):
    """A part that is used twice, of which activations are computed again. All numbers stay exact."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.part = nn.Linear(4, 4), nn.Linear(4, 4)
        for parameter in self.parameters():
            numbers = torch.randint(-2, 3, parameter.shape, generator=torch.Generator().manual_seed(parameter.dim()))
            parameter.data = numbers.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.how == "reentrant":
            return checkpoint(self.part, x, use_reentrant=True) + 2 * checkpoint(self.part, x - 1, use_reentrant=True)
        if self.how == "without gradients":
            return self.part(checkpoint(self._constant, x, use_reentrant=False))  # type: ignore[no-any-return]
        x.register_hook(self._looks)
        return self.part(x)  # type: ignore[no-any-return]

    def _constant(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.part(x)
        return x * y

    def _looks(self, gradient: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.part(gradient)
        return gradient


def _again(rank: int, world: int, how: str) -> None:
    model, plain = _Again(how), _Again(how)
    for module in (model.first, model.part, model):
        sr.ragged.fully_shard(module, granularity="rows")
    for step in range(3):
        everyones = [
            torch.randint(-2, 3, (2, 4), generator=torch.Generator().manual_seed(10 * step + r)).float()
            for r in range(world)
        ]
        for module in (model, plain):
            module.zero_grad()
        model(everyones[rank]).sum().backward()
        (sum(plain(x).sum() for x in everyones) / world).backward()  # type: ignore[union-attr]
        for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert isinstance(parameter, sr.ragged.RaggedTensor), name
            assert torch.equal(full(parameter.grad), expected.grad), (step, name)
        with torch.no_grad():
            for parameter in (*model.parameters(), *plain.parameters()):
                parameter.add_(parameter.grad.sign())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("how", ["reentrant", "without gradients", "looked at"])
def test_modules_that_a_backward_pass_comes_to_again(world: int, how: str) -> None:
    run(_again, world, how)


class _Watch(torch.autograd.Function):
    """A copy, which notes on the way back whether a layer has its whole parameters."""

    @staticmethod
    def forward(ctx: Any, flat: _Flat, x: torch.Tensor) -> torch.Tensor:
        ctx.flat = flat
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.flat.seen.append(type(ctx.flat.linear.weight) is nn.Parameter)
        return None, gradient


class _Flat(nn.Module):
    """Its output is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Watch.apply(self, self.linear(x)).view(-1)  # type: ignore[no-any-return]


class _Changes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.last = _Flat(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.flat(x)
        y.add_(1)  # takes the view out of the graph
        return self.last(y.view(x.shape))  # type: ignore[no-any-return]


def _changed(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model, plain = _Changes(), _Changes()
    plain.load_state_dict(model.state_dict())
    for module in (model.flat, model.last, model):
        sr.ragged.fully_shard(module)
    for step in range(2):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        for module in (model, plain):
            module.zero_grad()
            module(x).square().sum().backward()
        # The same on all ranks, and the mean of two that are equal is exact.
        for found, expected in zip(full_gradients(model).values(), plain.parameters(), strict=True):
            assert torch.equal(found, expected.grad)  # type: ignore[arg-type]
    assert model.flat.seen == [True, True]


def test_outputs_that_are_changed_in_place() -> None:
    run(_changed, 2)


def _evaluates(rank: int, world: int) -> None:
    model = ragged(granularity="rows")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss_of(model, rank, 0).backward()
    with torch.no_grad():
        before = loss_of(model, rank, 0)
        optimizer.step()
        after = loss_of(model, rank, 0)
        # The root is freed too, where no backward pass would.
        assert all(isinstance(parameter, sr.ragged.RaggedTensor) for parameter in model.parameters())
    assert not torch.equal(before, after)
    handle = model.unshard(async_op=True)
    handle.wait()
    assert type(model.embed.weight) is nn.Parameter
    assert isinstance(model.blocks[0].norm.weight, sr.ragged.RaggedTensor)
    whole = model.embed.weight.detach().clone()
    assert all(isinstance(value, sr.ragged.RaggedTensor) for value in model.state_dict().values())
    assert isinstance(model.embed.weight, sr.ragged.RaggedTensor)
    assert model.head.weight is model.embed.weight
    assert torch.equal(full(model.embed.weight), whole)


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_and_unsharding(world: int) -> None:
    run(_evaluates, world)


class _Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("as it shall")


def _hooked(tensor: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> None:
    tensor.register_hook(hook)


def _recovers(rank: int, world: int) -> None:
    model = ragged(granularity="rows")
    expected = loss_of(model, rank, 0)
    expected.backward()
    model.zero_grad()
    norm, model.norm = model.norm, _Fails()
    with pytest.raises(ArithmeticError):
        loss_of(model, rank, 0)
    model.norm = norm
    model.reset_iter_state()
    loss = loss_of(model, rank, 0)
    assert torch.equal(loss, expected)
    loss.backward()

    def fails(gradient: torch.Tensor) -> None:
        raise ArithmeticError("as it shall")

    handle = model.blocks[0].norm.register_forward_hook(lambda module, args, output: _hooked(output, fails))
    with pytest.raises(ArithmeticError):
        loss_of(model, rank, 0).backward()
    handle.remove()
    with pytest.raises(RuntimeError, match=r"call reset_iter_state\(\) on the root module, on all ranks"):
        loss_of(model, rank, 0)
    model.reset_iter_state()
    assert torch.equal(loss_of(model, rank, 0), expected)
    ragged(granularity="rows").reset_iter_state()  # before it was used


def test_a_pass_that_failed() -> None:
    run(_recovers, 2)


def _ahead(rank: int, world: int) -> list[str]:
    """What happens in a step after the first, in order: ``gather`` when a unit's begins, ``use`` when it computes."""
    events: list[str] = []
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    names = {}
    for number, layer in enumerate(model):
        sr.ragged.fully_shard(layer)
        names[id(layer)] = str(number)
    sr.ragged.fully_shard(model)
    loss = model(torch.randn(2, 4)).sum()
    loss.backward()
    from smallreduce.ragged import _bucket, _unit

    unshard, wait = _bucket.Bucket.unshard, _bucket.Bucket.wait
    owners = {id(b): names[id(layer)] for layer in model for b in _unit.unit_of(layer).buckets}  # type: ignore[union-attr]

    def record_unshard(bucket: Any, *args: Any) -> None:
        if bucket._gathering is None and not bucket.is_unsharded:
            events.append(f"gather {owners[id(bucket)]}")
        unshard(bucket, *args)

    def record_wait(bucket: Any) -> None:
        if bucket._gathering is not None:
            events.append(f"use {owners[id(bucket)]}")
        wait(bucket)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bucket.Bucket, "unshard", record_unshard)
        patch.setattr(_bucket.Bucket, "wait", record_wait)
        model(torch.randn(2, 4)).sum().backward()
    return events


def test_the_next_is_gathered_ahead() -> None:
    forward = ["gather 0", "use 0", "gather 1", "use 1", "gather 2", "use 2"]
    backward = ["gather 2", "use 2", "gather 1", "use 1", "gather 0", "use 0"]
    assert run(_ahead, 2)[0] == forward + backward
