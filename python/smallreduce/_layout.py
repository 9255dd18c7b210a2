"""Which elements of a flat buffer go into which packets, as the tables that every kernel reads.

The normative text is docs/wire-formats.md, section 1; the rows are the structs ``Segment`` and ``Packet`` of
``csrc/formats/types.h``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smallreduce._native import native

__all__ = ["BLOCK", "COLUMNS", "ELEMENT_TYPES", "Format", "Layout"]

BLOCK = 32
"""Elements in a block, the unit in which codes and residuals are stored."""

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that a buffer may have, and their numbers in a packet's tag."""

# Columns of the segment table and of the packet table.
_FIRST_GROUP, _OFFSET, _LENGTH, _PACKET, _BLOCK, _GROUP, _ORIGIN, _KEPT, _VALUE, _WORD = range(10)
_DIGEST, _GROUPS, _BLOCKS, _NBYTES, _VALUES = range(5)
COLUMNS = (10, 5)
"""Of the segment table and of the packet table."""


class Format(NamedTuple):
    """What the kernels need to know of a codec."""

    kind: int
    group: int
    hadamard: bool
    stochastic: bool
    ratio: tuple[int, int] = (1, 1)
    """The share of elements that a sparse format keeps, as a fraction."""

    @property
    def is_sparse(self) -> bool:
        return self.kind >= 32


