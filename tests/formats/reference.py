"""The wire formats of ``docs/wire-formats.md``, a second time: NumPy, written from that page alone.

The kernels are compared with this module bit for bit, so it shares nothing with them and favours the words of the page
over speed. Buffers are arrays of bit patterns (``uint32`` or ``uint16``), which keeps NaN payloads and signed zeros
visible. Every operation acts on ``float32`` arrays and is therefore rounded on its own. The calling thread must not
flush denormals.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

BLOCK = 32
HEADER_NBYTES = 16
SCALE_NAN = 0x7FC0
SCALE_LARGEST = 0x7F7F
FP32_MAX = np.float32(3.4028234663852886e38)

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


# Section 4: element conversions.


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


# Section 3: codecs, tag and digest.


@dataclass(frozen=True)
class Codec:
    """What the tag says of a packet, but for the type of the buffer. The group of a Cast only says where to cut."""

    kind: int
    group: int
    hadamard: bool = False

    @property
    def is_cast(self) -> bool:
        return self.kind <= 4

    @property
    def is_sign(self) -> bool:
        return self.kind == 8

    @property
    def bits(self) -> int:
        if self.is_cast:
            return 8 * CAST_TYPES[self.kind].nbytes
        return 1 if self.is_sign else self.kind - 16

    @property
    def zero_code(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def levels(self) -> int:
        return self.zero_code - 1

    @property
    def largest_scale(self) -> int:
        return {2: 0x7F7F, 4: 0x7E12, 8: 0x7C01}[self.bits]


def int_quant(bits: int, group: int = 128, hadamard: bool = False) -> Codec:
    return Codec(16 + bits, group, hadamard)


def sign(group: int = 1024) -> Codec:
    return Codec(8, group)


def cast(target: ElementType, group: int = BLOCK) -> Codec:
    return Codec(CAST_TYPES.index(target), group)


def mix64(z: int) -> int:
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & _MASK64
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & _MASK64
    return z ^ z >> 31


def tag(codec: Codec, element: ElementType) -> int:
    flags = int(codec.hadamard) | BUFFER_TYPES.index(element) << 1
    group32 = 0 if codec.is_cast else codec.group // BLOCK
    packed = struct.pack("<4sBBH", b"SMR1", codec.kind, flags, group32)
    return int.from_bytes(packed, "little")


def digest(packet_tag: int, lengths: Sequence[int]) -> int:
    d = mix64(packet_tag)
    for length in lengths:
        if length:
            d = mix64(d ^ length)
    return d


# Section 1: segments, blocks, groups, packets.


@dataclass(frozen=True)
class Segment:
    """`length` elements of the buffer from `offset` on; `origin` is the origin of the first block."""

    offset: int
    length: int
    origin: int


class Packet:
    """The non-empty segments of one packet, and where each of its B blocks and G groups lies."""

    def __init__(self, segments: Sequence[Segment], group: int) -> None:
        self.segments = tuple(s for s in segments if s.length)
        lengths = np.array([s.length for s in self.segments], dtype=np.int64)
        offsets = np.array([s.offset for s in self.segments], dtype=np.int64)
        origins = np.array([s.origin for s in self.segments], dtype=np.int64)
        blocks = -(-lengths // BLOCK)
        segment_of = np.repeat(np.arange(len(lengths)), blocks)
        first_block = np.cumsum(blocks) - blocks
        within = np.arange(blocks.sum()) - first_block[segment_of]  # number of the block in its segment
        position = within[:, None] * BLOCK + np.arange(BLOCK)
        self.present = position < lengths[segment_of][:, None]  # [B, 32]
        self.index = np.where(self.present, offsets[segment_of][:, None] + position, 0)  # [B, 32], into the buffer
        self.origin: I64 = origins[segment_of] + within  # [B]
        starts = within % (group // BLOCK) == 0
        self.group_start: I64 = np.flatnonzero(starts)  # [G], number of the first block
        self.group_of: I64 = np.cumsum(starts) - 1  # [B]

    @property
    def lengths(self) -> list[int]:
        return [s.length for s in self.segments]

    @property
    def block_count(self) -> int:
        return len(self.origin)

    @property
    def group_count(self) -> int:
        return len(self.group_start)

    def group_sums(self, mask: npt.NDArray[np.bool_]) -> I64:
        """How many elements of each group [G] the mask [B, 32] marks."""
        if self.group_count == 0:
            return np.zeros(0, np.int64)
        return np.add.reduceat(mask.sum(axis=1), self.group_start)

    def nbytes(self, codec: Codec) -> int:
        scales = 0 if codec.is_cast else _align16(2 * self.group_count)
        return HEADER_NBYTES + scales + _align16(4 * codec.bits * self.block_count)


def cut(
    segments: Sequence[tuple[int, int]], group: int, packets: int = 1, packet_of: Sequence[int] | None = None
) -> list[Packet]:
    """Cut a list of (offset, length) evenly between groups, or put each segment whole into the packet named for it."""
    lists: list[list[Segment]] = [[] for _ in range(packets)]
    blocks_before = groups_before = 0
    total = sum(-(-length // group) for _, length in segments)
    for number, (offset, length) in enumerate(segments):
        groups = -(-length // group)
        for p in range(packets):
            if packet_of is not None:
                first, last = (0, groups) if packet_of[number] == p else (0, 0)
            else:
                first = min(max(total * p // packets - groups_before, 0), groups)
                last = min(max(total * (p + 1) // packets - groups_before, 0), groups)
            if first < last:
                start, stop = first * group, min(last * group, length)
                lists[p].append(Segment(offset + start, stop - start, blocks_before + start // BLOCK))
        blocks_before += -(-length // BLOCK)
        groups_before += groups
    return [Packet(each, group) for each in lists]


def _align16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


# Section 8: Hadamard.


def transform(blocks: F32) -> F32:
    """`T`, the butterfly without its powers of two, on blocks of shape [B, 32]."""
    for h in (1, 2, 4, 8, 16):
        pairs = blocks.reshape(-1, BLOCK // (2 * h), 2, h)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        blocks = np.stack((a + b, a - b), axis=2).reshape(-1, BLOCK)
    return blocks


def _limit(values: F32) -> F32:
    """Saturate at the largest finite magnitude; NaN passes."""
    limited: F32 = np.clip(values, -FP32_MAX, FP32_MAX)
    return limited


def _forward(e: F32) -> F32:
    return transform(e * np.float32(2.0**-5))


def _inverse(q: F32) -> F32:
    e = np.float32(2.0**5) * transform(q * np.float32(2.0**-5))
    return _limit(e)


# Section 6: rounding and randomness.


def random_bits(seed: int, step: int, origin: I64) -> npt.NDArray[np.uint32]:
    """16 random bits for each element, [B, 32], of the blocks with these origins."""
    key = mix64(seed ^ mix64(step))
    j = np.arange(16, dtype=np.uint64)
    start = 16 * origin.astype(np.uint64)[:, None] + j + np.uint64(key & _MASK32)
    x = (start & np.uint64(_MASK32)).astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15)) + np.uint32(key >> 32)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return np.concatenate((x & np.uint32(0xFFFF), x >> np.uint32(16)), axis=1)


def collective_seed(base: int, bucket: int, rank: int, stage: int) -> int:
    return mix64(mix64(mix64(base) ^ bucket) ^ (2 * rank + stage))


# Sections 5 and 7: scales and codes.


def _scales(v: F32, packet: Packet, codec: Codec, counts: I64) -> npt.NDArray[np.uint16]:
    """Scale bits of each group, [G], of values [B, 32] of which `counts` [G] are data."""
    if packet.group_count == 0:
        return np.zeros(0, np.uint16)
    magnitude = v.view(np.uint32) & np.uint32(0x7FFFFFFF)
    absmax = np.maximum.reduceat(magnitude.max(axis=1), packet.group_start)
    if codec.is_sign:
        scale = from_float(_mean(magnitude.view(np.float32), packet, counts), BF16)
        scale = np.minimum(scale, np.uint16(SCALE_LARGEST))
    else:
        step = absmax.view(np.float32) / np.float32(codec.levels)
        up = (step.view(np.uint32).astype(np.int64) + 0xFFFF) >> 16
        scale = np.clip(up, 0x0080, codec.largest_scale)
        scale = np.where(absmax == 0, 0, scale)
    return np.where(absmax >= FP32.infinity, SCALE_NAN, scale).astype(np.uint16)


def _mean(magnitude: F32, packet: Packet, counts: I64) -> F32:
    sizes = np.diff(np.append(packet.group_start, packet.block_count))
    sums = np.zeros((packet.group_count, BLOCK), np.float32)
    for i in range(sizes.max()):
        longer = np.flatnonzero(sizes > i)
        sums[longer] += magnitude[packet.group_start[longer] + i]
    for h in (16, 8, 4, 2, 1):
        sums[:, :h] += sums[:, h : 2 * h]
    mean: F32 = np.divide(sums[:, 0], counts.astype(np.float32))
    return mean


def _signed_values(codes: npt.NDArray[np.int64], codec: Codec) -> F32:
    return (2 * codes - 1 if codec.is_sign else codes - codec.zero_code).astype(np.float32)


def _quantise(
    v: F32, packet: Packet, codec: Codec, counts: I64, random: npt.NDArray[np.uint32] | None
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64], F32]:
    """Scales [G], codes [B, 32] and the values [B, 32] that they stand for."""
    scales = _scales(v, packet, codec, counts)
    s = to_float(scales, BF16)[packet.group_of][:, None]
    if codec.is_sign:
        codes = np.where(v < 0, 0, 1).astype(np.int64)
    else:
        c = codec.zero_code
        inv = np.where(s == 0, np.float32(0), np.float32(1) / s)
        y = v * inv
        u = np.float32(0.5) if random is None else (random | np.uint32(1)).astype(np.float32) / np.float32(65536)
        t = y + (np.float32(c) + u)
        t = np.where(np.isnan(s), np.float32(c), t)
        codes = np.clip(np.trunc(t), 1, 2 * c - 1).astype(np.int64)
    return scales, codes, _signed_values(codes, codec) * s


def _pack(codes: npt.NDArray[np.int64], bits: int) -> bytes:
    narrow = codes.astype(np.uint8)
    if bits == 1:
        return np.packbits(narrow, axis=1, bitorder="little").tobytes()
    lanes = 8 // bits  # codes in a byte
    parts = narrow.reshape(-1, lanes, BLOCK // lanes)
    packed = np.zeros((len(codes), BLOCK // lanes), np.uint8)
    for k in range(lanes):
        packed |= parts[:, k] << np.uint8(bits * k)
    return packed.tobytes()


def _unpack(data: bytes, bits: int) -> npt.NDArray[np.int64]:
    raw = np.frombuffer(data, np.uint8).reshape(-1, 4 * bits)
    if bits == 1:
        return np.unpackbits(raw, axis=1, bitorder="little").astype(np.int64)
    lanes = 8 // bits
    parts = [raw >> np.uint8(bits * k) & np.uint8((1 << bits) - 1) for k in range(lanes)]
    return np.concatenate(parts, axis=1).astype(np.int64)


# Section 2: the packet.


def header(packet: Packet, codec: Codec, element: ElementType) -> bytes:
    packet_tag = tag(codec, element)
    return struct.pack("<QQ", digest(packet_tag, packet.lengths), packet_tag)


def _assemble(packet: Packet, codec: Codec, element: ElementType, scales: bytes, codes: bytes) -> bytes:
    sections = (header(packet, codec, element), scales, codes)
    out = b"".join(section.ljust(_align16(len(section)), b"\0") for section in sections)
    assert len(out) == packet.nbytes(codec)
    return out


def _parse(data: bytes, packet: Packet, codec: Codec, element: ElementType) -> tuple[F32, F32]:
    """Scales [B, 1] (1 for Cast) and signed codes or elements [B, 32]. ValueError if the header is another's."""
    if len(data) < packet.nbytes(codec):
        raise ValueError(f"packet has {len(data)} bytes, expected {packet.nbytes(codec)}")
    if data[:HEADER_NBYTES] != header(packet, codec, element):
        raise ValueError("tag or digest is not the expected one")
    start = HEADER_NBYTES if codec.is_cast else HEADER_NBYTES + _align16(2 * packet.group_count)
    codes = data[start : start + 4 * codec.bits * packet.block_count]
    if codec.is_cast:
        target = CAST_TYPES[codec.kind]
        elements = np.frombuffer(codes, np.dtype(target.dtype).newbyteorder("<")).astype(target.dtype)
        return np.ones((packet.block_count, 1), np.float32), to_float(elements, target).reshape(-1, BLOCK)
    scales = np.frombuffer(data, "<u2", packet.group_count, HEADER_NBYTES).astype(np.uint16)
    scales = np.where(scales > SCALE_LARGEST, np.uint16(SCALE_NAN), scales)
    return to_float(scales, BF16)[packet.group_of][:, None], _signed_values(_unpack(codes, codec.bits), codec)


