"""The 8-bit codes of BlockAdam8bit: what they lose, what they never lose, and that nothing is lost over the steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from optim import block_adam_reference as reference
from smallreduce.optim._block_codes import SIGNED, UNSIGNED, Codes
from smallreduce.optim._block_tiles import Tiling

FORMATS = [SIGNED, UNSIGNED]
REFERENCES = {SIGNED: reference.SIGNED, UNSIGNED: reference.UNSIGNED}
SHAPES = [(70, 50), (32, 32), (64, 96), (5, 3), (1, 33), (300, 1)]


def _values(form: Codes, shape: tuple[int, ...], seed: int = 0, spread: float = 3) -> Tensor:
    """Of magnitudes that differ by powers of ten, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))
    values[torch.rand(shape, generator=generator) < 0.05] = 0
    return values if form is SIGNED else values.abs()


def _tiling(shape: tuple[int, ...]) -> Tiling:
    return Tiling.of(shape if shape[1] > 1 else shape[:1], 32)


def _encode(form: Codes, values: Tensor, step: int = 0, first_row: int = 0) -> tuple[Tensor, Tensor]:
    rows, cols = values.shape
    tiling = _tiling((rows, cols))
    down, across = tiling.grid
    whole = torch.zeros(down * tiling.height, across * tiling.width)
    whole[:rows, :cols] = values
    codes, scales = torch.zeros(rows, cols, dtype=form.dtype), torch.zeros(down, across)
    form.encode(whole, codes, scales, tiling, first_row, step)
    return codes, scales


def _decode(form: Codes, codes: Tensor, scales: Tensor) -> Tensor:
    rows, cols = codes.shape
    return form.decode(codes, scales, _tiling((rows, cols)))[:rows, :cols]


def _least(form: Codes, values: Tensor) -> Tensor:
    """Of the block with the largest elements."""
    return _encode(form, values)[1].max() * 1.25 * 2.0 ** (-15 if form is SIGNED else -31)


def _through(form: Codes, values: Tensor, step: int = 0) -> Tensor:
    return _decode(form, *_encode(form, values, step))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_the_reference(form: Codes, shape: tuple[int, int]) -> None:
    for step, first_row, spread in ((0, 0, 0.1), (1, 32, 3), (12345, 320000, 20)):
        values = _values(form, shape, step, spread)
        codes, scales = _encode(form, values, step, first_row)
        tiling = _tiling(shape)
        sizes = tiling.height, tiling.width
        expected, of_tiles = reference.encoded(values.numpy(), *sizes, REFERENCES[form], step, first_row)
        assert np.array_equal(codes.numpy(), expected)
        assert np.array_equal(scales.numpy(), of_tiles)
        decoded = reference.decoded(expected, of_tiles, *sizes, REFERENCES[form])
        assert np.array_equal(_decode(form, codes, scales).numpy(), decoded)


@pytest.mark.parametrize("form", FORMATS)
def test_every_code_is_a_value_of_its_own(form: Codes) -> None:
    numbers = torch.arange(-form.largest if form is SIGNED else 0, form.largest + 1)
    codes = numbers.to(form.dtype).view(-1, 1)
    values = form.decode(codes, torch.ones(1, 1), Tiling(len(numbers), 1, len(numbers), 1)).view(-1)
    assert values.isfinite().all()
    assert (values.diff() > 0).all()
    positive = values[numbers > 0]
    assert positive[0] == 1.25 * 2.0 ** (-15 if form is SIGNED else -31)
    assert positive[-1] == 2
    assert (positive[1:] / positive[:-1] <= 1.125).all()
    assert values[numbers == 0] == 0


@pytest.mark.parametrize("form", FORMATS)
def test_a_value_becomes_one_of_its_neighbours(form: Codes) -> None:
    values = _values(form, (64, 96))
    least = _least(form, values)
    for step in range(20):
        decoded = _through(form, values, step)
        off = (decoded - values).abs()
        assert (off <= torch.maximum(values.abs() / 8, least)).all()
        assert (off[values.abs() >= least] < values.abs()[values.abs() >= least] / 8).all()
        assert ((decoded == 0) | (decoded.sign() == values.sign())).all()
        assert (decoded[values == 0] == 0).all()


