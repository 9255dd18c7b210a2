"""How a parameter is divided into blocks that share a scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from smallreduce.ragged import RaggedShard

__all__ = ["VECTOR_BLOCK", "Tiling"]

VECTOR_BLOCK = 256
"""Elements of a block of a vector."""


@dataclass(frozen=True)
class Tiling:
    """A tensor as a matrix of ``rows`` by ``cols``, its last dimension, in tiles of ``height`` by ``width``; the last
    ones of a row and of a column may be smaller. A vector, or a scalar, is one column."""

    rows: int
    cols: int
    height: int
    width: int

    @classmethod
    def of(cls, shape: Sequence[int], block: int) -> Tiling:
        """Of a tensor of ``shape``: tiles of ``block`` by ``block``, of a vector blocks of 256."""
        if len(shape) < 2:
            return cls(math.prod(shape), 1, VECTOR_BLOCK, 1)
        cols = shape[-1]
        return cls(math.prod(shape[:-1]), cols, block, max(1, min(block, cols)))

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles in a column and in a row: the shape of the scales."""
        return -(-self.rows // self.height), -(-self.cols // self.width)

    def strips(self, begin: int, end: int, numel: int) -> Iterator[tuple[int, int]]:
        """Rows ``begin`` to ``end`` in runs of whole tiles, of about ``numel`` elements at most."""
        step = self.height * max(1, numel // max(1, self.height * self.width * self.grid[1]))
        for first in range(begin, end, step):
            yield first, min(first + step, end)

    def fits(self, begin: int, end: int) -> bool:
        """Whether the elements ``begin`` to ``end`` of the flattened tensor are whole tiles."""
        of_tiles = self.height * self.cols
        return begin == end or (begin % of_tiles == 0 and (end % of_tiles == 0 or end == self.rows * self.cols))

    def rows_of(self, begin: int, end: int) -> tuple[int, int]:
        """The rows that these are, if they are whole tiles."""
        return (0, 0) if begin == end else (begin // self.cols, end // self.cols)

    def placement_of_scales(self, ranges: Sequence[tuple[int, int]]) -> RaggedShard:
        """That under which each rank has the scales of its tiles.

        Args:
            ranges: The elements of each rank: whole tiles.
        """
        rows = (self.rows_of(begin, end) for begin, end in ranges)
        lengths = [(-(-last // self.height) - first // self.height) * self.grid[1] for first, last in rows]
        return RaggedShard.from_lengths(self.grid, lengths)
