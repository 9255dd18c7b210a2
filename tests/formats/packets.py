"""Sections 1 to 3 of ``docs/wire-formats.md``: which elements a packet holds, its header and its size."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from formats.conversions import BUFFER_TYPES, CAST_TYPES, FP32, VALUE_TYPES, ElementType

I64 = npt.NDArray[np.int64]

BLOCK = 32
HEADER_NBYTES = 16
SKIPPED = 65535  # elements that the word FFFF of a TopK packet moves on by

_MASK64 = (1 << 64) - 1


# Section 3: codecs, tag and digest.


@dataclass(frozen=True)
class Codec:
    """What the tag says of a packet, but for the type of the buffer, and the ratio of a TopK.

    The groups of Cast and TopK only say where to cut.
    """

    kind: int
    group: int
    hadamard: bool = False
    ratio: Fraction = Fraction(1)

    @property
    def is_cast(self) -> bool:
        return self.kind <= 4

    @property
    def is_sign(self) -> bool:
        return self.kind == 8

    @property
    def is_sparse(self) -> bool:
        return self.kind >= 32

    @property
    def value_type(self) -> ElementType:
        """Of a TopK's values."""
        return VALUE_TYPES[self.kind - 32]

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

    def kept(self, length: int) -> int:
        """Values that a segment of `length` elements has in a TopK packet."""
        return math.ceil(length * self.ratio)

    def words(self, length: int) -> int:
        """Words that a segment of `length` elements has in a TopK packet."""
        return self.kept(length) + -(-length // SKIPPED)


def int_quant(bits: int, group: int = 128, hadamard: bool = False) -> Codec:
    return Codec(16 + bits, group, hadamard)


def sign(group: int = 1024) -> Codec:
    return Codec(8, group)


def cast(target: ElementType, group: int = BLOCK) -> Codec:
    return Codec(CAST_TYPES.index(target), group)


def topk(ratio: Fraction, values: ElementType = FP32) -> Codec:
    return Codec(32 + VALUE_TYPES.index(values), BLOCK, ratio=ratio)


def mix64(z: int) -> int:
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & _MASK64
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & _MASK64
    return z ^ z >> 31


def tag(codec: Codec, element: ElementType) -> int:
    flags = int(codec.hadamard) | BUFFER_TYPES.index(element) << 1
    group32 = 0 if codec.is_cast or codec.is_sparse else codec.group // BLOCK
    packed = struct.pack("<4sBBH", b"SMR1", codec.kind, flags, group32)
    return int.from_bytes(packed, "little")


def digest(codec: Codec, element: ElementType, lengths: Sequence[int]) -> int:
    d = mix64(tag(codec, element))
    for length in lengths:
        if length:
            d = mix64(d ^ length)
            d = mix64(d ^ codec.kept(length)) if codec.is_sparse else d
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

    def section_nbytes(self, codec: Codec) -> tuple[int, int]:
        """Bytes of scales and of codes (TopK: of values and of words), without padding."""
        if codec.is_sparse:
            kept, words = sum(map(codec.kept, self.lengths)), sum(map(codec.words, self.lengths))
            return codec.value_type.nbytes * kept, 2 * words
        return 0 if codec.is_cast else 2 * self.group_count, 4 * codec.bits * self.block_count

    def nbytes(self, codec: Codec) -> int:
        return HEADER_NBYTES + sum(map(_align16, self.section_nbytes(codec)))


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


# Section 2: the packet.


def header(packet: Packet, codec: Codec, element: ElementType) -> bytes:
    return struct.pack("<QQ", digest(codec, element, packet.lengths), tag(codec, element))


def assemble(packet: Packet, codec: Codec, element: ElementType, first: bytes, second: bytes) -> bytes:
    """The packet of these two sections."""
    assert (len(first), len(second)) == packet.section_nbytes(codec)
    parts = (header(packet, codec, element), first, second)
    return b"".join(part.ljust(_align16(len(part)), b"\0") for part in parts)


def sections(data: bytes, packet: Packet, codec: Codec, element: ElementType) -> tuple[bytes, bytes]:
    """The two sections of a packet. ValueError if it is too short or the header is another's."""
    if len(data) < packet.nbytes(codec):
        raise ValueError(f"packet has {len(data)} bytes, expected {packet.nbytes(codec)}")
    if data[:HEADER_NBYTES] != header(packet, codec, element):
        raise ValueError("tag or digest is not the expected one")
    first, second = packet.section_nbytes(codec)
    begin = HEADER_NBYTES + _align16(first)
    return data[HEADER_NBYTES : HEADER_NBYTES + first], data[begin : begin + second]
