"""Stochastic rounding is unbiased, and its random bits depend on each other neither within a step nor between steps.

A fraction f of a step is rounded up where u >= 1 - f, u an odd multiple of 2^-16; for f a multiple of 2^-15 the
probability is exactly f. Each test takes N independent roundings and allows five standard deviations of what it
averages: with new random bits one in two million comparisons would fail by chance; with these fixed seeds all pass or
fail for good.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from formats.reference import FP32, Codec, int_quant, mix64
from kernels.equality import PacketMemory
from kernels.native import CpuKernels, build_layout
from smallreduce import _C

F64 = npt.NDArray[np.float64]
KERNELS = CpuKernels(_C)

GROUP = 32
GROUPS = 1 << 13
SIGMAS = 5


def rounded(codec: Codec, values: npt.NDArray[np.float32], seed: int, step: int) -> npt.NDArray[np.float32]:
    """Encode and decode; shape [GROUPS, GROUP] as `values`."""
    layout = build_layout(_C, [(0, values.size)], codec, FP32)
    packet = PacketMemory(layout.nbytes, 0, 0)
    buffer = values.reshape(-1).view(np.uint32)
    KERNELS.encode(buffer, FP32, layout, codec, packet.bytes, packet.stride, stochastic=True, seed=seed, step=step)
    output = np.zeros_like(buffer)
    KERNELS.decode(packet.bytes, packet.stride, layout, codec, output, FP32)
    return output.view(np.float32).reshape(values.shape)


def constant_input(codec: Codec, value: float) -> npt.NDArray[np.float32]:
    """`value` steps everywhere but for one element in each group, whose magnitude makes the step 1."""
    x = np.full((GROUPS, GROUP), value, np.float32)
    x[:, 0] = codec.levels
    return x


def rounded_up(codec: Codec, fraction: float, seed: int = 7, step: int = 0) -> F64:
    """Whether each of [GROUPS, GROUP - 1] elements went up."""
    return rounded(codec, constant_input(codec, fraction), seed, step)[:, 1:].astype(np.float64)


@pytest.mark.parametrize("fraction", [2**-15, 0.125, 0.5, 0.75, 1 - 2**-15])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("whole", [0, -1])
def test_unbiased(bits: int, fraction: float, whole: int) -> None:
    """A rounding is a Bernoulli variable of variance f(1 - f); the mean of N has the variance f(1 - f)/N."""
    codec = int_quant(bits, group=GROUP)
    up = rounded(codec, constant_input(codec, whole + fraction), 7, bits)[:, 1:] - whole
    assert set(np.unique(up)) <= {0, 1}
    bound = SIGMAS * np.sqrt(fraction * (1 - fraction) / up.size)
    assert abs(up.mean(dtype=np.float64) - fraction) < bound


def test_every_position_of_a_block_is_unbiased() -> None:
    """The two halves of a block take different halves of the same random word."""
    up = rounded_up(int_quant(4, group=GROUP), 0.5)
    bound = SIGMAS * np.sqrt(0.25 / len(up))
    assert (abs(up.mean(axis=0) - 0.5) < bound).all()


def test_the_sum_of_an_arbitrary_input_is_unbiased() -> None:
    """The error of one element has the variance f(1 - f) in steps; that of the sum is the sum of these."""
    codec = int_quant(4, group=GROUP)
    rng = np.random.default_rng(0)
    x = (np.round(rng.uniform(-7, 7, (GROUPS, GROUP)) * 2**15) / 2**15).astype(np.float32)
    x[:, 0] = 7
    fraction = x.astype(np.float64) - np.floor(x)
    error = (rounded(codec, x, 7, 0).astype(np.float64) - x).sum()
    assert abs(error) < SIGMAS * np.sqrt((fraction * (1 - fraction)).sum())


def correlation(a: F64, b: F64) -> tuple[float, float]:
    """The mean product of two series of ±1, and five standard deviations of it if they are independent."""
    return float(np.mean((2 * a - 1) * (2 * b - 1))), SIGMAS / np.sqrt(a.size)


def test_the_halves_of_a_block_are_uncorrelated() -> None:
    up = rounded_up(int_quant(4, group=GROUP), 0.5)
    found, bound = correlation(up[:, :15], up[:, 16:])  # elements 1 … 15 and 17 … 31
    assert abs(found) < bound


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 15])
def test_neighbours_are_uncorrelated(distance: int) -> None:
    up = rounded_up(int_quant(4, group=GROUP), 0.5)
    found, bound = correlation(up[:, distance:], up[:, :-distance])
    assert abs(found) < bound


@pytest.mark.parametrize("distance", [1, 2, 3, 64])
def test_blocks_are_uncorrelated(distance: int) -> None:
    up = rounded_up(int_quant(4, group=GROUP), 0.5)
    found, bound = correlation(up[distance:], up[:-distance])
    assert abs(found) < bound


@pytest.mark.parametrize("first, second", [(0, 1), (1, 2), (0, 2**32), (5, 2**63)])
def test_steps_are_uncorrelated(first: int, second: int) -> None:
    codec = int_quant(4, group=GROUP)
    found, bound = correlation(rounded_up(codec, 0.5, step=first), rounded_up(codec, 0.5, step=second))
    assert abs(found) < bound


def test_seeds_are_uncorrelated() -> None:
    codec = int_quant(4, group=GROUP)
    found, bound = correlation(rounded_up(codec, 0.5, seed=1), rounded_up(codec, 0.5, seed=2))
    assert abs(found) < bound


def test_the_mean_over_fresh_steps_converges() -> None:
    """200 steps leave 1/sqrt(200) of one step's standard deviation; a seed that repeats itself leaves all of it."""
    codec = int_quant(4, group=GROUP)
    steps = 200
    x = constant_input(codec, 0.25)[:512]
    mean = np.mean([rounded(codec, x, mix64(3), step).astype(np.float64) for step in range(steps)], axis=0)[:, 1:]
    variance = 0.25 * 0.75 / steps
    squares = (mean - 0.25) ** 2
    # The fourth moment of a mean of many roundings is 3σ⁴ up to a share of 1/steps: its square has the variance 2σ⁴.
    bound = SIGMAS * np.sqrt(2 / squares.size) * variance
    assert abs(squares.mean() - variance) < bound


def test_a_step_is_replayed_bit_for_bit() -> None:
    codec = int_quant(4, group=GROUP)
    np.testing.assert_array_equal(rounded_up(codec, 0.5, step=9), rounded_up(codec, 0.5, step=9))
