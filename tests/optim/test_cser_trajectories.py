"""CSER and its relatives follow the listings step by step: equality, on inputs on which nothing rounds."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from ddp.training import same_on_all_ranks
from formats import reference as wire
from optim import cser_reference as listing
from optim.cser_training import SIZES, Absolute, beginning, flat, gradient
from ranks import run
from smallreduce.optim import CSER

OPTIONS = {
    "nesterov": listing.Options(lr=0.25, momentum=0.5, nesterov=True, weight_decay=0.0),
    "heavy ball": listing.Options(lr=0.25, momentum=0.5, nesterov=False, weight_decay=0.0),
    "no momentum": listing.Options(lr=0.5, momentum=0.0, nesterov=True, weight_decay=0.0),
    "decay": listing.Options(lr=0.5, momentum=0.5, nesterov=True, weight_decay=0.5),
    "heavy decay": listing.Options(lr=0.5, momentum=0.5, nesterov=False, weight_decay=0.5),
    "decay alone": listing.Options(lr=0.25, momentum=0.0, nesterov=False, weight_decay=0.25),
}


def compressor(spelling: str | None, world: int, bucket: int) -> listing.Compressor:
    """The codec of this spelling in NumPy."""
    if spelling is None or world == 1:  # one rank compresses nothing
        return listing.everything
    if spelling == "nothing":
        return listing.nothing
    codecs = {
        "int4:group=32": wire.int_quant(4, 32),
        "int8:group=32": wire.int_quant(8, 32),
        "int4-hadamard:group=32": wire.int_quant(4, 32, hadamard=True),
        "sign:group=32": wire.sign(32),
        "topk:0.1": wire.topk(Fraction(1, 10)),
        "bf16": wire.cast(wire.BF16, 1024),
    }
    blocks = {
        "random-blocks:0.25": (Fraction(1, 4), None),
        "random-blocks:0.5,block=16": (Fraction(1, 2), 16),
    }
    if spelling in blocks:
        return listing.Blocks(*blocks[spelling], SIZES, bucket)
    # Up to four ranks, sparse packets are gathered.
    return listing.Packets(codecs[spelling], SIZES, world, gathered=codecs[spelling].is_sparse)


def follow(
    rank: int, world: int, optimizer: CSER, model: Absolute, states: Iterator[listing.State], steps: int
) -> None:
    scheme = optimizer._scheme
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(rank, step).backward()
        optimizer.step()
        expected = next(states)
        parameters = list(model.parameters())
        ours = flat(parameters)
        assert np.array_equal(ours, expected.x[rank]), step
        if world > 1 and scheme.keeps_shared:
            shared = [optimizer.state[p]["shared"] for p in parameters]
            assert same_on_all_ranks(shared), step
            if scheme.apply_residual:
                assert expected.e is not None
                # The invariant, by the residual of the listing: exactly the same on all ranks.
                assert np.array_equal(ours - expected.e[rank], flat(shared)), step
                for other in range(world):
                    assert np.array_equal(expected.x[other] - expected.e[other], flat(shared)), step
        if world > 1 and scheme.keeps_residual and step % scheme.interval == 0:
            assert expected.e is not None
            assert np.array_equal(flat([optimizer.state[p]["residual"] for p in parameters]), expected.e[rank]), step
            assert same_on_all_ranks(parameters), step


def _cser(rank: int, world: int, c2: str | None, c1: str | None, interval: int, options: str, steps: int) -> None:
    model, o = Absolute(), OPTIONS[options]
    optimizer = CSER(
        model, **o._asdict(), gradient_codec=c2, model_codec=c1, reset_interval=interval, average_blocks=False
    )
    states = listing.m_cser(beginning(world), gradient, compressor(c2, world, 0), compressor(c1, world, 1), interval, o)
    follow(rank, world, optimizer, model, states, steps)
    if world > 1 and c2 is not None:
        norm = optimizer.stats().residual_norm
        assert norm is not None and norm > 0
        assert not same_on_all_ranks(list(model.parameters()))


@pytest.mark.parametrize(
    "c2, c1",
    [
        ("topk:0.1", "topk:0.1"),
        ("topk:0.1", "int8:group=32"),
        ("int4:group=32", "sign:group=32"),
        ("int4-hadamard:group=32", "int4-hadamard:group=32"),
        ("random-blocks:0.25", "random-blocks:0.5,block=16"),
        ("random-blocks:0.5,block=16", "int8:group=32"),
        ("sign:group=32", None),
    ],
)
def test_cser(c2: str, c1: str | None) -> None:
    run(_cser, 4, c2, c1, 3, "nesterov", 5)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "nesterov"])
def test_cser_under_other_options(options: str) -> None:
    run(_cser, 4, "topk:0.1", "random-blocks:0.25", 2, options, 3)


@pytest.mark.parametrize("world", [1, 2])
def test_cser_on_other_numbers_of_ranks(world: int) -> None:
    run(_cser, world, "topk:0.1", "int8:group=32", 2, "nesterov", 5)


def _exact(rank: int, world: int, options: str) -> None:
    """Nothing compressed: torch's SGD on averaged gradients."""
    model, other, o = Absolute(), Absolute(), OPTIONS[options]
    optimizer = CSER(model, **o._asdict(), gradient_codec=None, model_codec=None)
    sgd = torch.optim.SGD(other.parameters(), **{**o._asdict(), "nesterov": o.nesterov and o.momentum > 0})
    for step in range(1, 4):
        optimizer.zero_grad()
        model(rank, step).backward()
        optimizer.step()
        everyones = [gradient(i, step, flat(list(other.parameters()))) for i in range(world)]
        mean = torch.from_numpy(np.mean(everyones, axis=0)).float()
        for p, g in zip(other.parameters(), mean.split(SIZES), strict=True):
            p.grad = g.view(p.shape)
        sgd.step()
        assert np.array_equal(flat(list(model.parameters())), flat(list(other.parameters()))), step
    assert optimizer.stats().resets == 0


