"""Which residuals a rank takes over from other numbers of ranks: rows of a matrix that has one for each rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Place", "overlaps"]


@dataclass(frozen=True)
class Place:
    """Where a rank is among all that hold residuals.

    Attributes:
        world_size: Ranks of a shard group.
        replicas: How many such groups.
        row: This rank's number among all.
    """

    world_size: int
    replicas: int = 1
    row: int = 0

    @property
    def rows(self) -> int:
        return self.world_size * self.replicas

    @staticmethod
    def of(ranks: Any) -> Place:
        """From a number of ranks, or a pair: ranks of a shard group, and replicas."""
        world_size, replicas = (ranks, 1) if isinstance(ranks, int) else (int(part) for part in ranks)
        return Place(world_size, replicas)


def overlaps(new: Place, old: Place) -> dict[int, float]:
    """The old rows that a new one takes over, one after another, and how much of each: shares of a line that both
    divide evenly."""
    shares = {}
    for row in range(old.rows):
        # In parts of a line that is rows * rows' long.
        begin = max(row * new.rows, new.row * old.rows)
        end = min((row + 1) * new.rows, (new.row + 1) * old.rows)
        if begin < end:
            shares[row] = (end - begin) / old.rows
    return shares
