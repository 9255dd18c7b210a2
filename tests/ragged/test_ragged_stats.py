"""What ``stats()`` says was sent is what the process groups were given to send."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import smallreduce as sr
from fsdp.training import Model, loss_of
from ragged.owing import Units, dyadic, shard_units
from ragged.sharding import ragged
from ranks import run
from smallreduce.fsdp import LegStats, Stats

BACKEND = sr.metrics.register_counting_backend()

CASES: list[dict[str, Any]] = [
    {},
    {"gradients": "int4-hadamard", "weights": "int8", "feedback": "full"},
    {"gradients": "sign", "feedback": "int8", "policy": "bf16"},
    {"gradients": ("int8-hadamard", "int4-hadamard"), "weights": "int4", "node_size": 2},
    {"gradients": "topk:0.05", "weights": "bf16", "feedback": "full", "reshard_after_forward": False},
    {"gradients": "int8", "weights": "int8", "feedback": "full", "replicate_gradients": "int4", "mesh": (2, 2)},
    {"weights": "int8", "mesh": (2, 2), "policy": "bf16"},
]

pytestmark = pytest.mark.filterwarnings("ignore::smallreduce.fsdp.ResidualMemory")


def _train(model: nn.Module, rank: int, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def _counted(rank: int, world: int) -> None:
    for case in CASES:
        options = dict(case)
        mesh = options.pop("mesh", None)
        if mesh is not None:
            options["mesh"] = init_device_mesh("cpu", mesh)
        sr.metrics.reset()
        model = ragged(**options)
        state = sr.ragged.state(model)
        made = state.stats()
        assert made.collectives == 0
        assert made.bytes_sent == made.setup_bytes_sent == sr.metrics.bytes_sent() > 0, case
        _train(model, rank, 2)
        with torch.no_grad():
            loss_of(model, rank, 0)
        stats = state.stats()
        assert stats.bytes_sent == sr.metrics.bytes_sent(), case
        assert stats.setup_bytes_sent == made.setup_bytes_sent
        # Loading agrees over the ranks, which counts as well, whichever view of the state it is asked of.
        sr.ragged.state(model).load_state_dict(state.state_dict())
        assert state.stats().bytes_sent == sr.metrics.bytes_sent() > stats.bytes_sent, case
        _check(stats, case, world)


def _check(stats: Stats, case: dict[str, Any], world: int) -> None:
    replicas, shards = case.get("mesh", (1, world))
    assert (stats.world_size, stats.replicas) == (shards, replicas)
    # Three modules in two steps and a pass without gradients. The blocks are gathered again in backward passes.
    again = 0 if "reshard_after_forward" in case else 2
    assert stats.gradients.calls == 2 * 3
    assert stats.weights.calls == 3 * 3 + 2 * again
    assert stats.between_replicas.calls == 2 * 3 * (replicas > 1)
    for leg, name in (
        (stats.weights, "weights"), (stats.gradients, "gradients"), (stats.between_replicas, "replicate_gradients"),
    ):  # fmt: skip
        compressed = case.get(name) is not None
        assert leg.exact_calls == (0 if compressed else leg.calls), (case, name)
        assert (leg.bytes_sent < leg.uncompressed_bytes) == compressed, (case, name)
    assert stats.kept_nbytes == 0
    assert stats.partial_reductions == 0
    numels = [parameter.numel() for parameter in Model().parameters()]
    kept = {None: lambda _: 0, "int8": sr.IntQuant(8).packet_nbytes, "full": lambda numel: 4 * 32 * -(-numel // 32)}
    assert stats.residual_nbytes == sum(map(kept[case.get("feedback")], numels)), case


def test_bytes_are_those_of_the_process_groups() -> None:
    run(_counted, 4, backend=BACKEND, timeout=240)


def _summed(rank: int, world: int) -> None:
    """Modules of several codecs: each as if it were alone, together their sum."""
    shapes: list[list[tuple[int, ...]]] = [[(40, 64)], [(7,), (3, 50, 11)], [(200,)]]
    codecs: list[dict[str, Any]] = [
        {"gradients": "int8"},
        {"gradients": "int4", "weights": "int8", "feedback": "full"},
        {},
    ]
    given = [[dyadic(shape, rank, 0) for shape in each] for each in shapes]
    model = Units(shapes)
    for unit, options in zip(model.units, codecs, strict=True):
        sr.ragged.fully_shard(unit, **options)
    sr.ragged.fully_shard(model)
    model(given).backward()  # type: ignore[arg-type]
    stats = sr.ragged.state(model).stats()
    assert stats.gradients.codec == "None | int8 | int4:rounding=nearest"
    assert stats.weights.codec == "None | int8"
    assert stats.between_replicas.codec is None
    alone = []
    for each, options, x in zip(shapes, codecs, given, strict=True):
        one = Units([each])
        shard_units(one, **options)
        one([x]).backward()  # type: ignore[list-item]
        alone.append(sr.ragged.state(one).stats())
    for name in ("gradients", "weights"):
        leg: LegStats = getattr(stats, name)
        for field in ("calls", "exact_calls", "bytes_sent", "uncompressed_bytes"):
            assert getattr(leg, field) == sum(getattr(getattr(one, name), field) for one in alone), (name, field)
    assert stats.residual_nbytes == alone[1].residual_nbytes > 0
    assert alone[0].gradients.bytes_sent < alone[0].gradients.uncompressed_bytes
    assert "gradients: None | int8 | int4:rounding=nearest, 3 calls (1 exact)" in str(stats)


def test_modules_of_several_codecs_add_up() -> None:
    run(_summed, 2)


def _alone(rank: int, world: int) -> None:
    sr.metrics.reset()
    model = ragged(gradients="int4", weights="int8", feedback="full")
    _train(model, rank, 2)
    state = sr.ragged.state(model)
    state.load_state_dict(state.state_dict())
    stats = state.stats()
    assert stats.collectives == stats.bytes_sent == stats.residual_nbytes == sr.metrics.bytes_sent() == 0
    assert "nothing is compressed" in str(stats)


def test_one_rank_sends_nothing() -> None:
    run(_alone, 1, backend=BACKEND)


def _partial(rank: int, world: int) -> None:
    shapes: list[list[tuple[int, ...]]] = [[(40, 64), (7,)]]
    model = shard_units(Units(shapes), gradients="int4")
    sizes = []
    for step in range(3):
        before = sr.ragged.state(model).stats().gradients.bytes_sent
        model([[dyadic((40, 64), rank, step), None if step == 1 else dyadic((7,), rank, step)]]).backward()
        sizes.append(sr.ragged.state(model).stats().gradients.bytes_sent - before)
    stats = sr.ragged.state(model).stats()
    assert stats.partial_reductions == 1
    assert sizes[0] == sizes[2] > sizes[1] > 0
    assert "1 reductions without the gradients of all trainable parameters" in str(stats)


def test_partial_reductions_are_counted() -> None:
    run(_partial, 2)
