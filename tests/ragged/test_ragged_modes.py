"""The ways in which FSDP2 can be used: a ragged model does there what a stock one does."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import smallreduce as sr
from fsdp.training import Given, Model, loss_of, sharded
from ragged.sharding import full, full_gradients, full_parameters, ragged
from ragged.test_ragged_exact import SGD, same, train
from ranks import outcomes, run
from smallreduce.ragged._unit import unit_of


def _replicas(rank: int, world: int, policy: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    stock, ours = sharded(policy=policy, mesh=mesh), ragged(policy=policy, mesh=mesh, granularity="rows")
    models: list[Any] = [ours, stock]
    optimizers = [torch.optim.SGD(model.parameters(), **SGD) for model in models]
    for step in range(10):
        for model in models:
            model.set_requires_all_reduce(False)
            loss_of(model, rank, 100 + step).backward()
            model.set_requires_all_reduce(True)
            loss_of(model, rank, 200 + step).backward()
        assert same(full_gradients(ours), full_gradients(stock)), step
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found = [train(m, o, rank, step, step % 2 == 1) for m, o in zip(models, optimizers, strict=True)]
        assert same(*found), step
        assert same(full_parameters(ours), full_parameters(stock)), step


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16-reduce"])
def test_replicas(policy: str) -> None:
    run(_replicas, 4, policy, timeout=120, keep=False)  # DTensor remembers groups that are gone


def _meta(rank: int, world: int) -> None:
    expected = ragged(granularity="rows")
    values = full_parameters(expected)
    with torch.device("meta"):
        model = Model()
    for block in model.blocks:
        sr.ragged.fully_shard(block, granularity="rows")
    sr.ragged.fully_shard(model, granularity="rows")
    before = list(model.parameters())
    assert all(parameter.is_meta for parameter in before)
    with pytest.raises(RuntimeError, match=r"meta device: call module.to_empty"):
        loss_of(model, rank, 0)
    model.to_empty(device="cpu")
    # An optimizer made before has the parameters still.
    assert all(new is old for new, old in zip(model.parameters(), before, strict=True))
    for name, parameter in model.named_parameters():
        mine = sr.ragged.RaggedTensor.distribute(values[name], parameter.placement, parameter.group)
        with torch.no_grad():
            parameter.copy_(mine)
    losses = [loss_of(each, rank, 0) for each in (model, expected)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert same(full_gradients(model), full_gradients(expected))


@pytest.mark.parametrize("world", [1, 3])
def test_meta_device(world: int) -> None:
    run(_meta, world)


def _initialises(rank: int, world: int) -> None:
    """After ``to_empty`` torch's own initialisation draws what it would on one process."""

    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Embedding(10, 8, padding_idx=4), nn.Conv1d(3, 5, 2))

    def initialise(model: nn.Sequential) -> None:
        torch.manual_seed(3)
        for layer in model:
            layer.reset_parameters()  # type: ignore[operator]
        nn.init.xavier_uniform_(model[0].weight)
        nn.init.normal_(model[3].weight, std=0.02)
        nn.init.trunc_normal_(model[0].bias, std=0.02, a=-0.03, b=0.03)  # most are drawn more than once, or
        nn.init.trunc_normal_(model[1].weight, a=2.0, b=2.5)  # few of the normal distribution are in the interval

    with torch.device("meta"):
        model = make()
    sr.ragged.fully_shard(model, granularity="rows")
    model.to_empty(device="cpu")
    initialise(model)
    expected = make()
    initialise(expected)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(full(found), wanted), name


@pytest.mark.parametrize("world", [1, 3])
def test_initialisation_after_the_meta_device(world: int) -> None:
    run(_initialises, world)