@pytest.mark.parametrize("options", OPTIONS)
def test_without_compression_it_is_sgd_on_averaged_gradients(options: str) -> None:
    run(_exact, 4, options)


def _csea(rank: int, world: int, codec: str, options: str) -> None:
    model, o = Absolute(), OPTIONS[options]
    optimizer = CSER.csea(model, codec=codec, **o._asdict(), average_blocks=False)
    compress = compressor(codec, world, 1)
    follow(
        rank, world, optimizer, model, listing.m_cser(beginning(world), gradient, listing.nothing, compress, 1, o), 4
    )


@pytest.mark.parametrize("codec", ["topk:0.1", "int4:group=32", "random-blocks:0.25"])
def test_csea(codec: str) -> None:
    run(_csea, 4, codec, "nesterov")


def _partial_local_sgd(rank: int, world: int, codec: str | None, options: str) -> None:
    model, o = Absolute(), OPTIONS[options]
    optimizer = CSER.partial_local_sgd(model, codec=codec, reset_interval=3, **o._asdict(), average_blocks=False)
    compress = compressor(codec, world, 1)
    follow(
        rank, world, optimizer, model, listing.m_cser(beginning(world), gradient, listing.nothing, compress, 3, o), 7
    )


@pytest.mark.parametrize("codec", ["topk:0.1", "sign:group=32", "random-blocks:0.5,block=16", None])
def test_partial_local_sgd(codec: str | None) -> None:
    run(_partial_local_sgd, 4, codec, "nesterov")


def _ef_sgd(rank: int, world: int, codec: str, options: str, steps: int) -> None:
    model, o = Absolute(), OPTIONS[options]
    optimizer = CSER.ef_sgd(model, codec=codec, **o._asdict())
    states = listing.ef_sgd(beginning(world), gradient, compressor(codec, world, 0), o)
    follow(rank, world, optimizer, model, states, steps)


