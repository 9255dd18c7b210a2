"""SDP4Bit in use: overlap, gradients, norms and scalers, and that what models and programs do in between is right."""

from __future__ import annotations

import copy
import io
import math
import threading
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import smallreduce as sr
from ddp.training import Given, equal, same_on_all_ranks
from optim.sdp4bit_reference import Reference
from optim.sdp4bit_training import (
    EXACT,
    GIVEN_BUCKET_MB,
    MOMENTUM,
    Case,
    batch,
    given_gradients,
    given_model,
    loss_of,
    net,
    sdp4bit,
    train_sdp4bit,
)
from ranks import run
from smallreduce import ops
from smallreduce.optim._sdp4bit_bucket import assign


def _overlap(rank: int, world: int) -> None:
    cases = [Case(micro_batches=2, groups=True), Case(checkpointed=True, dtype=torch.bfloat16)]
    for case in cases:
        results = [train_sdp4bit(case, rank, range(6), node_size=1, overlap=overlap) for overlap in (True, False)]
        (losses, model, _), (others, other, _) = results
        assert equal(losses, others)
        assert equal(list(model.parameters()), list(other.parameters()))
    # state_dict() and evaluation wait by themselves.
    model = net()
    optimizer = sdp4bit(Case(), model, node_size=1)
    loss_of(model, batch(rank, 0)).backward()
    optimizer.step()
    seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not optimizer._gathering or all(e.weights.work is None for e in optimizer._exchanges)
    optimizer.synchronize()
    assert equal(list(seen.values()), list(model.state_dict().values()))
    ema = copy.deepcopy(model)  # shares no hook that does anything
    ema.load_state_dict(seen)
    assert optimizer._loaded == set()
    assert same_on_all_ranks(list(ema.parameters()))


def test_overlap_changes_nothing() -> None:
    run(_overlap, 2)


def _set_to_zero(rank: int, world: int) -> None:
    for options in (EXACT, {"node_size": 1}):
        models = net(), net()
        for model, to_none in zip(models, (True, False), strict=True):
            optimizer = sdp4bit(Case(max_norm=0.1), model, **options)
            for step in range(3):
                loss_of(model, batch(rank, step)).backward()
                norm = optimizer.clip_grad_norm_(0.1)
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
            grads = [one.tensor.grad for bucket in optimizer._buckets for one in bucket.slices]
            assert all(grad is None if to_none else grad is not None and not grad.any() for grad in grads)
            assert norm > 0.1
            optimizer.synchronize()
        assert equal(list(models[0].parameters()), list(models[1].parameters()))


def test_gradients_set_to_zero() -> None:
    run(_set_to_zero, 2)


