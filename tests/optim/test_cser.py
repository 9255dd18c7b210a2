"""CSER as an optimizer: what torch's own can do, it does on all ranks alike."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr
from ddp.test_stats import collectives_of
from ddp.training import dyadic, equal, loss_of, mlp, same_on_all_ranks
from optim.cser_training import Absolute, flat
from ranks import outcomes, run
from smallreduce import metrics
from smallreduce.optim import CSER

BACKEND = metrics.register_counting_backend()

MEMBERS: dict[str, dict[str, Any]] = {
    "cser": {"gradient_codec": "topk:0.05", "model_codec": "int4", "reset_interval": 3},
    "cser of quantisers": {"gradient_codec": "int4:rounding=stochastic", "model_codec": "sign", "reset_interval": 2},
    "cser of blocks": {"gradient_codec": "random-blocks:0.1", "model_codec": "random-blocks:0.5", "reset_interval": 3},
    "csea": {"gradient_codec": "nothing", "model_codec": "int4-hadamard", "reset_interval": 1},
    "cser-pl": {"gradient_codec": "nothing", "model_codec": "topk:0.1", "reset_interval": 3},
    "ef-sgd": {"gradient_codec": "nothing", "model_codec": "int4", "reset_interval": 1, "apply_residual": False},
    "qsparse": {"gradient_codec": "nothing", "model_codec": "int2", "reset_interval": 3, "apply_residual": False},
    "exact": {"gradient_codec": None},
}


def train(optimizer: CSER, model: nn.Module, rank: int, begin: int, end: int) -> None:
    for step in range(begin, end):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- what the ranks share ------------------------------------------------------------------------------------------


def _shares(rank: int, world: int, member: str) -> None:
    """On real numbers: the shared model has the same bits on all ranks, and no update gets lost.

    The mean over the ranks of the parameters is the beginning less all updates' mean, but for rounding and for what
    servers have not sent yet. Let u be 2^-24, M the largest of lr times gradients and momenta, so that an update is
    below 2 M, and X what is largest of parameters and shared models after the steps plus 2 M, so that it is above those
    within a step too. Each constant (0.9, lr, 1/W) is rounded as well. Then a rank rounds, in T steps and an element:

    - momentum by 3 u M in each, which it carries on: 3 T u M; with two constants more, an update by (3 T + 8) u M;
    - the mean of W updates, or of W ranks' parameters, by (W + 1) u times 2 M, or X; the parameters by u X;
    - in a reset, the difference by 2 u X, its mean by (W + 1) u 2 X, the shared model and the parameters by 2 u X.

    So T steps stay below T u ((3 T + 2 W + 10) M + (2 W + 7) X), and 1 + 2^-10 times that is above what rounding does
    to M and X themselves, where the mean is not encoded again and nothing is left with servers.
    """
    torch.manual_seed(rank)  # another model on each rank, until it is broadcast
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 7))
    optimizer = CSER(model, lr=0.1, weight_decay=0.0, **MEMBERS[member])
    assert same_on_all_ranks(values(model))
    began, velocity = flat(values(model)), np.zeros(sum(p.numel() for p in model.parameters()))
    updates = np.zeros_like(velocity)
    sizes = torch.zeros(2, dtype=torch.float64)  # M, X
    steps = 7
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        gradient = flat([p.grad for p in model.parameters() if p.grad is not None])
        velocity = 0.9 * velocity + gradient
        update = 0.1 * (gradient + 0.9 * velocity)
        updates += update
        optimizer.step()
        shared = [held["shared"] for held in optimizer.state.values() if "shared" in held]
        sizes[0] = max(float(sizes[0]), 0.1 * float(np.abs([gradient, velocity]).max()))
        sizes[1] = max(float(sizes[1]), *(float(tensor.abs().max()) for tensor in [*values(model), *shared]))
        if optimizer._scheme.keeps_shared:
            assert same_on_all_ranks([optimizer.state[p]["shared"] for p in model.parameters()])
        if optimizer._scheme.ranks_agree:
            assert same_on_all_ranks(values(model))
        else:
            assert same_on_all_ranks(values(model)) == (not optimizer._scheme.apply_residual and (step + 1) % 3 == 0)
    totals = torch.from_numpy(np.stack([flat(values(model)), updates]))
    dist.all_reduce(totals.div_(world))
    dist.all_reduce(sizes, dist.ReduceOp.MAX)
    m, x = float(sizes[0]), float(sizes[1] + 2 * sizes[0])
    bound = (1 + 2**-10) * steps * 2**-24 * ((3 * steps + 2 * world + 10) * m + (2 * world + 7) * x)
    difference = np.abs(totals[0].numpy() - (began - totals[1].numpy())).max()
    if member in ("cser of blocks", "cser-pl", "exact"):
        assert difference < bound
    else:
        assert difference > bound  # so the bound tells what is lost from what is rounded


@pytest.mark.parametrize("member", MEMBERS)
def test_what_ranks_share_has_the_same_bits(member: str) -> None:
    run(_shares, 3, member)


def _alone(rank: int, world: int, member: str) -> None:
    """One rank: torch's SGD, bit for bit, whatever the codecs."""
    ours, theirs = mlp(), mlp()
    optimizer = CSER(ours, lr=0.1, **MEMBERS[member])
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    for step in range(4):
        train(optimizer, ours, rank, step, step + 1)
        sgd.zero_grad()
        loss_of(theirs, rank, step).backward()
        sgd.step()
        assert equal(values(ours), values(theirs)), step
    stats = optimizer.stats()
    assert stats.bytes_sent == stats.collectives == 0
    assert math.isnan(stats.wire_ratio)
    with optimizer.averaged():
        assert equal(values(ours), values(theirs))


