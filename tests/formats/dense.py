"""Sections 5 to 10 of ``docs/wire-formats.md``: the codecs that send every element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from formats.conversions import BF16, CAST_TYPES, F32, FP32, FP32_MAX, Bits, ElementType, from_float, to_float
from formats.packets import BLOCK, I64, Codec, Packet, assemble, mix64, sections

SCALE_NAN = 0x7FC0
SCALE_LARGEST = 0x7F7F

_MASK32 = (1 << 32) - 1


# Section 8: Hadamard.


def transform(blocks: F32) -> F32:
    """`T`, the butterfly without its powers of two, on blocks of shape [B, 32]."""
    for h in (1, 2, 4, 8, 16):
        pairs = blocks.reshape(-1, BLOCK // (2 * h), 2, h)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        blocks = np.stack((a + b, a - b), axis=2).reshape(-1, BLOCK)
    return blocks


def limit(values: F32) -> F32:
    """Saturate at the largest finite magnitude; NaN passes."""
    limited: F32 = np.clip(values, -FP32_MAX, FP32_MAX)
    return limited


def _forward(e: F32) -> F32:
    return transform(e * np.float32(2.0**-5))


def _inverse(q: F32) -> F32:
    e = np.float32(2.0**5) * transform(q * np.float32(2.0**-5))
    return limit(e)


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


# Section 2: the packet. Section 10: error feedback.


def _parse(data: bytes, packet: Packet, codec: Codec, element: ElementType) -> tuple[F32, F32]:
    """Scales [B, 1] (1 for Cast) and signed codes or elements [B, 32]. ValueError if it is another's packet."""
    scale_bytes, codes = sections(data, packet, codec, element)
    if codec.is_cast:
        target = CAST_TYPES[codec.kind]
        elements = np.frombuffer(codes, np.dtype(target.dtype).newbyteorder("<")).astype(target.dtype)
        return np.ones((packet.block_count, 1), np.float32), to_float(elements, target).reshape(-1, BLOCK)
    scales = np.frombuffer(scale_bytes, "<u2").astype(np.uint16)
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
        return assemble(packet, codec, element, b"", data), to_float(elements, target), ~np.isfinite(v)
    scales, codes, q = _quantise(v, packet, codec, counts, random)
    data = assemble(packet, codec, element, scales.astype("<u2").tobytes(), _pack(codes, codec.bits))
    kept = np.repeat((scales == SCALE_NAN)[packet.group_of][:, None], BLOCK, axis=1)
    return data, q, kept


def add_residual(x: F32, e: F32) -> F32:
    v = x + e
    return np.where(np.isfinite(x), limit(v), v)


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
            v = _blocks(values, packet)
            if residual is not None:
                e = residual.reshape(-1, BLOCK)[packet.origin]
                v = np.where(packet.present, add_residual(v, e), np.float32(0))
            data, q, kept = _encode_elements(v, packet, codec, element, stochastic, seed, step)
            out.append(data)
            if new is not None:
                d = _inverse(q) if codec.hadamard else q
                after = np.where(kept | ~packet.present, e, limit(v - d))
                new.reshape(-1, BLOCK)[packet.origin] = after
    return out, new


def encode_difference(
    minuend: F32,
    subtrahend: Bits,
    packets: Sequence[Packet],
    codec: Codec,
    element: ElementType,
    *,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
) -> list[bytes]:
    """Encode what an fp32 buffer has more than one of `element`, the type that the tag names."""
    with np.errstate(all="ignore"):
        values = minuend - to_float(subtrahend, element)
        return [
            _encode_elements(_blocks(values, packet), packet, codec, element, stochastic, seed, step)[0]
            for packet in packets
        ]


def _blocks(values: F32, packet: Packet) -> F32:
    """The elements of the packet, [B, 32], the missing ones +0."""
    v = np.zeros((packet.block_count, BLOCK), np.float32)
    v[packet.present] = values[packet.index[packet.present]]
    return v


def _encode_elements(
    v: F32, packet: Packet, codec: Codec, element: ElementType, stochastic: bool, seed: int, step: int
) -> tuple[bytes, F32, npt.NDArray[np.bool_]]:
    """As `_encode_blocks`, of values not yet transformed."""
    transformed = _forward(v) if codec.hadamard else v
    random = random_bits(seed, step, packet.origin) if stochastic else None
    return _encode_blocks(transformed, packet, codec, element, packet.group_sums(packet.present), random)


# Section 9: decoding and reducing.


def decode(data: Sequence[bytes], packets: Sequence[Packet], codec: Codec, element: ElementType, output: Bits) -> None:
    """Write the elements of every packet to `output`; everything between the segments stays as it is."""
    parsed = [_parse(each, packet, codec, element) for each, packet in zip(data, packets, strict=True)]
    with np.errstate(all="ignore"):
        for packet, (scale, code) in zip(packets, parsed, strict=True):
            _store(code * scale, packet, codec, element, output)


def decode_add(
    data: Sequence[bytes], packets: Sequence[Packet], codec: Codec, element: ElementType, output: Bits
) -> None:
    """Add the elements of every packet to those of `output`."""
    parsed = [_parse(each, packet, codec, element) for each, packet in zip(data, packets, strict=True)]
    with np.errstate(all="ignore"):
        for packet, (scale, code) in zip(packets, parsed, strict=True):
            q = code * scale
            d = (_inverse(q) if codec.hadamard else q)[packet.present]
            index = packet.index[packet.present]
            x = to_float(output[index], element)
            total = np.where(np.isfinite(x) & np.isfinite(d), limit(x + d), x + d)
            output[index] = from_float(total, element)


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
    into: tuple[Packet, Codec] | None = None,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    residual: F32 | None = None,
) -> tuple[bytes, F32 | None]:
    """Add the packets of all ranks and encode the sum, in the format `into` where that is another; the residual is in
    the order of the packet's blocks."""
    with np.errstate(all="ignore"):
        v = _accumulate(data, factor, packet, codec, element)
        packet, codec = into or (packet, codec)
        data_present = packet.present | codec.hadamard
        v = np.where(data_present, v, np.float32(0))
        if residual is not None:
            e = np.where(data_present, residual.reshape(-1, BLOCK), np.float32(0))
            v = add_residual(v, e)
        random = random_bits(seed, step, packet.origin) if stochastic else None
        counts = packet.group_sums(data_present)
        out, q, kept = _encode_blocks(v, packet, codec, element, counts, random)
        if residual is None:
            return out, None
        after = np.where(data_present, np.where(kept, e, v - q), np.float32(0))
        return out, after.reshape(-1)