class _Half(nn.Module):
    """Uses one of its layers only where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = self.always(x)
        return self.sometimes(h) if both else h


def _unused(rank: int, world: int) -> None:
    # All in eighths, halved a few times: every sum is exact, in whatever order.
    torch.manual_seed(0)
    x = torch.randint(-8, 9, (3, 4)) / 8
    model, whole = _Half(), _Half()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-8, 9, p.shape) / 8)
    whole.load_state_dict(model.state_dict())
    optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.5, bucket_cap_mb=0.00001, **EXACT)
    for _ in range(3):
        model(x, rank == 0).sum().backward()  # only rank 0 uses the second
        optimizer.step()
        optimizer.zero_grad()
        whole.zero_grad()
        (whole(x, True).sum() * 0.5 + whole(x, False).sum() * 0.5).backward()
        with torch.no_grad():
            for p in whole.parameters():
                p -= 0.5 * (torch.zeros_like(p) if p.grad is None else p.grad)
    optimizer.synchronize()
    assert same_on_all_ranks(list(model.parameters()))
    assert equal(list(model.parameters()), list(whole.parameters()))
    # What an earlier pass accumulated of a parameter that the last does not use is reduced, too.
    before = model.sometimes.weight.detach().clone()
    with optimizer.no_sync():
        model(x, True).sum().backward()
    assert model.sometimes.weight.grad is not None
    model(x, False).sum().backward()
    assert model.sometimes.weight.grad is None
    optimizer.step()
    optimizer.synchronize()
    assert not torch.equal(model.sometimes.weight, before)


def test_parameters_without_a_gradient() -> None:
    run(_unused, 2)


def _scaler(rank: int, world: int, node_size: int) -> None:
    # The one-element model leaves the last rank without any slice.
    for model in (net(), nn.Linear(1, 1, bias=False)):
        size = 23 if hasattr(model, "middle") else 1
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.1, scaler=scaler, node_size=node_size)
        before = [p.detach().clone() for p in model.parameters()]
        for step, bad in enumerate([rank == 1, False, rank == 0]):
            x = torch.full((2, size), math.inf if bad else 1.0)
            scaler.scale(model(x).sum()).backward()
            if step:
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            optimizer.synchronize()
            assert scaler.get_scale() == [4.0, 4.0, 2.0][step]
            assert same_on_all_ranks(list(model.parameters()))
            assert equal(list(model.parameters()), before) == (step == 0)
        assert optimizer.stats().steps == 1
    unknown = torch.amp.GradScaler("cpu")
    optimizer = sdp4bit(Case(), net(), node_size=1)
    unknown.scale(loss_of(optimizer._model, batch(rank, 0))).backward()
    with pytest.raises(RuntimeError, match="scaler=scaler"):
        unknown.step(optimizer)


@pytest.mark.parametrize(("world", "node_size"), [(2, 1), (4, 2)])
def test_a_gradient_scaler_decides_alike_on_all_ranks(world: int, node_size: int) -> None:
    run(_scaler, world, node_size)


def _norms(rank: int, world: int) -> None:
    # The measure is that of fp64. A sum of n powers without a sign, each rounded once and added in whatever order, is
    # off by at most n units of fp32 in the last place, relative to itself; the maximum by nothing.
    for kind in (2.0, 1.0, math.inf):
        model = given_model()
        optimizer = sr.optim.SDP4Bit(
            model, torch.optim.SGD, lr=0.1, node_size=1, bucket_cap_mb=GIVEN_BUCKET_MB, weights=None
        )
        model(given_gradients(rank, 0)).backward()
        parts = [one.tensor.grad.clone() for bucket in optimizer._buckets for one in bucket.slices]
        everyones: list[Any] = [None] * world
        dist.all_gather_object(everyones, parts)
        expected = nn.utils.get_total_norm([part.double() for of_rank in everyones for part in of_rank], kind)
        total = optimizer.clip_grad_norm_(0.5, kind)
        off = 0.0 if kind == math.inf else sum(p.numel() for p in model.parameters()) * 2**-24
        torch.testing.assert_close(total.double(), expected.double(), rtol=off, atol=0.0)
        after = optimizer.clip_grad_norm_(1e9, kind)
        # Both norms are off, each product is rounded, and torch's formula has 1e-6 beside the norm.
        bound = 2 * off + 3 * 2**-24 + 1e-6 / expected.item()
        torch.testing.assert_close(after, torch.tensor(0.5), rtol=bound, atol=0.0)
        model(given_gradients(rank, 1)).backward()
        next(iter(optimizer._buckets[0].slices)).tensor.grad.fill_(math.nan)
        with pytest.raises(RuntimeError, match="cannot be clipped"):
            optimizer.clip_grad_norm_(0.5, kind, error_if_nonfinite=True)


def test_norms_are_global() -> None:
    run(_norms, 2)


def _shared_buffers(rank: int, world: int) -> None:
    # Two buckets of one padded size with gaps at different places share the buffers of gradients.
    shapes = ((70, 72), (70,), (72, 69), (72,), (69, 71), (69,))
    model = Given(shapes)
    weights = list(model.weights)
    buckets = assign(weights, 0.018)
    scheme: dict[str, Any] = {"weights": None, "node_size": 1}
    reference = Reference([w.detach().clone() for w in weights], buckets, world, *MOMENTUM, **scheme)
    optimizer = sr.optim.SDP4Bit(model, MOMENTUM[0], bucket_cap_mb=0.018, **scheme, **MOMENTUM[1])
    sizes = [bucket.weights.numel() for bucket in optimizer._buckets]
    assert len(set(sizes)) < len(sizes)
    for step in range(3):
        generators = [torch.Generator().manual_seed(100 * step + r) for r in range(world)]
        # The last bucket, whose buffer the others take over, has by far the largest gradients.
        given = [[torch.randn(s, generator=g) * 10**i for i, s in enumerate(shapes)] for g in generators]
        model(given[rank]).backward()
        reference.reduce(given)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        optimizer.synchronize()
        assert equal(weights, reference.weights), step


class _Functional(nn.Module):
    """Uses parameters of modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.full((16, 16), 0.1)])
        self.holder = nn.Module()
        self.holder.dict = nn.ParameterDict({"w": torch.full((16, 16), 0.1)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's parametrizations have no such hook
            self.normed = nn.utils.weight_norm(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x @ self.list[0] @ self.holder.dict["w"])


def _late(rank: int, world: int) -> None:
    decode_add = ops.decode_add

    def late(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.05)  # the weights arrive well after the next forward has begun
        decode_add(*args, **kwargs)

    results = []
    for overlap in (True, False):
        torch.manual_seed(0)
        model = _Functional()
        options: dict[str, Any] = {"node_size": 1, "bucket_cap_mb": 1e-5, "overlap": overlap}  # a bucket each
        optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.5, **options)
        losses = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "decode_add", late)
            for part in (model.list, model.holder, model.normed):
                loss = model(torch.ones(2, 16)).square().mean() + sum(p.sum() for p in part.parameters())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(model(torch.ones(2, 16)).detach())
            optimizer.zero_grad()
            torch.stack([p.sum() for p in model.parameters()]).sum().backward()
            optimizer.step()
            del optimizer  # waits
            results.append([*losses, *(p.detach().clone() for p in model.parameters())])
    assert equal(*results)