@pytest.mark.parametrize("member", MEMBERS)
def test_one_rank_is_torch_sgd(member: str) -> None:
    run(_alone, 1, member)


# ---- figures -------------------------------------------------------------------------------------------------------


def _counts(rank: int, world: int, member: str) -> None:
    model = mlp()
    optimizer = CSER(model, lr=0.1, **MEMBERS[member])
    metrics.reset()
    before = optimizer.stats()
    train(optimizer, model, rank, 0, 6)
    stats = optimizer.stats()
    assert stats.bytes_sent - before.bytes_sent == stats.step_bytes_sent == metrics.bytes_sent() > 0
    assert stats.collectives - before.collectives == collectives_of(metrics.sent())
    assert stats.steps == 6
    assert stats.resets == {"cser of quantisers": 3, "csea": 6, "ef-sgd": 0, "exact": 0}.get(member, 2)
    numel = sum(p.numel() for p in model.parameters())
    assert stats.uncompressed_bytes == 6 * (2 * (world - 1) * 4 * numel // world)
    with optimizer.averaged():
        pass
    after = optimizer.stats()
    assert after.bytes_sent - before.bytes_sent == metrics.bytes_sent()
    assert after.step_bytes_sent == stats.step_bytes_sent
    assert f"{stats.bytes_sent} bytes" in str(stats)


@pytest.mark.parametrize("member", MEMBERS)
def test_bytes_are_those_counted_at_the_process_group(member: str) -> None:
    run(_counts, 2, member, backend=BACKEND)
    run(_counts, 3, member, backend=BACKEND)


def _ratios(rank: int, world: int) -> None:
    def ratio(**options: Any) -> float:
        optimizer = CSER(nn.Linear(2, 2), lr=0.1, **options)
        assert f"compression ratio {optimizer.compression_ratio:.4g}" in repr(optimizer)
        return optimizer.compression_ratio

    assert ratio() == 32  # 1/64 + 1/(16 * 4)
    assert ratio(gradient_codec="random-blocks:0.125", model_codec="random-blocks:0.25", reset_interval=2) == 4
    assert ratio(gradient_codec="nothing", model_codec="random-blocks:0.25", reset_interval=2) == 8
    assert ratio(gradient_codec="bf16", model_codec=None, reset_interval=4) == 32 / (16 + 8)
    assert ratio(gradient_codec=None) == 1
    assert ratio(gradient_codec="nothing", model_codec=None, reset_interval=5) == 5
    int4 = sr.IntQuant(4).bits_per_element
    assert ratio(**MEMBERS["ef-sgd"]) == 32 / int4
    sign = sr.Sign().bits_per_element
    assert ratio(**MEMBERS["cser of quantisers"]) == 32 / (int4 + sign / 2)


def test_compression_ratio() -> None:
    run(_ratios, 1)


def _sends_less(rank: int, world: int) -> None:
    """Large enough that headers and padding do not matter: blocks in place send what the released code does."""
    model = nn.Linear(1024, 64, bias=False)
    optimizer = CSER(model, lr=0.1)
    for _ in range(32):
        optimizer.zero_grad()
        model(torch.ones(1, 1024)).sum().backward()
        optimizer.step()
    # ((H - 1)/R_C2 + 1/R_C1)/H; 65536 elements divide into equal blocks.
    assert optimizer.stats().wire_ratio == 1 / ((15 / 64 + 1 / 4) / 16)


def test_blocks_in_place_send_less_than_the_formula() -> None:
    run(_sends_less, 2)


# ---- the averaged model --------------------------------------------------------------------------------------------


class WithBuffers(Absolute):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("statistics", torch.zeros(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def _averages(rank: int, world: int, member: str) -> None:
    model = WithBuffers()
    model.statistics.fill_(rank)
    optimizer = CSER(model, lr=0.25, momentum=0.5, **MEMBERS[member])
    assert torch.equal(model.statistics, torch.zeros(5))  # that of rank 0

    def steps(begin: int, end: int) -> None:
        for step in range(begin, end):
            optimizer.zero_grad()
            model(rank, step).backward()
            optimizer.step()

    steps(0, 4)
    model.statistics.fill_(rank)
    model.count.fill_(rank)
    before = values(model)
    # Exact on these numbers, whatever the order of the sum.
    mean = torch.cat([value.flatten() for value in before]).mul_(1 / world)
    dist.all_reduce(mean)
    with optimizer.averaged():
        assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), mean)
        assert torch.equal(model.statistics, torch.full((5,), sum(range(world)) / world))
        assert model.count == rank
        for call in (optimizer.step, optimizer.state_dict, lambda: optimizer.averaged().__enter__()):
            with pytest.raises(RuntimeError, match="within averaged"):
                call()
        model(rank, 9).backward()  # autograd works inside
    assert equal(values(model), before)
    assert same_on_all_ranks(before) == optimizer._scheme.ranks_agree
    assert torch.equal(model.statistics, torch.full((5,), float(rank)))
    with contextlib.suppress(ZeroDivisionError), optimizer.averaged():
        next(model.parameters()).data.zero_()
        raise ZeroDivisionError
    assert equal(values(model), before)
    steps(4, 6)


@pytest.mark.parametrize("member", ["cser", "cser of blocks", "qsparse", "ef-sgd"])
def test_averaged_is_the_mean_and_then_undone(member: str) -> None:
    run(_averages, 4, member)


# ---- as torch's optimizers -----------------------------------------------------------------------------------------


def _scaled(rank: int, world: int, member: str, unscale: bool) -> None:
    """With a loss scale, powers of two, everything is that of a run without one, skipped steps left out."""
    plain, scaled = Absolute(), Absolute()
    options = {"lr": 0.25, "momentum": 0.5, **MEMBERS[member]}
    optimizers = [CSER(model, **options) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    for step in range(7):
        overflows = step in (0, 3)
        if not overflows:
            optimizers[0].zero_grad()
            plain(rank, step).backward()
            optimizers[0].step()
        optimizers[1].zero_grad()
        scaler.scale(scaled(rank, step)).backward()
        if overflows and rank == 1:
            grad = scaled.weights[2].grad
            assert grad is not None
            grad[3] = math.inf if step else math.nan
        if unscale:
            scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
        assert equal(values(plain), values(scaled)), step
    assert optimizers[1].stats().skipped_steps == 2
    assert optimizers[1].steps == 5
    # Seven steps, of which rank 1 saw two overflow: its scale is its own.
    assert scaler.get_scale() == (2.0**6 * 2 ** (2 - 2) if rank == 1 else 2.0**6 * 2**3)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("member", ["cser", "cser of blocks", "ef-sgd"])
def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(member: str, unscale: bool) -> None:
    run(_scaled, 2, member, unscale)


def _groups(rank: int, world: int) -> None:
    """Two groups with options of their own are two optimizers; one may be added later; schedulers set their rates."""
    together, first, second = Absolute(), Absolute(), Absolute()
    weights = list(together.weights)
    options: dict[str, Any] = {"lr": 0.25, "momentum": 0.5, "gradient_codec": "topk:0.1", "model_codec": "topk:0.2",
                               "reset_interval": 2}  # fmt: skip
    optimizer = CSER(together, params=[{"params": weights[:3]}], **options)
    late = {"params": weights[3:], "lr": 0.5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.5}
    optimizer.add_param_group(copy.copy(late))
    assert len(optimizer.param_groups) == 2
    others = [
        CSER(first, params=first.weights[:3], **options),
        CSER(second, **{**options, **late, "params": second.weights[3:]}),
    ]
    schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5) for o in (optimizer, *others)]
    for step in range(5):
        for model, each in ((together, [optimizer]), (first, others[:1]), (second, others[1:])):
            for one in each:
                one.zero_grad(set_to_none=step % 2 == 0)
            model(rank, step).backward()
            for one in each:
                assert one.step(lambda: 7.0) == 7.0
        for scheduler in schedulers:
            scheduler.step()
        assert equal(weights[:3], list(first.weights)[:3]), step
        assert equal(weights[3:], list(second.weights)[3:]), step
    assert optimizer.param_groups[0]["lr"] == 0.0625
    lr_as_a_tensor = CSER(Absolute(), torch.tensor(0.25), gradient_codec="topk:0.1")
    assert lr_as_a_tensor.param_groups[0]["lr"].item() == 0.25