class Layout:
    """Segments of a flat buffer, cut into packets of one format. Immutable.

    Attributes:
        format, dtype: The format of the packets and the dtype of the buffer.
        segments: int64 CPU tensor, one row for each run of elements that falls into one packet, and a sentinel row.
        packets: int64 CPU tensor, one row for each packet.
        packet_count: Number of packets.
        nbytes: Size of each packet in bytes.
        stride: Size of the largest packet: the distance at which packets lie in a buffer.
        numel: Elements in all segments.
        extent: Elements that the buffer must have at least: the end of the segment that reaches furthest.
        packet_blocks: Blocks of each packet.
        blocks: Blocks in all packets.
        origin_end: One more than the largest origin; a worker's residual has ``32 * origin_end`` elements at least.
    """

    def __init__(self, segments: Tensor, packets: Tensor, format: Format, dtype: torch.dtype) -> None:
        self.segments = segments
        self.packets = packets
        self.format = format
        self.dtype = dtype
        rows = segments[:-1]
        lengths = rows[:, _LENGTH]
        self.packet_count = packets.shape[0]
        self.nbytes: tuple[int, ...] = tuple(packets[:, _NBYTES].tolist())
        self.stride = max(self.nbytes)
        self.numel = int(lengths.sum())
        self.packet_blocks: tuple[int, ...] = tuple(packets[:, _BLOCKS].tolist())
        self.blocks = sum(self.packet_blocks)
        used = rows[lengths > 0]
        ends = used[:, _OFFSET] + used[:, _LENGTH]
        origins = used[:, _ORIGIN] + (used[:, _LENGTH] + BLOCK - 1) // BLOCK
        self.extent = int(ends.max()) if len(used) else 0
        self.origin_end = int(origins.max()) if len(used) else 0
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._scratch: dict[tuple[str, int, int], int] = {}
        self._same_blocks: weakref.WeakKeyDictionary[Layout, bool] = weakref.WeakKeyDictionary()

    @classmethod
    def build(
        cls,
        segments: Sequence[tuple[int, int]],
        format: Format,
        dtype: torch.dtype,
        packets: int = 1,
        packet_of: Sequence[int] | None = None,
    ) -> Layout:
        """Lays out ``segments``, each ``(offset, length)`` in elements of a buffer of ``dtype``.

        Args:
            packets: Number of packets; they are cut evenly, between groups, unless
            packet_of: says for each segment into which packet it falls whole, ascending.
        """
        offsets, lengths = [offset for offset, _ in segments], [length for _, length in segments]
        of = None if packet_of is None else list(packet_of)
        kind, group, hadamard, _, ratio = format
        rows, table = native.build_layout(
            offsets, lengths, of, packets, kind, group, hadamard, *ratio, ELEMENT_TYPES[dtype]
        )
        return cls(_tensor(rows, COLUMNS[0]), _tensor(table, COLUMNS[1]), format, dtype)

    def select(self, packets: Sequence[int]) -> Layout:
        """The layout of some of the packets, in the order given. Packets and origins stay what they are."""
        rows = self.segments[:-1]
        index = torch.tensor(packets, dtype=torch.int64)
        column = rows[:, _PACKET].contiguous()
        begins = torch.searchsorted(column, index).tolist()
        ends = torch.searchsorted(column, index, right=True).tolist()
        groups = self.segments[:, _FIRST_GROUP].diff()
        spans = [torch.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
        chosen = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
        table = torch.zeros(len(chosen) + 1, COLUMNS[0], dtype=torch.int64)
        table[:-1] = rows[chosen]
        table[1:, _FIRST_GROUP] = groups[chosen].cumsum(0)
        table[0, _FIRST_GROUP] = 0
        counts = torch.tensor([len(span) for span in spans], dtype=torch.int64)
        table[:-1, _PACKET] = torch.repeat_interleave(torch.arange(len(packets)), counts)
        return Layout(table, self.packets[index], self.format, self.dtype)

    def runs(self) -> list[tuple[int, int, int]]:
        """``(offset, length, packet)`` of every run of elements that falls into one packet, packet after packet."""
        return [(int(o), int(n), int(p)) for o, n, p in self.segments[:-1, [_OFFSET, _LENGTH, _PACKET]].tolist()]

    def has_blocks_of(self, other: Layout) -> bool:
        """Whether each packet has the same elements, in the same blocks, as the other layout's of that number."""
        if self is other:
            return True
        if other not in self._same_blocks:
            columns = [_OFFSET, _LENGTH, _PACKET, _BLOCK, _ORIGIN]
            mine, theirs = self.segments[:-1, columns], other.segments[:-1, columns]
            self._same_blocks[other] = torch.equal(mine, theirs)
        return self._same_blocks[other]

    def block_origins(self) -> Tensor:
        """The origin of every block, int64, packet after packet: where a block of packets stood in the uncut list."""
        rows = self.segments[:-1]
        counts = (rows[:, _LENGTH] + BLOCK - 1) // BLOCK
        starts = rows[:, _ORIGIN] - (counts.cumsum(0) - counts)
        return torch.repeat_interleave(starts, counts) + torch.arange(int(counts.sum()))

    @functools.cached_property
    def by_origin(self) -> Layout:
        """The same packets over a buffer laid out as a residual is: in block order, by origin."""
        segments = self.segments.clone()
        segments[:-1, _OFFSET] = BLOCK * segments[:-1, _ORIGIN]
        return Layout(segments, self.packets, self.format, self.dtype)

    def scratch_nbytes(self, device: torch.device, ranks: int) -> int:
        """Bytes of scratch memory that the kernels need on ``device``, reductions for packets of ``ranks`` ranks."""
        if not self.format.is_sparse or device.type == "meta":
            return 0
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        key = (device.type, ranks, threads)
        if key not in self._scratch:
            tables = self.segments.data_ptr(), len(self.segments) - 1, self.packets.data_ptr(), self.packet_count
            if device.type == "cpu":
                self._scratch[key] = native.cpu_scratch_nbytes(*tables, ranks, threads)
            else:
                self._scratch[key] = native.cuda_scratch_nbytes(*tables, ranks)
        return self._scratch[key]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Segment and packet table on ``device``, copied once."""
        if device.type == "cpu":
            return self.segments, self.packets
        if device not in self._tables:
            self._tables[device] = (self.segments.to(device), self.packets.to(device))
        return self._tables[device]


def _tensor(rows: bytes, columns: int) -> Tensor:
    if not rows:
        return torch.empty(0, columns, dtype=torch.int64)
    return torch.frombuffer(bytearray(rows), dtype=torch.int64).view(-1, columns)