def _lifetimes(rank: int, world: int) -> None:
    models = net(), net()
    optimizers = [sdp4bit(Case(), model, node_size=1) for model in models]
    for owned in (models[0], nn.Sequential(models[0].middle)):
        with pytest.raises(ValueError, match="is trained by another SDP4Bit"):
            sdp4bit(Case(), owned, node_size=1)
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if not step:
            optimizers.clear()
            del optimizer
            assert not any(m._forward_pre_hooks or m._load_state_dict_pre_hooks for m in models[0].modules())
            optimizers = [sdp4bit(Case(), model, node_size=1) for model in models]
            assert same_on_all_ranks(list(models[0].parameters()))
    for optimizer in optimizers:
        optimizer.synchronize()
    assert equal(list(models[0].parameters()), list(models[1].parameters()))
    # A copy has hooks that do nothing, and can be trained by itself.
    stream = io.BytesIO()
    torch.save(models[0], stream)
    stream.seek(0)
    for copied in (torch.load(stream, weights_only=False), copy.deepcopy(models[0])):
        assert equal(list(copied.parameters()), list(models[0].parameters()))
        copied.load_state_dict(copied.state_dict())
        assert optimizers[0]._loaded == set()
        optimizer = sdp4bit(Case(), copied, node_size=1)
        loss_of(copied, batch(rank, 0)).backward()
        optimizer.step()


def _collected_on_a_channel_thread(rank: int, world: int) -> None:
    # The garbage collector may end an optimizer on the very thread that its last weights arrive on.
    decode_add, held, weights = ops.decode_add, [], []
    let_go, gone = threading.Event(), threading.Event()

    def collecting(*args: Any, **kwargs: Any) -> None:
        assert let_go.wait(20)
        held.clear()
        gone.set()
        decode_add(*args, **kwargs)

    for collected in (True, False):
        model = net()
        optimizer = sdp4bit(Case(), model, node_size=1)
        loss_of(model, batch(rank, 0)).backward()
        with pytest.MonkeyPatch.context() as patch:
            if collected:
                held.append(optimizer)
                patch.setattr(ops, "decode_add", collecting)
            optimizer.step()
            if collected:
                del optimizer
                let_go.set()
                assert gone.wait(20), "the thread that the weights arrive on waits for itself"
            loss_of(model, batch(rank, 1)).backward()
        if collected:
            assert not held and all(p.grad is not None for p in model.parameters() if p.requires_grad)
        else:
            optimizer.synchronize()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert equal(*weights)
    x = torch.ones(5)
    sr.all_reduce(x, "int8")  # the threads are alive
    sdp4bit(Case(), model := net(), node_size=1)
    assert same_on_all_ranks(list(model.parameters()))


def _failed_gather(rank: int, world: int) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no decoding today")

    model = nn.Linear(64, 64)
    optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.1, node_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "decode_add", broken)
        model(torch.ones(4, 64)).sum().backward()
        optimizer.step()
        for use in (model.state_dict, optimizer.synchronize, lambda: model(torch.ones(1, 64)), optimizer.checkpoint):
            with pytest.raises(RuntimeError, match="no decoding today"):
                use()
    for exchange in optimizer._exchanges:
        exchange.weights.work = None  # so that the end of the optimizer does not tell it, too