@pytest.mark.parametrize("codec", ["topk:0.1", "int4:group=32", "sign:group=32", "random-blocks:0.25"])
def test_ef_sgd(codec: str) -> None:
    run(_ef_sgd, 4, codec, "nesterov", 5)


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "nesterov"])
def test_ef_sgd_under_other_options(options: str) -> None:
    run(_ef_sgd, 4, "topk:0.1", options, 3)


def _qsparse_local_sgd(rank: int, world: int, codec: str, options: str, steps: int) -> None:
    model, o = Absolute(), OPTIONS[options]
    optimizer = CSER.qsparse_local_sgd(model, codec=codec, reset_interval=2, **o._asdict())
    states = listing.qsparse_local_sgd(beginning(world), gradient, compressor(codec, world, 1), 2, o)
    follow(rank, world, optimizer, model, states, steps)


@pytest.mark.parametrize("codec", ["topk:0.1", "int4:group=32", "sign:group=32", "random-blocks:0.25"])
def test_qsparse_local_sgd(codec: str) -> None:
    run(_qsparse_local_sgd, 4, codec, "nesterov", 5)


@pytest.mark.parametrize("options", ["heavy ball", "decay"])
def test_qsparse_local_sgd_under_other_options(options: str) -> None:
    run(_qsparse_local_sgd, 4, "topk:0.1", options, 3)


def _in_place(rank: int, world: int, c2: str, c1: str, interval: int) -> None:
    model, o = Absolute(), OPTIONS["nesterov"]
    optimizer = CSER(model, **o._asdict(), gradient_codec=c2, model_codec=c1, reset_interval=interval)
    assert optimizer._scheme.average_blocks
    first, second = (compressor(codec, world, 0) for codec in (c2, c1))
    assert isinstance(second, listing.Blocks)
    follow(
        rank, world, optimizer, model,
        listing.implementation_2(
            beginning(world), gradient, first if isinstance(first, listing.Blocks) else None, second, interval, o
        ),
        5,
    )  # fmt: skip
    # No memory but the momentum.
    assert {name for held in optimizer.state.values() for name in held} == {"momentum_buffer"}


@pytest.mark.parametrize(
    "c2, c1, interval",
    [
        ("random-blocks:0.25", "random-blocks:0.5,block=16", 3),
        ("random-blocks:0.5,block=16", "random-blocks:0.25", 2),
        ("nothing", "random-blocks:0.25", 2),
        ("nothing", "random-blocks:0.5,block=16", 1),
    ],
)
def test_blocks_averaged_in_place(c2: str, c1: str, interval: int) -> None:
    run(_in_place, 4, c2, c1, interval)


def _is_a_reset_in_every_step(rank: int, world: int, c2: str, c1: str, interval: int) -> None:
    """What relates implementation II to the listing: C2 sends nothing, and every step resets, by blocks of its own."""
    model, o = Absolute(), OPTIONS["nesterov"]
    optimizer = CSER(model, **o._asdict(), gradient_codec=c2, model_codec=c1, reset_interval=interval)
    usual, at_reset = compressor(c2, world, 0), compressor(c1, world, 0)

    def by_turns(v: listing.F64, step: int) -> tuple[listing.F64, listing.F64]:
        return (at_reset if step % interval == 0 else usual)(v, step)

    states = listing.m_cser(beginning(world), gradient, listing.nothing, by_turns, 1, o)
    follow(rank, world, optimizer, model, states, 6)


def test_blocks_averaged_in_place_are_a_reset_in_every_step() -> None:
    run(_is_a_reset_in_every_step, 4, "random-blocks:0.25", "random-blocks:0.5,block=16", 3)
    run(_is_a_reset_in_every_step, 4, "nothing", "random-blocks:0.25", 2)
