"""What the parts of a sharded tensor agree on: its shape, its placement and the group of ranks that it lies on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.distributed as dist

from smallreduce.collectives._group import group_of
from smallreduce.ragged._placement import RaggedShard, check_shape

__all__ = ["Sharding"]


@dataclass(frozen=True)
class Sharding:
    """A tensor's global ``shape``, its ``placement`` and the ``group`` of ranks that it lies on.

    One object for all tensors that are alike, as a parameter and its optimizer's state are: copied by reference.

    Attributes:
        ranges: ``(begin, end)`` of each rank's elements in the flattened tensor.
        rank: This rank, in the group.

    Raises:
        TypeError, ValueError: As :class:`RaggedTensor`.
    """

    shape: tuple[int, ...]
    placement: RaggedShard
    group: dist.ProcessGroup
    ranges: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    rank: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.placement, RaggedShard):
            raise TypeError(f"placement must be a RaggedShard, got {self.placement!r}")
        world = group_of(self.group).size()
        if self.placement.world_size != world:
            raise ValueError(f"{self.placement} is for {self.placement.world_size} ranks, but the group has {world}")
        object.__setattr__(self, "shape", check_shape(self.shape))
        object.__setattr__(self, "ranges", tuple(self.placement.ranges(self.shape)))
        object.__setattr__(self, "rank", self.group.rank())

    @property
    def range(self) -> tuple[int, int]:
        """That of this rank."""
        return self.ranges[self.rank]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __deepcopy__(self, memo: object) -> Sharding:
        return self  # it holds a process group, and nothing that changes