def _start_step(rank: int, world: int) -> None:
    # Gradients of the exact pass, or their zeros, are there when the first compressed ones come, and the other way.
    def one(zeros: bool) -> sr.optim.SDP4Bit:
        model = nn.Linear(70, 3)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.5, node_size=1, start_step=1, gradients="int8")
        for step in range(2):
            (model(torch.ones(1, 70)).sum() * (1 + step)).backward()
            optimizer.step()
            if not step:
                optimizer.zero_grad(set_to_none=not zeros)
        return optimizer

    grads = [[s.tensor.grad for b in one(zeros)._buckets for s in b.slices] for zeros in (True, False)]
    assert grads[0]
    assert equal(*grads)
    model = nn.Linear(64, 4, bias=False)
    optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.0, node_size=1, gradients="int8")
    for exact in (True, False, True):
        optimizer._passes.is_exact = exact
        model(torch.full((1, 64), 2.0)).sum().backward()
    # Three times 2, of which one is within a unit of its group's largest: 1/127 of it, in bf16 rounded up.
    unit = 2.0 / 127 * (1 + 2**-7)
    assert all((s.tensor.grad - 6.0).abs().max() <= unit for b in optimizer._buckets for s in b.slices)


def _graphs(rank: int, world: int) -> None:
    for options in (EXACT, {"node_size": 1}):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.1, **options)
        first, second = model(torch.ones(1, 4)).sum(), model(torch.ones(1, 4)).square().sum()
        first.backward()
        optimizer.step()
        optimizer.synchronize()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()
        optimizer.zero_grad()


def _use(rank: int, world: int) -> None:
    # Replaced gradients are clipped, too; gradients that a step has used and nobody has forgotten are told of, once.
    model = nn.Linear(64, 64, bias=False)
    optimizer = sr.optim.SDP4Bit(model, torch.optim.SGD, lr=0.0, **EXACT)
    model(torch.ones(1, 64)).sum().backward()  # 4096 elements of 1: a norm of 64
    for one in optimizer._buckets[0].slices:
        one.tensor.grad = one.tensor.grad * 2
    assert [optimizer.clip_grad_norm_(16.0).item() for _ in range(2)] == [128.0, 16.0]
    optimizer.step()
    model.zero_grad()
    model(torch.ones(1, 64)).sum().backward()
    assert all(torch.equal(s.tensor.grad, torch.full_like(s.tensor, 1.25)) for s in optimizer._buckets[0].slices)
    with pytest.warns(UserWarning, match="gradients of an earlier step"):
        optimizer.step()
    optimizer.zero_grad()
    # What was put in the place of a gradient goes with it, set to zero or not.
    model(torch.ones(1, 64)).sum().backward()
    for one in optimizer._buckets[0].slices:
        one.tensor.grad = one.tensor.grad * 2
    optimizer.zero_grad(set_to_none=False)
    model(torch.ones(1, 64)).sum().backward()
    assert all(torch.equal(s.tensor.grad, torch.ones_like(s.tensor)) for s in optimizer._buckets[0].slices)
    for norm_type in (0.0, -1.0):
        with pytest.raises(ValueError, match="norm_type"):
            optimizer.clip_grad_norm_(1.0, norm_type)
    # Only what was loaded becomes the master's.
    optimizer = sr.optim.SDP4Bit(other := nn.Linear(64, 64), torch.optim.SGD, lr=0.1, node_size=1)
    other(torch.ones(1, 64)).square().sum().backward()
    optimizer.step()
    optimizer.synchronize()
    before = [one.tensor.detach().clone() for one in optimizer._buckets[0].slices]
    other.load_state_dict({"bias": torch.zeros(64)}, strict=False)
    optimizer.state_dict()
    for one, old in zip(optimizer._buckets[0].slices, before, strict=True):
        assert torch.equal(one.tensor, torch.zeros(64) if one.member.name == "bias" else old)


@pytest.mark.parametrize(
    "check",
    [_shared_buffers, _late, _lifetimes, _collected_on_a_channel_thread, _failed_gather, _start_step, _graphs, _use],
    ids=lambda f: f.__name__,
)
def test_corners(check: Any) -> None:
    run(check, 2)
