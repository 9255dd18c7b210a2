"""DGC against a transcription of the paper, and against torch's SGD where it is that."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import smallreduce as sr
from ddp.training import Given, dyadic, equal, same_on_all_ranks, wrap
from optim.dgc_training import (
    SHAPES,
    advance_reference,
    given_ddp,
    given_gradients,
    reference_for,
    same_weights,
    selecting_twice,
)
from ranks import run
from smallreduce.collectives import _engine, _engine_for


def _trajectory(rank: int, world: int, options: dict[str, Any]) -> None:
    ddp = given_ddp()
    optimizer = sr.optim.DGC(ddp, **options)
    reference = reference_for(ddp, world, **options)
    dense_steps = sum(steps for steps, ratio in options.get("warmup", ()) if ratio == 1)
    for step in range(10):
        optimizer.zero_grad()
        exact = step < dense_steps  # gloo adds up in an order of its own
        ddp(given_gradients(step, rank, exact)).backward()
        optimizer.step()
        advance_reference(reference, step, exact)
        assert same_weights(ddp, reference.weights), step
        assert same_on_all_ranks(list(ddp.parameters())), step
        assert any(mask is None for mask in reference.sent[rank])
        saved = optimizer.state_dict()["compression"]["parameters"]
        for index, mask in enumerate(reference.sent[rank]):
            if mask is not None:
                mine = saved[f"weights.{index}"]
                for given, expected in (("worker", reference.v), ("momentum", reference.u)):
                    # What the reference has is this rank's share of the mean.
                    assert np.array_equal(mine[given].numpy(), world * expected[rank][index].ravel()), (step, given)
    assert len(optimizer.stats().buckets) > 1
    assert sum(mask is not None for mask in reference.sent[rank]) == sum(len(shape) > 1 for shape in SHAPES)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False},
        {"nesterov": True},
        {"nesterov": False, "momentum_masking": False, "weight_decay": 0.01},
        {"nesterov": True, "momentum_masking": False, "weight_decay": 0.01},
        {"nesterov": True, "weight_decay": 0.01, "warmup": ((2, 1.0), (3, 0.25), (2, 0.07))},
    ],
    ids=str,
)
def test_the_trajectory_is_that_of_the_paper(options: dict[str, Any]) -> None:
    """Bit for bit, velocity and momentum too: every operation on both sides is one of fp32, rounded on its own, in the
    same order, and the shares of four ranks are exactly a fourth."""
    run(_trajectory, 4, {"lr": 0.1, "momentum": 0.9, "ratio": 0.02, **options})


def _clipped(rank: int, world: int) -> None:
    """Each gradient is +-2^e in all of its 4^n elements: its norm, and what it is shortened by, are powers of two."""
    shapes = [(8, 8), (16,), (16, 64)]
    module = Given(shapes)
    ddp = wrap(module)
    # On one rank everything is dense.
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.5, "ratio": 0.1 if world > 1 else 1.0, "clip_norm": 4.0}
    optimizer = sr.optim.DGC(ddp, **options)
    reference = reference_for(ddp, world, **options)

    def gradients(step: int, rank: int) -> list[torch.Tensor]:
        return [
            2.0 ** (((step + rank + index) % 7) - 4) * dyadic(shape, step, rank, index).sign().add(0.5).sign()
            for index, shape in enumerate(shapes)
        ]

    norms = [float(gradient.norm()) for step in range(6) for r in range(world) for gradient in gradients(step, r)]
    limit = 4.0 * world**0.5  # of a gradient, which is `world` times its share
    assert min(norms) < limit < max(norms)
    for step in range(6):
        optimizer.zero_grad()
        ddp(gradients(step, rank)).backward()
        optimizer.step()
        reference.step([[g.numpy() for g in gradients(step, r)] for r in range(world)])
        assert same_weights(ddp, reference.weights), step


@pytest.mark.parametrize("world", [1, 4])
def test_gradients_are_clipped_before_they_accumulate(world: int) -> None:
    run(_clipped, world)


def _sgd(rank: int, world: int, ratio: float, nesterov: bool) -> None:
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.5, "nesterov": nesterov, "weight_decay": 0.5}
    ours = given_ddp()
    optimizer = sr.optim.DGC(ours, ratio=ratio, momentum_masking=False, **options)
    runs = []
    for dtype in (torch.float32, torch.float64):
        theirs = given_ddp(dtype)
        runs.append((theirs, torch.optim.SGD(theirs.parameters(), **options)))
    for step in range(4):
        optimizer.zero_grad()
        ours(given_gradients(step, rank, exact=True)).backward()
        optimizer.step()
        for theirs, sgd in runs:
            sgd.zero_grad()
            theirs([g.to(theirs.module.weights[0].dtype) for g in given_gradients(step, rank, exact=True)]).backward()
            sgd.step()
        assert equal(list(ours.parameters()), list(runs[0][0].parameters())), step
        # Nothing has been rounded, in whatever order it was added up.
        assert equal(list(ours.parameters()), [p.detach().float() for p in runs[1][0].parameters()]), step
        assert equal([p.detach().double() for p in ours.parameters()], list(runs[1][0].parameters())), step
    codecs = {codec for bucket in optimizer.stats().buckets for codec in bucket.codecs}
    assert codecs == (set() if ratio == 1 or world == 1 else {f"topk:{ratio}"})


@pytest.mark.parametrize("nesterov", [False, True])
# 0.99999 of fewer than 100 000 elements, rounded up, are all of them; 1 is the dense path.
@pytest.mark.parametrize("ratio", [1.0, 0.99999])
@pytest.mark.parametrize("world", [1, 4])
def test_it_is_sgd_where_everything_is_sent(world: int, ratio: float, nesterov: bool) -> None:
    run(_sgd, world, ratio, nesterov)


def _sixteen_bits(rank: int, world: int) -> None:
    """The model in bf16 against one in fp32 with the same gradients: what is kept of them is the same, in fp32."""
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        ddp = given_ddp(dtype)
        optimizer = sr.optim.DGC(ddp, lr=0.25, momentum=0.75, nesterov=True, weight_decay=0.1, ratio=0.05)
        gradients = []
        for step in range(4):
            optimizer.zero_grad()
            # Multiples of 1/8 up to 8 are 7 bits long.
            ddp([g.to(dtype) for g in given_gradients(step, rank, exact=True)]).backward()
            gradients.append([parameter.grad for parameter in ddp.parameters()])
            optimizer.step()
            assert same_on_all_ranks(list(ddp.parameters()))
        states.append((optimizer.state_dict()["compression"]["parameters"], gradients))
        # The buffers of the dense parameters and of weight decay keep their 32 bits through a checkpoint.
        optimizer.load_state_dict(optimizer.state_dict())
        kept = {name: v.dtype for state in optimizer.state.values() for name, v in state.items()}
        assert kept == {"momentum_buffer": torch.float32, "weight_decay_buffer": torch.float32}
    (wide, wide_gradients), (narrow, narrow_gradients) = states
    for name, saved in wide.items():
        assert torch.equal(saved["worker"], narrow[name]["worker"])
        assert torch.equal(saved["momentum"], narrow[name]["momentum"])
    for theirs, ours in zip(wide_gradients, narrow_gradients, strict=True):
        assert equal([None if g is None else g.bfloat16() for g in theirs], ours)


def test_momentum_and_velocity_of_a_model_in_bf16_are_fp32() -> None:
    run(_sixteen_bits, 2)


def _owed(optimizer: sr.optim.DGC, world: int) -> dict[str, torch.Tensor]:
    """What is owed to the mean of each gradient, in fp64: the mean of the velocities, and the servers' residuals."""
    owed = {}
    for name, saved in optimizer.state_dict()["compression"]["parameters"].items():
        whole = torch.zeros(-(-saved["numel"] // 32) * 32, dtype=torch.float64)
        whole[: saved["numel"]] += saved["worker"].double() / world
        for (_, begin, end), server in zip(saved["shards"], saved["server"], strict=True):
            if server is not None:
                whole[32 * begin : 32 * end] += server.double()
        dist.all_reduce(whole)
        owed[name] = whole[: saved["numel"]]
    return owed


def _telescopes(rank: int, world: int) -> None:
    """The first stages select twice, with a residual of the server, the last sends packets that are small enough to be
    gathered: what has gone in has come out or is owed, exactly."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_engine_for, "gathers", lambda packet_nbytes, world_size: packet_nbytes <= 300)
        ddp = given_ddp()
        warmup = ((2, 0.5), (2, 0.25))
        optimizer = sr.optim.DGC(ddp, lr=0.5, momentum=0.5, ratio=0.01, warmup=warmup, momentum_masking=False)
        names = [name for name, p in ddp.module.named_parameters() if p.dim() > 1]
        went_in = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in ddp.module.named_parameters()}
        came_out = {name: torch.zeros_like(total) for name, total in went_in.items()}
        momenta = {name: torch.zeros_like(total) for name, total in went_in.items()}
        server = []
        for step in range(7):
            optimizer.zero_grad()
            gradients = given_gradients(step, rank, exact=True)
            ddp(gradients).backward()
            for (name, parameter), gradient in zip(ddp.module.named_parameters(), gradients, strict=True):
                mean = gradient.double().flatten() / world
                dist.all_reduce(mean)
                momenta[name] = 0.5 * momenta[name] + mean
                went_in[name] += momenta[name]
                assert parameter.grad is not None
                came_out[name] += parameter.grad.double().flatten()
            optimizer.step()
            owed = _owed(optimizer, world)
            for name in names:
                assert torch.equal(went_in[name], came_out[name] + owed[name]), (step, name)
            saved = optimizer.state_dict()["compression"]["parameters"].values()
            server.append(sum(float(s.abs().sum()) for p in saved for s in p["server"] if s is not None))
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, server)
        # It was there, and the last stage has none.
        assert all(any(of_rank[step] for of_rank in everyone) for step in range(4))
        assert not any(of_rank[step] for of_rank in everyone for step in range(4, 7))


def test_nothing_is_lost_between_stages_and_forms_of_the_collective() -> None:
    run(_telescopes, 2)


def _narrow(rank: int, world: int, values: torch.dtype) -> None:
    """Values of 16 bits on the wire: what they round away is owed. The sums of dyadic gradients are exact."""
    ddp = given_ddp()
    optimizer = sr.optim.DGC(ddp, lr=0.5, momentum=0.5, ratio=0.05, values=values, momentum_masking=False)
    weights = dict(ddp.module.named_parameters())
    went_in = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in weights.items()}
    came_out = {name: torch.zeros_like(total) for name, total in went_in.items()}
    momenta = {name: torch.zeros_like(total) for name, total in went_in.items()}
    for step in range(5):
        optimizer.zero_grad()
        gradients = given_gradients(step, rank, exact=True)
        ddp(gradients).backward()
        for (name, parameter), gradient in zip(weights.items(), gradients, strict=True):
            mean = gradient.double().flatten() / world
            dist.all_reduce(mean)
            momenta[name] = 0.5 * momenta[name] + mean
            went_in[name] += momenta[name]
            assert parameter.grad is not None
            came_out[name] += parameter.grad.double().flatten()
        optimizer.step()
        for name, owed in _owed(optimizer, world).items():
            assert torch.equal(went_in[name], came_out[name] + owed), (step, name)
    codecs = {codec for bucket in optimizer.stats().buckets for codec in bucket.codecs}
    assert codecs == {sr.TopK(0.05, values).spelling} != {"topk:0.05"}


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16])
def test_what_narrow_values_round_away_is_owed(values: torch.dtype) -> None:
    run(_narrow, 2, values)


def _masked(rank: int, world: int, chunk_numel: int) -> None:
    """Where packets are split, in several chunks too, momentum is forgotten just where this rank's packet has taken an
    element; nowhere else has it or the velocity another bit than the paper's formula gives."""
    with selecting_twice(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(_engine, "CHUNK_NUMEL", chunk_numel)
        ddp = given_ddp()
        optimizer = sr.optim.DGC(ddp, lr=0.5, momentum=0.5, ratio=0.05)
        u: dict[str, torch.Tensor] = {}
        v: dict[str, torch.Tensor] = {}
        sent = 0
        for step in range(5):
            optimizer.zero_grad()
            gradients = given_gradients(step, rank)
            ddp(gradients).backward()
            optimizer.step()
            for name, saved in optimizer.state_dict()["compression"]["parameters"].items():
                gradient = gradients[int(name.split(".")[1])].flatten()
                momentum = 0.5 * u.get(name, torch.zeros_like(gradient)) + gradient
                velocity = v.get(name, torch.zeros_like(gradient)) + momentum
                taken = saved["worker"] == 0
                u[name], v[name] = momentum.masked_fill(taken, 0.0), velocity.masked_fill(taken, 0.0)
                assert torch.equal(saved["momentum"], u[name]) and torch.equal(saved["worker"], v[name])
                sent += int(taken.sum())
        parts = [part for plan in optimizer._hook_state._plans.values() for part in plan.parts]
        assert sent and {type(part.engine) for part in parts} == {_engine.AllReduce}
        assert (max(part.engine.chunks for part in parts) > 1) == (chunk_numel == 64)


@pytest.mark.parametrize("chunk_numel", [1 << 22, 64])
def test_momentum_is_masked_where_packets_are_split(chunk_numel: int) -> None:
    run(_masked, 2, chunk_numel)


def _clipped_in(rank: int, world: int, dtype: torch.dtype) -> None:
    """Each rank's gradient, clipped on its own, in any dtype.

    With u and u32 half a unit in the last place of ``dtype`` and of fp32, in which the norm is taken at least, and
    clipped gradients of at most G: in a norm of n elements each square and each sum is rounded, and the root, (n + 2)
    u32; the factor is a quotient, and rounded to fp32, (n + 4) u32; the product is rounded, u; it is multiplied by 1/W,
    and W are added, (W + 1) u at most. So the mean is off by ((n + 4) u32 + (W + 2) u) G, and twice that is more than
    the products of these errors make of it.
    """
    ddp = given_ddp(dtype)
    optimizer = sr.optim.DGC(ddp, lr=1.0, ratio=1.0, momentum=0.0, clip_norm=1.0)
    ddp([gradient.to(dtype) for gradient in given_gradients(0, rank)]).backward()
    unit, unit32 = torch.finfo(dtype).eps / 2, 2.0**-24
    for index, parameter in enumerate(ddp.parameters()):
        clipped = []
        for r in range(world):
            gradient = given_gradients(0, r)[index].to(dtype).double()
            clipped.append(gradient * min(1.0, float(world**0.5 / gradient.norm())))
        largest = max(float(gradient.abs().max()) for gradient in clipped)
        assert parameter.grad is not None
        error = float((parameter.grad.double() - torch.stack(clipped).mean(0)).abs().max())
        assert error <= 2 * ((parameter.numel() + 4) * unit32 + (world + 2) * unit) * largest
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_gradients_of_any_dtype_are_clipped(dtype: torch.dtype) -> None:
    run(_clipped_in, 2, dtype)


def _clips_infinity(rank: int, world: int) -> None:
    """It reaches the scaler, which skips the step, and nothing that is kept."""
    for index in (0, 1):  # a matrix, compressed, and a vector, dense
        ddp = given_ddp()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        optimizer = sr.optim.DGC(ddp, lr=0.25, momentum=0.5, ratio=0.001, clip_norm=1.0, scaler=scaler)
        for step in range(6):
            gradients = given_gradients(step, rank, exact=True)
            if step == 3 and rank == 1:
                gradients[index].view(-1)[0] = torch.inf
            before = [p.detach().clone() for p in ddp.parameters()]
            optimizer.zero_grad()
            scaler.scale(ddp(gradients)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert equal(list(ddp.parameters()), before) == (step == 3)
        assert scaler.get_scale() == 2.0**5
        saved = optimizer.state_dict()["compression"]["parameters"].values()
        kept = [of_parameter[key] for of_parameter in saved for key in ("worker", "momentum")]
        assert all(bool(tensor.isfinite().all()) for tensor in [*kept, *ddp.parameters()])
        assert same_on_all_ranks(list(ddp.parameters()))


def test_an_infinite_gradient_is_not_clipped_away() -> None:
    run(_clips_infinity, 2)


def _scaled(rank: int, world: int, options: dict[str, Any], passes: int) -> None:
    """With a loss scale, powers of two, everything is that of a run without one, skipped steps left out."""
    plain, scaled = (given_ddp(**options) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    # Steps of the warm-up are backward passes, skipped ones too.
    stages = ((2, 1.0), (3, 0.25))
    make: Callable[..., sr.optim.DGC] = lambda ddp, **more: sr.optim.DGC(  # noqa: E731
        ddp, lr=0.25, momentum=0.5, nesterov=True, weight_decay=0.25, ratio=0.05, clip_norm=2.0**20, **more
    )
    optimizer = make(plain, warmup=((1, 1.0), (2, 0.25)))
    scaled_optimizer = make(scaled, warmup=stages, scaler=scaler)
    scales = [scaler.get_scale()]
    for step in range(9):
        given: list[list[torch.Tensor | None]] = [[*given_gradients(7 * step + k, rank, True)] for k in range(passes)]
        if options and step in (3, 5):
            for gradients_of_pass in given:
                gradients_of_pass[6] = None
        # The first step of all, that of the first compressed stage, and one when all is under way.
        overflow = step in (0, 2, 7)
        if not overflow:
            optimizer.zero_grad()
            _accumulate(plain, given, lambda loss: loss)
            optimizer.step()
        elif rank == 1:
            given[step % passes][2] = torch.full(SHAPES[2], torch.inf)
        scaled_optimizer.zero_grad()
        _accumulate(scaled, given, scaler.scale)
        scaler.step(scaled_optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert equal(list(scaled.parameters()), list(plain.parameters())), step
        if step == 2:  # the next step brings velocity and momentum back, where state_dict() has not
            continue
        ours, theirs = (o.state_dict()["compression"]["parameters"] for o in (scaled_optimizer, optimizer))
        for name, saved in theirs.items():
            for key in ("worker", "momentum"):
                assert torch.equal(ours[name][key], saved[key] * scaler.get_scale()), (step, name, key)
    assert theirs
    assert {after / before for before, after in itertools.pairwise(scales)} == {0.5, 1.0, 2.0}


def _accumulate(
    ddp: nn.parallel.DistributedDataParallel, given: list[Any], scale: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for number, gradients in enumerate(given):
        with ddp.no_sync() if number + 1 < len(given) else contextlib.nullcontext():
            scale(ddp(gradients)).backward()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}])
@pytest.mark.parametrize("passes", [1, 2])
def test_velocity_and_momentum_follow_the_loss_scale_and_skipped_steps_leave_them(
    passes: int, options: dict[str, Any]
) -> None:
    run(_scaled, 2, options, passes)