def test_a_second_moment_never_becomes_zero() -> None:
    values = 2.0 ** -torch.arange(32 * 4.0).view(32, 4)  # down to 2**-127, which is denormal
    decoded = _through(UNSIGNED, values)
    assert (decoded > 0).all()
    assert (decoded.min(), decoded.max()) == (1.25 * 2.0**-31, 1)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("exponent", [-126, -100, 0, 100])
def test_what_has_been_rounded_stays_when_the_scale_changes(form: Codes, exponent: int) -> None:
    decoded = _through(form, _values(form, (32, 32), spread=1)) * 2.0**exponent
    assert decoded.isfinite().all()
    for step in range(5):
        assert torch.equal(_through(form, decoded, step), decoded)
    if exponent == 0:
        decoded[3, 4] = 64 * decoded.abs().max()
        can_be_held = decoded.abs() >= _least(form, decoded)
        assert can_be_held.sum() > 800
        assert torch.equal(_through(form, decoded)[can_be_held], decoded[can_be_held])


# Kuipers and Niederreiter, chapter 2, theorem 3.4: of n numbers of a Kronecker sequence whose partial quotients are at
# most K, n times the discrepancy is at most 3 + (1/ln((1 + 5**0.5)/2) + K/ln(K + 1)) * ln n.
PARTIAL_QUOTIENT = {SIGNED: 2, UNSIGNED: 1}


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_lost_is_made_good_over_the_steps(form: Codes) -> None:
    values = _values(form, (64, 64), spread=1)
    values[values.abs() < _least(form, values)] = 0
    n = 2000
    total = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(n):
        total += _through(form, values, step)
    k = PARTIAL_QUOTIENT[form]
    discrepancy = 3 + (1 / math.log((1 + 5**0.5) / 2) + k / math.log(k + 1)) * math.log(n)
    apart = values.double().abs() / 8  # the neighbours, at most
    bound = (discrepancy / n + 3 * 2.0**-20) * apart  # what is compared has 20 bits, and is rounded down in two parts
    assert bound.max() < 0.003 * values.abs().max()
    assert ((total / n - values).abs() <= bound).all()


def _shortest_return(share: float) -> int:
    """The fewest steps after which the dither of an element can be in an interval of length ``share`` again."""
    step = UNSIGNED.dither.step
    return next(n for n in itertools.count(1) if min(n * step % 2**32, -n * step % 2**32) < share * 2**32)


def _longest_wait(share: float) -> int:
    """The most steps before the dither is in it, wherever it begins: as many as leave no gap as long."""
    step, most = UNSIGNED.dither.step, 2
    while True:
        points = sorted(n * step % 2**32 for n in range(most))
        if max(b - a for a, b in itertools.pairwise([*points, points[0] + 2**32])) < share * 2**32:
            return most
        most += max(1, most // 64)


def test_small_changes_add_up() -> None:
    """A second moment whose gradient has grown for good follows it, by a thousandth of the way in each step. Rounded to
    the nearest it would stay where it is: a sixteenth is what it takes.

    It goes from neighbour to neighbour, and from each when the dither is in an interval whose length is the share of
    the way to the next that a step goes. So each element keeps a time table, of which the dither alone is the reason.
    """
    neighbours = [1 + k / 8 for k in range(8)] + [2 + k / 4 for k in range(8)]
    precision = 2.0**-19  # of the dither and of what it is compared with, 20 bits each
    earliest, latest = {1.0: 0}, {1.0: 0}
    before = 0.0
    for value, following in itertools.pairwise([*neighbours, 4.0]):
        share = (4 * 0.001 - value * 0.001) / (following - value)
        earliest[following] = earliest[value] + (_shortest_return(before + precision) if before else 1)
        latest[following] = latest[value] + _longest_wait(share - precision)
        before = share
    moment = torch.ones(32, 32)
    for step in range(latest[4.0]):
        now = _through(UNSIGNED, moment * 0.999 + 4 * 0.001, step)
        for value in now[now != moment].unique().tolist():
            assert earliest[value] <= step + 1
        moment = now
        for value, last in latest.items():
            assert step + 1 < last or (moment >= value).all()
    assert (moment == 4).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_element_of_a_block_that_is_not_finite_is(form: Codes, bad: float) -> None:
    values = _values(form, (64, 64))
    values[40, 3] = bad
    decoded = _through(form, values)
    assert not decoded[32:, :32].isfinite().any()
    assert decoded[:32].isfinite().all()
    assert decoded[:, 32:].isfinite().all()
