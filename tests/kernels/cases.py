"""Inputs of the kernel tests, each a pure function of (seed, size): codecs, contents, sizes and segment tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from formats import reference
from formats.reference import BF16, CAST_TYPES, F32, FP16, FP32, Bits, Codec, ElementType

U8 = npt.NDArray[np.uint8]

ELEMENTS = {element.name: element for element in (FP32, BF16, FP16)}

CODECS: dict[str, Codec] = {
    "int8": reference.int_quant(8),
    "int4": reference.int_quant(4),
    "int2": reference.int_quant(2),
    "int4-group32": reference.int_quant(4, group=32),
    "int8-group2048": reference.int_quant(8, group=2048),
    "int8-hadamard": reference.int_quant(8, hadamard=True),
    "int4-hadamard": reference.int_quant(4, hadamard=True),
    "int2-hadamard": reference.int_quant(2, group=96, hadamard=True),
    "sign": reference.sign(),
    "sign-group96": reference.sign(group=96),
    **{f"cast-{target.name}": reference.cast(target, group=128) for target in CAST_TYPES},
}
INT_CODECS = [name for name in CODECS if name.startswith("int")]

# TopK in every combination of its parameters; one value of all elements, a third, and all of them among the ratios.
RATIOS = [Fraction(1, 10**9), *map(Fraction, ("0.001", "0.01", "0.07", "0.25")), Fraction(1, 3), Fraction(1)]
SPARSE_CODECS: dict[str, Codec] = {
    f"topk-{ratio}-{values}": reference.topk(ratio, ELEMENTS[values]) for ratio in RATIOS for values in ELEMENTS
}


def sizes(codec: Codec) -> list[int]:
    return sorted({0, 1, 31, 32, 33, codec.group - 1, codec.group, codec.group + 1})


LARGE_SIZE = 1_000_003

# Around the elements that a word of a TopK packet can skip, once and twice.
SPARSE_SIZES = [0, 1, 31, 32, 33, 1000, 65534, 65535, 65536, 65537, 131073, 300_001]

# Contents.


def _normal(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    return _rounded(rng.standard_normal(size), element)


def _outliers(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    return _rounded(rng.standard_normal(size) * np.where(rng.random(size) < 0.01, 100, 1), element)


def _dyadic(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """Multiples of 1/16 up to 7: with these every sum is exact, and many lie midway between two codes of int4."""
    return _rounded(rng.integers(-112, 113, size) / 16, element)


def _denormals(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    largest = (1 << element.mantissa_bits) - 1
    return _signed(rng, rng.integers(0, largest + 1, size), element)


def _tiny(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """Around the smallest normal magnitude, where scales meet their lower limit; groups differ in magnitude."""
    exponent = rng.integers(-3, 7, -(-size // 128)).repeat(128)[:size] + 1 - element.bias
    return _rounded(np.ldexp(rng.uniform(-1, 1, size), exponent), element)


def _largest(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """The type's largest magnitude and its neighbours, most of them positive, so that sums overflow."""
    magnitude = element.largest - rng.integers(0, 3, size) * rng.integers(0, 2 << element.mantissa_bits, size) // 2
    return np.where(rng.random(size) < 0.2, magnitude | element.sign, magnitude).astype(element.dtype)


