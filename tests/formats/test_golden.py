"""The reference gives the pinned packets, and the pinned packets give the pinned values."""

from __future__ import annotations

import numpy as np
import pytest

from formats import reference
from formats.golden import GOLDEN, INTO_INT4, Golden
from formats.reference import FP32

EACH = pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)


@EACH
def test_encoding_gives_the_pinned_packet(golden: Golden) -> None:
    buffer = reference.from_float(np.array(golden.values, np.float32), golden.element)
    packets = reference.cut(golden.table, golden.codec.group)
    data, _ = reference.encode(
        buffer,
        packets,
        golden.codec,
        golden.element,
        stochastic=golden.stochastic,
        seed=golden.seed,
        step=golden.step,
    )
    assert [each.hex() for each in data] == [golden.bytes.hex()]


@EACH
def test_decoding_gives_the_pinned_values(golden: Golden) -> None:
    packets = reference.cut(golden.table, golden.codec.group)
    output = np.zeros(len(golden.values), golden.element.dtype)
    reference.decode([golden.bytes], packets, golden.codec, golden.element, output)
    expected = reference.from_float(np.array(golden.decoded, np.float32), golden.element)
    np.testing.assert_array_equal(output, expected)


def test_a_sum_in_another_format_gives_the_pinned_packet() -> None:
    (read,), (written,) = (reference.cut([(0, 9)], codec.group) for codec in (INTO_INT4.read, INTO_INT4.written))
    data, _ = reference.reduce_encode(
        [INTO_INT4.packet] * 2, 0.5, read, INTO_INT4.read, FP32, into=(written, INTO_INT4.written)
    )
    assert data.hex() == INTO_INT4.sum.hex()


def test_mix64() -> None:
    """The finaliser of splitmix64: its published first outputs from the state 1234567."""
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + k * gamma) % 2**64 for k in (1, 2, 3)]
    assert [reference.mix64(z) for z in states] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_random_bits_are_pinned() -> None:
    bits = reference.random_bits(seed=0, step=0, origin=np.array([0, 2**28], np.int64))
    assert bits.shape == (2, 32)
    # mix64(0) = 0, so the key is 0; 16 · 2^28 is 0 on u32.
    np.testing.assert_array_equal(bits[0], bits[1])
    assert bits[0, 0] == 0 and bits[0, 16] == 0
