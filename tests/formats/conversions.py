"""Section 4 of ``docs/wire-formats.md``: the floating-point types, as bit patterns and as fp32 values."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

FP32_MAX = np.float32(3.4028234663852886e38)


@dataclass(frozen=True)
class ElementType:
    """A floating-point type of at most 32 bits."""

    name: str
    dtype: type[np.unsignedinteger[Any]]
    mantissa_bits: int
    bias: int
    largest: int  # bits of the largest finite magnitude
    infinity: int  # e4m3 has none: its NaN stands here
    nan: int

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def sign(self) -> int:
        return 1 << (8 * self.nbytes - 1)


FP32 = ElementType("fp32", np.uint32, 23, 127, 0x7F7FFFFF, 0x7F800000, 0x7FC00000)
BF16 = ElementType("bf16", np.uint16, 7, 127, 0x7F7F, 0x7F80, 0x7FC0)
FP16 = ElementType("fp16", np.uint16, 10, 15, 0x7BFF, 0x7C00, 0x7E00)
E4M3 = ElementType("e4m3", np.uint8, 3, 7, 0x7E, 0x7F, 0x7F)
E5M2 = ElementType("e5m2", np.uint8, 2, 15, 0x7B, 0x7C, 0x7E)

BUFFER_TYPES = (FP32, BF16, FP16)  # in the order of the tag's bits 1-2
CAST_TYPES = (FP32, BF16, FP16, E4M3, E5M2)  # in the order of the kinds
VALUE_TYPES = BUFFER_TYPES  # of TopK, in the order of the kinds


def from_float(values: F32, target: ElementType) -> Bits:
    """Round fp32 values to `target`; returns bit patterns of the same shape."""
    assert values.dtype == np.float32
    bits = values.view(np.uint32)
    negative = bits >> 31 == 1
    magnitude_bits = bits & np.uint32(0x7FFFFFFF)
    if target is FP32:
        return np.where(magnitude_bits > FP32.infinity, np.uint32(FP32.nan), bits)
    finite = magnitude_bits < FP32.infinity
    magnitude = np.where(finite, magnitude_bits, np.uint32(0)).view(np.float32).astype(np.float64)
    # Count the magnitude in units of the last place: exact in binary64 but for the rint, which rounds to nearest even.
    # A count that rounds up to the next power of two carries into the exponent field, as it should.
    exponent = np.where(magnitude == 0, 1 - target.bias, np.frexp(magnitude)[1] - 1)
    exponent = np.maximum(exponent, 1 - target.bias)
    count = np.rint(np.ldexp(magnitude, target.mantissa_bits - exponent)).astype(np.int64)
    out = count + ((exponent.astype(np.int64) + target.bias - 1) << target.mantissa_bits)
    out = np.minimum(out, target.largest)
    out = np.where(finite, out, target.infinity)
    out = np.where(negative, out | target.sign, out)
    if target.infinity == target.nan:
        out = np.where(finite, out, target.nan)
    out = np.where(magnitude_bits > FP32.infinity, target.nan, out)
    return out.astype(target.dtype)


def to_float(bits: Bits, source: ElementType) -> F32:
    """Convert bit patterns of `source` to fp32: exact, every NaN becomes ``7FC00000``."""
    assert bits.dtype == source.dtype
    if source is FP32:
        return from_float(bits.view(np.float32), FP32).view(np.float32)
    values: F32 = _value_table(source)[bits]
    return values


@functools.cache
def _value_table(source: ElementType) -> F32:
    patterns = np.arange(2 * source.sign, dtype=np.int64)
    magnitude = patterns & (source.sign - 1)
    field = magnitude >> source.mantissa_bits
    count = magnitude - (np.maximum(field - 1, 0) << source.mantissa_bits)
    value = np.ldexp(count.astype(np.float64), np.maximum(field, 1) - source.bias - source.mantissa_bits)
    value = np.where(magnitude > source.largest, np.nan, value)
    if source.infinity != source.nan:
        value = np.where(magnitude == source.infinity, np.inf, value)
    value = np.where(patterns >= source.sign, -value, value)
    with np.errstate(invalid="ignore", over="ignore"):
        table = value.astype(np.float32)
    return np.where(np.isnan(table), np.uint32(FP32.nan), table.view(np.uint32)).view(np.float32)