def _encode_blocks(
    v: F32, packet: Packet, codec: Codec, element: ElementType, counts: I64, random: npt.NDArray[np.uint32] | None
) -> tuple[bytes, F32, npt.NDArray[np.bool_]]:
    """The packet of values [B, 32] already transformed; the values it stands for; which residuals stay as they are."""
    if codec.is_cast:
        target = CAST_TYPES[codec.kind]
        elements = from_float(v, target)
        data = elements.astype(np.dtype(target.dtype).newbyteorder("<")).tobytes()
        return _assemble(packet, codec, element, b"", data), to_float(elements, target), ~np.isfinite(v)
    scales, codes, q = _quantise(v, packet, codec, counts, random)
    data = _assemble(packet, codec, element, scales.astype("<u2").tobytes(), _pack(codes, codec.bits))
    kept = np.repeat((scales == SCALE_NAN)[packet.group_of][:, None], BLOCK, axis=1)
    return data, q, kept


def _add_residual(x: F32, e: F32) -> F32:
    v = x + e
    return np.where(np.isfinite(x), _limit(v), v)


def encode(
    buffer: Bits,
    packets: Sequence[Packet],
    codec: Codec,
    element: ElementType,
    *,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    residual: F32 | None = None,
) -> tuple[list[bytes], F32 | None]:
    """Encode every packet; returns them and the new residual (None without one), fp32, 32 elements for each block."""
    new = None if residual is None else residual.copy()
    out = []
    values = to_float(buffer, element)
    with np.errstate(all="ignore"):
        for packet in packets:
            v = np.zeros((packet.block_count, BLOCK), np.float32)
            v[packet.present] = values[packet.index[packet.present]]
            if residual is not None:
                e = residual.reshape(-1, BLOCK)[packet.origin]
                v = np.where(packet.present, _add_residual(v, e), np.float32(0))
            transformed = _forward(v) if codec.hadamard else v
            random = random_bits(seed, step, packet.origin) if stochastic else None
            counts = packet.group_sums(packet.present)
            data, q, kept = _encode_blocks(transformed, packet, codec, element, counts, random)
            out.append(data)
            if new is not None:
                d = _inverse(q) if codec.hadamard else q
                after = np.where(kept | ~packet.present, e, _limit(v - d))
                new.reshape(-1, BLOCK)[packet.origin] = after
    return out, new