def _zeros(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    return _signed(rng, np.zeros(size, np.int64), element)


def _equal(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    return _rounded(np.full(size, rng.standard_normal()), element)


def _sparse_zeros(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """Whole groups of zeros between others."""
    group_is_zero = (rng.random(-(-size // 128)) < 0.5).repeat(128)[:size]
    return np.where(group_is_zero, _zeros(rng, size, element), _normal(rng, size, element))


def _nan(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """A few NaNs, of either sign and any payload, among normal values."""
    payload = rng.integers(1, 1 << element.mantissa_bits, size)
    nan = _signed(rng, element.infinity + payload, element)
    return np.where(_seldom(rng, size), nan, _normal(rng, size, element))


def _infinite(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    infinite = _signed(rng, np.full(size, element.infinity), element)
    return np.where(_seldom(rng, size), infinite, _normal(rng, size, element))


def _any_bits(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    return rng.integers(0, 2 * element.sign, size).astype(element.dtype)


def _wide(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """Any finite bit pattern."""
    return _signed(rng, rng.integers(0, element.largest + 1, size), element)


def _few(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """Hardly anything but zeros, of either sign."""
    return np.where(rng.random(size) < 0.0005, _normal(rng, size, element), _zeros(rng, size, element))


def _ascending(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    return _rounded(np.sort(np.abs(rng.standard_normal(size))) * rng.choice((-1, 1), size), element)


def _descending(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    descending: Bits = _ascending(rng, size, element)[::-1].copy()
    return descending


def _levels(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """Three magnitudes only, so that whatever the ratio, many are equal to the last one selected."""
    return _rounded(rng.choice((0.5, 1, 2), size, p=(0.9, 0.07, 0.03)) * rng.choice((-1, 1), size), element)


def _concentrated(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """All that is large stands in one place."""
    length = size // 60 + 1
    begin = rng.integers(0, size - length + 1) if size else 0
    large = (np.arange(size) >= begin) & (np.arange(size) < begin + length)
    return _rounded(rng.standard_normal(size) * np.where(large, 100, 0.01), element)


def _clumps(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """The large elements stand together in clumps, of any number and length: a sample is often wrong about them."""
    length = int(rng.choice((16, 40, 100, 200)))
    count = max(int(size * 2.0 ** rng.uniform(-8, -3)) // length, 1)
    large = np.zeros(size + length, np.bool_)
    for begin in rng.integers(0, size + 1, count):
        large[begin : begin + length] = True
    return _rounded(rng.standard_normal(size) * np.where(large[:size], 100, 0.01), element)


def _far_apart(rng: np.random.Generator, size: int, element: ElementType) -> Bits:
    """Large elements after gaps of just less, as many and just more than one, two and three words FFFF stand for."""
    values = rng.standard_normal(size) * 0.001
    gaps = [65535 * skips + more for skips in (1, 2, 3) for more in (-1, 0, 1)]
    places = np.cumsum([gap + 1 for gap in rng.permutation(gaps)]) + rng.integers(0, 3)
    places = places[places < size]
    values[places] = rng.choice((-1, 1), len(places)) * (1 + rng.random(len(places)))
    return _rounded(values, element)


def _seldom(rng: np.random.Generator, size: int) -> npt.NDArray[np.bool_]:
    """About 3 of 1000, and one in the middle."""
    chosen = rng.random(size) < 0.003
    chosen[size // 2 : size // 2 + 1] = True
    return chosen


def _rounded(values: npt.NDArray[np.float64], element: ElementType) -> Bits:
    return reference.from_float(values.astype(np.float32), element)


def _signed(rng: np.random.Generator, magnitude: npt.NDArray[np.int64], element: ElementType) -> Bits:
    return np.where(rng.random(len(magnitude)) < 0.5, magnitude, magnitude | element.sign).astype(element.dtype)


CONTENTS: dict[str, Callable[[np.random.Generator, int, ElementType], Bits]] = {
    "normal": _normal,
    "outliers": _outliers,
    "dyadic": _dyadic,
    "denormals": _denormals,
    "tiny": _tiny,
    "largest": _largest,
    "zeros": _zeros,
    "equal": _equal,
    "sparse-zeros": _sparse_zeros,
    "nan": _nan,
    "infinite": _infinite,
    "any-bits": _any_bits,
    "wide": _wide,
}
SPARSE_CONTENTS: dict[str, Callable[[np.random.Generator, int, ElementType], Bits]] = {
    **CONTENTS,
    "few": _few,
    "ascending": _ascending,
    "descending": _descending,
    "levels": _levels,
    "concentrated": _concentrated,
    "clumps": _clumps,
    "far-apart": _far_apart,
}


def contents(name: str, seed: int, size: int, element: ElementType) -> Bits:
    """`size` bit patterns of `element`, the same for the same arguments."""
    return SPARSE_CONTENTS[name](np.random.default_rng([seed, size]), size, element)


def residual(name: str, seed: int, blocks: int) -> F32:
    """A residual of 32 · `blocks` fp32 values: finite, as error feedback never keeps anything else."""
    rng = np.random.default_rng([seed, blocks, 1])
    if name in ("largest", "wide"):
        return _largest(rng, reference.BLOCK * blocks, FP32).view(np.float32)
    scale = 1e-39 if name in ("denormals", "tiny", "zeros", "levels", "few") else 0.1
    return (rng.standard_normal(reference.BLOCK * blocks) * scale).astype(np.float32)


# Segment tables.


@dataclass(frozen=True)
class Table:
    """Segments (offset, length) of a buffer of `numel` elements, cut into `packets`, evenly or by `packet_of`."""

    segments: tuple[tuple[int, int], ...]
    numel: int
    packets: int = 1
    packet_of: tuple[int, ...] | None = None

    def cut(self, codec: Codec) -> list[reference.Packet]:
        return _cut(self, codec.group)

    def with_whole_segments(self) -> Table:
        """The same segments, each whole in one packet, so that codecs with other groups are cut alike."""
        count = max(len(self.segments), 1)
        return replace(self, packet_of=tuple(i * self.packets // count for i in range(len(self.segments))))

    @property
    def blocks(self) -> int:
        return sum(-(-length // reference.BLOCK) for _, length in self.segments)


@functools.lru_cache(maxsize=256)
def _cut(table: Table, group: int) -> list[reference.Packet]:
    return reference.cut(table.segments, group, table.packets, table.packet_of)


def flat(size: int, packets: int = 1) -> Table:
    return Table(((0, size),), size, packets)


def random_table(seed: int, count: int, longest: int, packets: int = 1, assigned: bool = False) -> Table:
    """`count` segments with gaps, an empty one now and then, out of order in memory every other time."""
    rng = np.random.default_rng([seed, count])
    lengths = np.where(rng.random(count) < 0.15, 0, rng.integers(1, longest + 1, count))
    gaps = rng.integers(0, 9, count)
    order = rng.permutation(count) if seed % 2 else np.arange(count)
    offsets = np.zeros(count, np.int64)
    position = 0
    for i in order:
        offsets[i] = position + gaps[i]
        position = int(offsets[i] + lengths[i])
    packet_of = tuple(int(p) for p in np.sort(rng.integers(0, packets, count))) if assigned else None
    segments = tuple((int(o), int(n)) for o, n in zip(offsets, lengths, strict=True))
    return Table(segments, position + 5, packets, packet_of)


# Memory.


@dataclass
class Guarded:
    """`nbytes` bytes that begin `offset` bytes after a 64-byte boundary, with guards on both sides."""

    nbytes: int
    offset: int = 0
    memory: U8 = field(init=False, repr=False)

    GUARD_NBYTES = 192
    GUARD = 0xA5

    def __post_init__(self) -> None:
        memory = np.full(self.nbytes + 2 * self.GUARD_NBYTES + self.offset + 64, self.GUARD, np.uint8)
        boundary = -memory.ctypes.data % 64
        self.memory = memory[boundary:]

    @property
    def start(self) -> int:
        return self.GUARD_NBYTES + self.offset

    @property
    def bytes(self) -> U8:
        return self.memory[self.start : self.start + self.nbytes]

    def assert_intact(self) -> None:
        before, after = self.memory[: self.start], self.memory[self.start + self.nbytes :]
        assert (before == self.GUARD).all(), "wrote before the buffer"
        assert (after == self.GUARD).all(), "wrote after the buffer"


def guarded_copy(array: npt.NDArray[np.generic], skip: int = 0) -> tuple[Guarded, npt.NDArray[np.generic]]:
    """A copy that begins `skip` of its elements after a 64-byte boundary; the guards and the copy as an array."""
    guarded = Guarded(array.nbytes, skip * array.itemsize)
    view = guarded.bytes.view(array.dtype)
    view[:] = array
    return guarded, view
