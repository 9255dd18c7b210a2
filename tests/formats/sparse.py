"""Section 11 of ``docs/wire-formats.md``: TopK, which sends a few elements and where they stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from formats.conversions import F32, FP32, Bits, ElementType, from_float, to_float
from formats.dense import add_residual, limit
from formats.packets import BLOCK, I64, SKIPPED, Codec, Packet, assemble, sections

SKIP = 0xFFFF

# One segment.


def selection(v: F32, kept: int) -> I64:
    """The indices of the first `kept` elements in the order of the section, ascending."""
    magnitude = from_float(v, FP32) & np.uint32(0x7FFFFFFF)  # every NaN is 7FC00000
    order = np.argsort(-magnitude.astype(np.int64), kind="stable")
    return np.sort(order[:kept])


def words_of(index: I64, length: int) -> npt.NDArray[np.uint16]:
    """The words that give these indices into a segment of `length` elements, with the filling at the end."""
    gaps = np.diff(index, prepend=-1) - 1
    skips = gaps // SKIPPED
    words = np.full(len(index) + -(-length // SKIPPED), SKIP, np.uint16)
    words[np.cumsum(skips + 1) - 1] = gaps - skips * SKIPPED
    return words


def indices_of(words: npt.NDArray[np.uint16], length: int, kept: int) -> I64:
    """The indices that the words of a segment give. ValueError unless there are `kept`, all below `length`."""
    is_value = words != SKIP
    if is_value.sum() != kept:
        raise ValueError(f"the words give {is_value.sum()} indices, expected {kept}")
    cursor = np.cumsum(np.where(is_value, words.astype(np.int64) + 1, SKIPPED))
    index: I64 = cursor[is_value] - 1
    if (index >= length).any():
        raise ValueError(f"index {index.max()} is past the end of a segment of {length} elements")
    return index


# One packet. Its elements are those of all segments, one after the other: index [N] into them.


def _spans(packet: Packet, codec: Codec) -> Iterator[tuple[int, int, int, int]]:
    """For each segment: its first element in the packet, its length, how many values and how many words it has."""
    begin = 0
    for length in packet.lengths:
        yield begin, length, codec.kept(length), codec.words(length)
        begin += length


def _slots(packet: Packet, block: I64) -> I64:
    """Where the residual of each element stands, given the number of each block."""
    slots: I64 = (BLOCK * block[:, None] + np.arange(BLOCK))[packet.present]
    return slots


def _encode_elements(v: F32, packet: Packet, codec: Codec, element: ElementType) -> tuple[bytes, F32]:
    """The packet of elements [N] and what of them it does not hold, [N]."""
    chosen, words = [np.zeros(0, np.int64)], [np.zeros(0, np.uint16)]
    for begin, length, kept, _ in _spans(packet, codec):
        index = selection(v[begin : begin + length], kept)
        chosen.append(begin + index)
        words.append(words_of(index, length))
    index = np.concatenate(chosen)
    values = from_float(v[index], codec.value_type)
    lost = v.copy()
    lost[index] = limit(v[index] - to_float(values, codec.value_type))
    first = values.astype(values.dtype.newbyteorder("<")).tobytes()
    return assemble(packet, codec, element, first, np.concatenate(words).astype("<u2").tobytes()), lost


def _parse(data: bytes, packet: Packet, codec: Codec, element: ElementType) -> tuple[I64, F32]:
    """Which elements the packet holds, and their values. ValueError if it is another's, or holds no such elements."""
    first, second = sections(data, packet, codec, element)
    values = np.frombuffer(first, np.dtype(codec.value_type.dtype).newbyteorder("<")).astype(codec.value_type.dtype)
    words = np.frombuffer(second, "<u2").astype(np.uint16)
    index, word = [np.zeros(0, np.int64)], 0
    for begin, length, kept, count in _spans(packet, codec):
        index.append(begin + indices_of(words[word : word + count], length, kept))
        word += count
    return np.concatenate(index), to_float(values, codec.value_type)


def _after(v: F32, e: F32, lost: F32) -> F32:
    return np.where(np.isfinite(v), lost, e)


def encode(
    buffer: Bits, packets: Sequence[Packet], codec: Codec, element: ElementType, *, residual: F32 | None = None
) -> tuple[list[bytes], F32 | None]:
    """Encode every packet; returns them and the new residual (None without one), fp32, 32 elements for each block."""
    new = None if residual is None else residual.copy()
    out = []
    values = to_float(buffer, element)
    with np.errstate(all="ignore"):
        for packet in packets:
            v = values[packet.index[packet.present]]
            slots = _slots(packet, packet.origin)
            if residual is not None:
                v = add_residual(v, residual[slots])
            data, lost = _encode_elements(v, packet, codec, element)
            out.append(data)
            if residual is not None and new is not None:
                new[slots] = _after(v, residual[slots], lost)
    return out, new


# Decoding and reducing.


def _accumulate(data: Sequence[bytes], factor: float, packet: Packet, codec: Codec, element: ElementType) -> F32:
    f = np.float32(factor)
    parsed = [_parse(each, packet, codec, element) for each in data]
    acc = np.zeros(sum(packet.lengths), np.float32)
    for index, values in parsed:
        acc[index] = acc[index] + values * f
    return acc


def decode(data: Sequence[bytes], packets: Sequence[Packet], codec: Codec, element: ElementType, output: Bits) -> None:
    """Write the elements of every packet to `output`; everything between the segments stays as it is."""
    with np.errstate(all="ignore"):
        decoded = [_accumulate([each], 1, p, codec, element) for each, p in zip(data, packets, strict=True)]
        for packet, values in zip(packets, decoded, strict=True):
            output[packet.index[packet.present]] = from_float(values, element)


def clear(data: Sequence[bytes], packets: Sequence[Packet], codec: Codec, element: ElementType, output: Bits) -> None:
    """Write +0 to the elements of `output`, of any type, that the packets of a buffer of `element` hold."""
    parsed = [_parse(each, packet, codec, element) for each, packet in zip(data, packets, strict=True)]
    for packet, (index, _) in zip(packets, parsed, strict=True):
        output[packet.index[packet.present][index]] = 0


def reduce(
    data: Sequence[bytes], factor: float, packet: Packet, codec: Codec, element: ElementType, output: Bits
) -> None:
    """Add the packets of all ranks, each times `factor`, and write the sum to `output`."""
    with np.errstate(all="ignore"):
        acc = _accumulate(data, factor, packet, codec, element)
        output[packet.index[packet.present]] = from_float(acc, element)


def reduce_encode(
    data: Sequence[bytes],
    factor: float,
    packet: Packet,
    codec: Codec,
    element: ElementType,
    *,
    residual: F32 | None = None,
) -> tuple[bytes, F32 | None]:
    """Add the packets of all ranks and encode the sum; the residual is in the order of the packet's blocks."""
    with np.errstate(all="ignore"):
        v = _accumulate(data, factor, packet, codec, element)
        if residual is None:
            return _encode_elements(v, packet, codec, element)[0], None
        slots = _slots(packet, np.arange(packet.block_count))
        v = add_residual(v, residual[slots])
        out, lost = _encode_elements(v, packet, codec, element)
        new = np.zeros_like(residual)
        new[slots] = _after(v, residual[slots], lost)
        return out, new