# Section 9: decoding and reducing.


def decode(data: Sequence[bytes], packets: Sequence[Packet], codec: Codec, element: ElementType, output: Bits) -> None:
    """Write the elements of every packet to `output`; everything between the segments stays as it is."""
    parsed = [_parse(each, packet, codec, element) for each, packet in zip(data, packets, strict=True)]
    with np.errstate(all="ignore"):
        for packet, (scale, code) in zip(packets, parsed, strict=True):
            _store(code * scale, packet, codec, element, output)


def _store(q: F32, packet: Packet, codec: Codec, element: ElementType, output: Bits) -> None:
    values = _inverse(q) if codec.hadamard else q
    output[packet.index[packet.present]] = from_float(values, element)[packet.present]


def _accumulate(data: Sequence[bytes], factor: float, packet: Packet, codec: Codec, element: ElementType) -> F32:
    f = np.float32(factor)
    parsed = [_parse(each, packet, codec, element) for each in data]
    terms = [code * f if codec.is_cast else code * (scale * f) for scale, code in parsed]
    acc: F32 = terms[0]
    for term in terms[1:]:
        acc = acc + term
    return acc


def reduce(
    data: Sequence[bytes], factor: float, packet: Packet, codec: Codec, element: ElementType, output: Bits
) -> None:
    """Add the packets of all ranks, each times `factor`, and write the sum to `output`."""
    with np.errstate(all="ignore"):
        _store(_accumulate(data, factor, packet, codec, element), packet, codec, element, output)


def reduce_encode(
    data: Sequence[bytes],
    factor: float,
    packet: Packet,
    codec: Codec,
    element: ElementType,
    *,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    residual: F32 | None = None,
) -> tuple[bytes, F32 | None]:
    """Add the packets of all ranks and encode the sum; the residual is in the order of the packet's blocks."""
    with np.errstate(all="ignore"):
        v = _accumulate(data, factor, packet, codec, element)
        data_present = packet.present | codec.hadamard
        v = np.where(data_present, v, np.float32(0))
        if residual is not None:
            e = np.where(data_present, residual.reshape(-1, BLOCK), np.float32(0))
            v = _add_residual(v, e)
        random = random_bits(seed, step, packet.origin) if stochastic else None
        counts = packet.group_sums(data_present)
        out, q, kept = _encode_blocks(v, packet, codec, element, counts, random)
        if residual is None:
            return out, None
        after = np.where(data_present, np.where(kept, e, v - q), np.float32(0))
        return out, after.reshape(-1)
