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
        rank: This rank, in the group.
        range: ``(begin, end)`` of its elements in the flattened tensor.

    Raises:
        TypeError, ValueError: As :class:`RaggedTensor`.
    """

    shape: tuple[int, ...]
    placement: RaggedShard
    group: dist.ProcessGroup
    rank: int = field(init=False, repr=False, compare=False)
    range: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.placement, RaggedShard):
            raise TypeError(f"placement must be a RaggedShard, got {self.placement!r}")
        world = group_of(self.group).size()
        if self.placement.world_size != world:
            raise ValueError(f"{self.placement} is for {self.placement.world_size} ranks, but the group has {world}")
        object.__setattr__(self, "shape", check_shape(self.shape))
        object.__setattr__(self, "rank", self.group.rank())
        object.__setattr__(self, "range", self.placement.range(self.shape, self.rank))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __deepcopy__(self, memo: object) -> Sharding:
        return self  # it holds a process group, and nothing that changes