def test_groups_schedulers_and_closures() -> None:
    run(_groups, 2)


def _closes(rank: int, world: int) -> None:
    """A closure computes gradients, and gradients accumulate over calls of backward."""
    models = [Absolute() for _ in range(3)]
    optimizers = [CSER(m, lr=0.25, momentum=0.5, **MEMBERS["cser"]) for m in models]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (models[0](rank, step) + models[0](rank, step + 50)).backward()
        optimizers[0].step()

        def closure(step: int = step) -> float:
            loss = models[1](rank, step) + models[1](rank, step + 50)
            loss.backward()
            return float(loss)

        assert isinstance(optimizers[1].step(closure), float)
        models[2](rank, step).backward()
        models[2](rank, step + 50).backward()
        optimizers[2].step()
        assert equal(values(models[0]), values(models[1]))
        assert equal(values(models[0]), values(models[2]))


def test_closures_and_accumulation() -> None:
    run(_closes, 2)


def _missing(rank: int, world: int, member: str) -> None:
    """No gradient on one rank counts as zero; a frozen parameter does not move, and takes part once it is not."""
    options = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.0, **MEMBERS[member]}
    models = [Absolute(), Absolute()]
    optimizers = [CSER(model, **options) for model in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(rank, step).backward()
            if rank == 1:
                model.weights[0].grad = None if model is models[0] else torch.zeros_like(model.weights[0])
            optimizer.step()
        assert equal(values(models[0]), values(models[1])), step

    model = Absolute()
    model.weights[1].requires_grad_(False)
    optimizer = CSER(model, **{**options, "weight_decay": 0.5})
    frozen = model.weights[1].detach().clone()
    sent = []
    for step in range(6):
        if step == 3:
            model.weights[1].requires_grad_()
        optimizer.zero_grad()
        model(rank, step).backward()
        optimizer.step()
        assert torch.equal(model.weights[1], frozen) == (step < 3)
        sent.append(optimizer.stats().uncompressed_bytes)
        if optimizer._scheme.keeps_shared:
            assert same_on_all_ranks([held["shared"] for held in optimizer.state.values()])
    assert (sent[3] - sent[2]) - (sent[2] - sent[1]) == 2 * (world - 1) * 4 * frozen.numel() // world
    # Frozen after it was trained: what workers and servers owe still comes, and so ranks agree in the end. Whatever was
    # added on the way, each of its sums of W + 1 and of a few more is rounded by 2^-24 of at most twice the largest.
    model.weights[1].requires_grad_(False)
    states: list[Any] = [None] * world
    dist.all_gather_object(states, optimizer.state_dict())
    (settled,) = CSER.reshard(states, 1)
    average = model.weights[1].detach() / world
    dist.all_reduce(average)
    for _ in range(6, 120):
        optimizer.zero_grad()
        optimizer.step()
    end, expected = model.weights[1].detach(), settled["state"][1]["parameter"]
    assert same_on_all_ranks([end])
    assert float((end - expected).abs().max()) <= 114 * 2**-24 * (2 * world + 8) * 2 * float(expected.abs().max())
    # Servers had owed something where the mean is encoded again.
    assert torch.equal(end, average) == (member in ("cser of blocks", "cser-pl"))


@pytest.mark.parametrize("member", ["cser", "cser of blocks", "cser-pl", "ef-sgd"])
def test_parameters_without_a_gradient(member: str) -> None:
    run(_missing, 2, member)


def _channels_last(rank: int, world: int, member: str) -> None:
    """The memory format of a parameter changes nothing."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3)
    strided = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert not strided.weight.is_contiguous()
    optimizers = [CSER(model, lr=0.25, momentum=0.5, **MEMBERS[member]) for model in (plain, strided)]
    for step in range(4):
        for model, optimizer in zip((plain, strided), optimizers, strict=True):
            for index, p in enumerate(model.parameters()):
                p.grad = dyadic(tuple(p.shape), rank, step, index).to(
                    memory_format=torch.channels_last if p.dim() == 4 and model is strided else torch.contiguous_format
                )
            optimizer.step()
        assert equal(values(plain), [value.contiguous() for value in values(strided)])
    assert not strided.weight.is_contiguous()


@pytest.mark.parametrize("member", ["cser", "cser of blocks", "ef-sgd"])
def test_memory_formats(member: str) -> None:
    run(_channels_last, 2, member)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def _refuses(rank: int, world: int) -> None:
    model = mlp()
    sharded = nn.Linear(3, 2)
    sharded.weight = nn.Parameter(DTensor.from_local(torch.zeros(2, 3), init_device_mesh("cpu", (world,))))
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([nn.Parameter(torch.zeros(3))], {}, TypeError, "torch.nn.Module, got list"),
        (DistributedDataParallel(mlp()), {}, TypeError, r"give its \.module"),
        (mlp().double(), {}, TypeError, "torch.float32, got torch.float64.*autocast"),
        (sharded, {}, TypeError, "that every rank holds whole.*got DTensor"),
        (mlp().bfloat16(), {}, TypeError, "got torch.bfloat16"),
        (model, {"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1"),
        (model, {"lr": math.nan}, ValueError, "lr must be finite"),
        (model, {"lr": "1"}, TypeError, "lr must be a float, got str"),
        (model, {"momentum": -0.1}, ValueError, "momentum"),
        (model, {"weight_decay": torch.tensor(0.1)}, TypeError, "only lr may be a tensor"),
        (model, {"nesterov": 1}, TypeError, "nesterov must be a bool"),
        (model, {"gradient_codec": "int5"}, ValueError, "unknown codec 'int5'"),
        (model, {"gradient_codec": 4}, TypeError, "a codec is a string"),
        (model, {"model_codec": "nothing"}, ValueError, "model_codec cannot be 'nothing'"),
        (model, {"reset_interval": 0}, ValueError, "reset_interval must be at least 1, got 0"),
        (model, {"reset_interval": 1.5}, TypeError, "reset_interval must be an int, got float"),
        (model, {"apply_residual": False}, ValueError, "apply_residual=False is for gradient_codec='nothing'"),
        (model, {"apply_residual": None}, TypeError, "apply_residual must be a bool"),
        (model, {"average_blocks": True, "model_codec": "int4"}, ValueError, "average_blocks=True needs"),
        (model, {"average_blocks": 1}, TypeError, "average_blocks must be a bool"),
        (model, {"seed": 0.5}, TypeError, "seed must be an int"),
        (model, {"params": []}, ValueError, "empty parameter list"),
        (model, {"params": [nn.Parameter(torch.zeros(3))]}, ValueError, "must be the model's"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            CSER(given, **{"lr": 0.1, **options})
        # One rank alone: the others are told.
        if world > 1:
            refusing = rank == world - 1
            with pytest.raises(error if refusing else RuntimeError, match=message):
                CSER(given if refusing else model, **({"lr": 0.1, **options} if refusing else {"lr": 0.1}))
    if world > 1:
        with pytest.raises(RuntimeError, match=r"reset_interval 16.*reset_interval 17"):
            CSER(model, lr=0.1, reset_interval=16 + rank % 2)
        for name, values in {"lr": (0.1, 0.2), "momentum": (0.9, 0.8), "weight_decay": (0.0, 0.1)}.items():
            with pytest.raises(RuntimeError, match=rf"{name} {values[0]}.*{name} {values[1]}"):
                CSER(model, **{"lr": 0.1, name: values[rank % 2]})
        with pytest.raises(RuntimeError, match=r"weight: \(2, 3\).*weight: \(2, 4\)"):
            CSER(nn.Linear(3 + rank % 2, 2), lr=0.1)
    optimizer = CSER(model, lr=0.1, params=[model[0].weight])  # type: ignore[index]
    for group, error, message in (
        ({"params": [nn.Parameter(torch.zeros(3))]}, ValueError, "must be the model's"),
        ({"params": [model[0].weight]}, ValueError, "more than one parameter group"),  # type: ignore[index]
        ({"params": [model[0].bias], "lr": -1}, ValueError, "lr"),  # type: ignore[index]
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        if world > 1:
            alone = rank == world - 1
            with pytest.raises(error if alone else RuntimeError, match=message):
                optimizer.add_param_group(group if alone else {"params": [model[0].bias]})  # type: ignore[index]
            assert len(optimizer.param_groups) == 1
    sparse = nn.Embedding(4, 3, sparse=True)
    optimizer = CSER(sparse, lr=0.1)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"dense.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("world", [1, 2])
def test_mistakes(world: int) -> None:
    run(_refuses, world)


def _outsider(rank: int, world: int) -> None:
    group = dist.new_group([0])
    if rank == 0:
        CSER(mlp(), lr=0.1, process_group=group)
    else:
        with pytest.raises(ValueError, match="rank 1 is not a member"):
            CSER(mlp(), lr=0.1, process_group=group)


def test_a_rank_outside_of_the_group() -> None:
    run(_outsider, 2)


def _copied(rank: int, world: int) -> None:
    optimizer = CSER(mlp(), lr=0.1, **MEMBERS["cser"])
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"])  # from the beginning
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"CSER cannot be copied or pickled.*state_dict\(\)"):
            copied(optimizer)


def test_a_copy_that_would_not_work_is_refused() -> None:
    run(_copied, 1)


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        CSER(mlp(), lr=0.1)


def _dies(rank: int, world: int) -> None:
    model = mlp()
    optimizer = CSER(model, lr=0.1, **MEMBERS["cser"])
    train(optimizer, model, rank, 0, 1)
    if rank == 1:
        raise SystemExit("leaves")
    train(optimizer, model, rank, 1, 2)


def test_a_rank_that_leaves_is_an_error_on_the_others() -> None:
    ended = outcomes(_dies, 2, group_timeout=5)
    assert [type(outcome.error) for outcome in ended] == [RuntimeError, SystemExit]