def _compiled(rank: int, world: int, of_blocks: bool) -> None:
    """Graphs are those of aot_eager, which runs the operators as they are, so that the bits are the same."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, expected = ragged(granularity="rows"), ragged(granularity="rows")
    compiled: Any = model
    if of_blocks:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="aot_eager")
    optimizers = [torch.optim.SGD(each.parameters(), **SGD) for each in (model, expected)]
    for step in range(3):
        losses = [loss_of(each, rank, step) for each in (compiled, expected)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        assert same(full_gradients(model), full_gradients(expected))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    # What is gathered stays out of the graphs, and is freed after them.
    assert not any(bucket.is_unsharded for bucket in unit_of(model).buckets)


@pytest.mark.parametrize("of_blocks", [False, True], ids=["whole", "blocks"])
def test_compiled_modules(of_blocks: bool) -> None:
    run(_compiled, 2, of_blocks, timeout=120)


def _norm(rank: int, world: int) -> None:
    model = ragged(granularity="rows")
    loss_of(model, rank, 0).backward()
    gradients = [g for g in full_gradients(model).values() if g is not None]
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    numel = sum(g.numel() for g in gradients)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    # A sum of n squares in whatever order, each and the root rounded: (n + 3) u at most, half of it in the root.
    assert abs(float(total) - exact) <= (numel + 3) * 2.0**-24 * exact
    everyones = [torch.empty_like(total) for _ in range(world)]
    dist.all_gather(everyones, total)
    assert all(torch.equal(total, other) for other in everyones)
    factor = torch.clamp(0.05 / (total + 1e-6), max=1.0)
    assert factor < 1
    clipped = [g for g in full_gradients(model).values() if g is not None]
    assert all(torch.equal(c, g * factor) for c, g in zip(clipped, gradients, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_clipping(world: int) -> None:
    run(_norm, world)


def _unused(rank: int, world: int) -> None:
    model = sr.ragged.fully_shard(Given([(5, 3), (4,), (7, 2)]), granularity="rows")
    # Only rank 0 uses the second.
    given = [torch.ones(5, 3), torch.ones(4) if rank == 0 else None, torch.ones(7, 2)]
    model.set_reduce_scatter_unused_params(True)
    model(given).backward()
    found = list(full_gradients(model).values())
    assert torch.equal(found[0], torch.ones(5, 3))  # type: ignore[arg-type]
    assert torch.equal(found[1], torch.full((4,), 1 / world))  # type: ignore[arg-type]
    model.zero_grad()
    model.set_reduce_scatter_unused_params(False)
    model([torch.ones(5, 3), None, None]).backward()
    assert [p.grad is not None for p in model.parameters()] == [True, False, False]


def _sums(rank: int, world: int) -> None:
    """torch's own reduce-scatter, on numbers whose sums are exact in whatever order."""
    shapes = [(5, 3), (4,), (7, 2), (1, 9)]
    everyones = [
        [torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(r)).float() for shape in shapes]
        for r in range(world)
    ]
    model = sr.ragged.fully_shard(Given(shapes), granularity="rows")
    for _ in range(2):
        model.zero_grad()
        model(everyones[rank]).backward()
        for found, given in zip(full_gradients(model).values(), zip(*everyones, strict=True), strict=True):
            assert found is not None
            assert torch.equal(found, sum(given) / world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gradients_are_means(world: int) -> None:
    run(_sums, world)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_unused_parameters(world: int) -> None:
    run(_unused, world)


def _converts(rank: int, world: int, change: str) -> None:
    """While modules have what was gathered, and with gradients that have not been reduced."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = copy.deepcopy(plain)
    sr.ragged.fully_shard(model[0])
    sr.ragged.fully_shard(model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    values = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}

    def assign() -> None:
        state = model.state_dict()
        model.load_state_dict({name: one.clone() for name, one in state.items()}, assign=True)

    if change == "forward":
        model(x)
        model.double()
        plain.double()
        x = x.double()
    elif change == "unshard":
        for module in (model[0], model):
            module.unshard()
        model.double()
        plain.double()
        x = x.double()
    elif change == "between":
        loss = model(x).square().sum()
        assign()
        loss.backward()
        plain(x).square().sum().backward()
    else:  # gradients of a pass that was not reduced
        model.set_requires_gradient_sync(False)
        model(x).square().sum().backward()
        model.set_requires_gradient_sync(True)
        plain(x).square().sum().backward()
        if change == "accumulate, assign":
            assign()
        else:
            model.double()
            plain.double()
            x = x.double()
    assert all(torch.equal(full(p).float(), values[name]) for name, p in model.named_parameters())
    if change != "between":
        model(x).square().sum().backward()
        plain(x).square().sum().backward()
    assert all(isinstance(p, sr.ragged.RaggedTensor) and p.dtype == x.dtype for p in model.parameters())
    for found, expected in zip(full_gradients(model).values(), plain.parameters(), strict=True):
        assert torch.equal(found, expected.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["forward", "unshard", "between", "accumulate, assign", "accumulate, double"])
def test_conversions_at_any_time(change: str) -> None:
    run(_converts, 2, change)


def _subsets(rank: int, world: int) -> None:
    """Of many subsets that have gradients the last are remembered."""
    model = sr.ragged.fully_shard(Given([(4,)] * 5), gradients="int8", feedback="full", granularity=4)
    for subset in range(1, 32):
        model([torch.ones(4) if subset >> index & 1 else None for index in range(5)]).backward()
    unit = unit_of(model)
    assert unit is not None
    (bucket,) = unit.buckets
    memory = bucket.residuals.memory()
    assert memory is not None
    assert bucket._packing.cache_info().currsize == memory._some.cache_info().currsize == 16


def test_what_is_remembered_of_subsets_is_bounded() -> None:
    run(_subsets, 2)


def _adopts(rank: int, world: int, change: str) -> None:
    model, other = (ragged(seed, granularity="rows") for seed in (0, 1))
    loss_of(model, rank, 0).backward()
    if change in ("assign", "copy"):
        model.load_state_dict(other.state_dict(), assign=change == "assign")
    else:
        model.double()
        other.double()
    model.zero_grad()
    # Made after, since assign=True puts other parameters in the places of those that an optimizer has.
    optimizers = [torch.optim.SGD(each.parameters(), **SGD) for each in (model, other)]
    if change == "double":
        torch.manual_seed(0)
        other.load_state_dict(model.state_dict())
    for step in range(3):
        found = [train(m, o, rank, step, False) for m, o in zip((model, other), optimizers, strict=True)]
        assert same(*found)
        assert same(full_parameters(model), full_parameters(other))
    dtype = torch.float64 if change == "double" else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("change", ["assign", "copy", "double"])
def test_parameters_that_were_replaced(change: str) -> None:
    run(_adopts, 2, change)


def _refuses(rank: int, world: int, what: str) -> None:
    model = nn.Linear(8, 8)
    bad: dict[str, dict[str, Any]] = {
        "granularity": {"granularity": "columns"},
        "rows": {"granularity": 0},
        "codec": {"gradients": "topk:0.1"},
        "feedback": {"gradients": None, "feedback": "full"},
        "reshard": {"reshard_after_forward": 2},
        "seeds": {"seed": 1},
        "reshards": {"reshard_after_forward": True},
        "frozen": {},
    }
    options = bad[what] if rank == 1 else {}
    model.weight.requires_grad_(what != "frozen" or rank == 0)
    sr.ragged.fully_shard(model, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("granularity", "a number of rows"),
        ("rows", "a number of rows"),
        ("codec", "biased"),
        ("feedback", "needs a codec"),
        ("reshard", "True, False or None"),
        ("seeds", "do not agree"),
        ("reshards", "do not agree"),
        ("frozen", "do not agree"),
    ],
)
def test_bad_input_on_one_rank_is_an_error_on_all(what: str, message: str) -> None:
    for outcome in outcomes(_refuses, 2, what):
        assert outcome.error is not None
        assert message in str(outcome.error)


def _cannot(rank: int, world: int) -> None:
    shard = sr.ragged.fully_shard
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="is a scalar"):
        shard(module)
    module.scale = nn.Parameter(torch.ones(3, 2).t())
    with pytest.raises(ValueError, match="must be contiguous"):
        shard(module)
    with pytest.raises(ValueError, match="is never called"):
        shard(nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        shard([nn.Linear(2, 2)])  # type: ignore[type-var]
    with pytest.raises(ValueError, match="needs a mesh of two dimensions"):
        shard(nn.Linear(2, 2), replicate_gradients="int8")
    linear = shard(nn.Linear(2, 2))
    planned: Any = nn.Linear(4, 4)
    planned.plans = [1, 2]
    with pytest.raises(ValueError, match="Linear has something of its own called 'plans'"):
        sr.ragged.fully_shard(planned)
    with pytest.raises(ValueError, match="fully sharded already"):
        shard(linear)
    with pytest.raises(TypeError, match="cannot be copied"):
        __import__("copy").deepcopy(linear)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    shard(tied[0])
    with pytest.raises(ValueError, match="is also a parameter of a module"):
        shard(tied)
    with pytest.raises(ValueError, match="granularity must be"):
        shard(nn.Linear(2, 2), granularity=lambda name, parameter: "all")
    with pytest.raises(TypeError, match="mp_policy must be"):
        shard(nn.Linear(2, 2), mp_policy=torch.bfloat16)  # type: ignore[arg-type]


def test_what_cannot_be_sharded() -> None:
    run(_cannot, 2)


def _regularises(rank: int, world: int) -> None:
    """A loss may have the sharded parameters themselves in it."""

    def penalty(kind: str, weight: torch.Tensor) -> torch.Tensor:
        whole = weight.full_tensor() if kind == "full" else weight  # type: ignore[attr-defined]
        return {"norm": whole.norm, "sum": whole.sum}.get(kind, whole.square().sum)()

    for kind in ("full", "square", "sum", "norm"):
        for first in (False, True):  # it is evaluated, and its gradient taken, before the model's or after
            torch.manual_seed(0)
            model: Any = nn.Linear(6, 5, bias=False)
            expected = model.weight.detach().clone().requires_grad_()
            x = torch.ones(2, 6)
            (
                nn.functional.linear(x, expected).sum()
                + (penalty(kind, expected) if kind != "full" else expected.square().sum())
            ).backward()
            sr.ragged.fully_shard(model, granularity="rows", reshard_after_forward=True)
            if first:
                penalty(kind, model.weight).backward()
                model(x).sum().backward()
            else:
                (model(x).sum() + penalty(kind, model.weight)).backward()
            found = full(model.weight.grad)
            assert expected.grad is not None
            if kind != "norm":
                assert torch.equal(found, expected.grad), (kind, first)
                continue
            # w / |w|, below 1, where |w| is the root of 30 squares, added up in another order: 32 units of rounding for
            # the sum, half of them for the root, 3 for the roots and the quotient; and the sum with 2, below 4, is
            # rounded in both: 4 units each.
            apart = (found - expected.grad).abs().max()
            assert apart <= (2 * (16 + 3) + 2 * 4) * 2.0**-24, first


@pytest.mark.parametrize("world", [1, 2, 3])
def test_losses_of_sharded_parameters(world: int) -> None:
    run(_regularises, world)


def _planned(rank: int, world: int) -> None:
    """Every parameter is where the plan has it, in one flat shard, and nothing else is kept."""
    model: Any = sr.ragged.fully_shard(nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 3)), granularity=3)
    (plan,) = model.plans
    assert plan.tensors == ((960, 72), (40, 3), (120, 120), (3, 3))
    storages = set()
    for index, parameter in enumerate(model.parameters()):
        lengths = [end - begin for begin, end in parameter.placement.ranges(parameter.shape)]
        assert tuple(lengths) == plan.lengths(index)
        storages.add(parameter.to_local().untyped_storage().data_ptr())
    assert len(storages) == 1
    model.unshard()
    gathered = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    offsets = [parameter.storage_offset() for parameter in model.parameters()]
    assert len(gathered) == 1
    assert tuple(offsets) == plan.offsets
    model.reshard()


@pytest.mark.parametrize("world", [1, 3])
def test_parameters_are_views_of_two_buffers(world: int) -> None:
    run(_planned, world)


def _casts(rank: int, world: int) -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float64)
    model = sr.ragged.fully_shard(nn.Linear(4, 4), mp_policy=policy)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, module.weight.dtype)))
    out = model(torch.randn(2, 4))
    assert out.dtype == torch.float64
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    out.sum().backward()
    assert model.weight.grad.dtype == model.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_mixed_precision_casts() -> None:
    run(_casts, 2)


def _dtypes(rank: int, world: int) -> None:
    """Parameters of several dtypes, and some that are ignored or frozen."""
    torch.manual_seed(0)
    module = nn.Module()
    module.a = nn.Parameter(torch.randn(5, 3))
    module.b = nn.Parameter(torch.randn(4).double())
    module.codes = nn.Parameter(torch.arange(7), requires_grad=False)
    module.left = nn.Parameter(torch.randn(3))
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.forward = lambda: (module.a.sum() + module.b.sum() + module.left.sum(), module.codes.sum())
    sr.ragged.fully_shard(module, ignored_params={module.left})
    assert type(module.left) is nn.Parameter
    total, codes = module()
    assert int(codes) == 21
    total.backward()
    assert torch.equal(full(module.a.grad), torch.ones(5, 3))
    assert torch.equal(full(module.b.grad), torch.ones(4).double())
    assert all(torch.equal(full(p), values[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_dtypes(world: int) -> None:
    run(_dtypes, world)
