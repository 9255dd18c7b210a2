"""``RaggedShard``: how a tensor lies on the ranks of a group, each of which may own any share of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

__all__ = ["RaggedShard", "check_shape"]


@dataclass(frozen=True)
class RaggedShard:
    """Each rank owns a contiguous range of the flattened tensor, in the order of the ranks.

    The placement of veScale-FSDP (arXiv:2602.22437): two freedoms that ``Shard(0)`` has not. The tensor may be cut at
    any granularity, ``prod(shape[len(dims):])`` elements, and the ranks' shares may differ, down to none. An even
    ``Shard(0)`` is ``RaggedShard((0,), (1,) * W)``; a whole tensor on one rank is :meth:`on_root`.

    A placement is meant for tensors of different shapes: which ranges of a tensor it names, :meth:`ranges` tells, and
    refuses one that it does not fit.

    Args:
        dims: The leading dimensions that are cut, flattened together: ``(0, ..., i - 1)``. None, ``()``: the tensor is
            one block, which one rank owns.
        local_units: The share of each rank relative to the others', at least 0; one for each rank of the group.

    Raises:
        TypeError: ``dims`` or ``local_units`` is not a tuple of integers.
        ValueError: ``dims`` are not leading dimensions, a share is negative, or there is none.
    """

    dims: tuple[int, ...]
    local_units: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values in (("dims", self.dims), ("local_units", self.local_units)):
            if not isinstance(values, tuple) or not all(type(value) is int for value in values):
                raise TypeError(f"{name} must be a tuple of integers, got {values!r}")
        if self.dims != tuple(range(len(self.dims))):
            raise ValueError(f"dims must be leading dimensions, (0, ..., i - 1), got {self.dims}")
        if min(self.local_units, default=-1) < 0 or not any(self.local_units):
            raise ValueError(f"local_units must be at least 0, and one above it, got {self.local_units}")

    @property
    def world_size(self) -> int:
        return len(self.local_units)

    @classmethod
    def on_root(cls, root: int, world_size: int) -> RaggedShard:
        """The whole tensor, of any shape, on one of ``world_size`` ranks.

        Raises:
            ValueError: ``root`` is not one of the ranks.
        """
        if not 0 <= root < world_size:
            raise ValueError(f"root must be a rank from 0 to {world_size - 1}, got {root}")
        return cls((), tuple(int(rank == root) for rank in range(world_size)))

    @classmethod
    def from_lengths(cls, shape: Sequence[int], lengths: Sequence[int]) -> RaggedShard:
        """The placement under which rank r owns ``lengths[r]`` elements of a tensor of ``shape``, with the smallest
        units and the fewest dimensions that allow it. Of a tensor without elements the shares are equal.

        Raises:
            ValueError: A length is negative, or they do not add up to the elements of the tensor.
        """
        shape = check_shape(shape)
        numel = math.prod(shape)
        if not lengths or min(lengths) < 0 or sum(lengths) != numel:
            raise ValueError(
                f"lengths must be at least 0 and add up to the {numel} elements of shape {shape}, got {tuple(lengths)}"
            )
        if numel == 0:
            return cls((), (1,) * len(lengths))
        common = math.gcd(*lengths)
        cut = next(cut for cut in range(len(shape) + 1) if common % math.prod(shape[cut:]) == 0)
        return cls(tuple(range(cut)), tuple(length // common for length in lengths))

    def ranges(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """``(begin, end)`` of each rank's elements in the flattened tensor of ``shape``, in the order of the ranks.

        Raises:
            ValueError: The elements cannot be shared out so, or a block would be cut.
        """
        unit = self._unit(check_shape(shape))
        ends = [unit * units for units in accumulate(self.local_units)]
        return list(zip([0, *ends], ends, strict=False))

    def range(self, shape: Sequence[int], rank: int) -> tuple[int, int]:
        """That of one rank."""
        begin = sum(self.local_units[:rank])
        unit = self._unit(check_shape(shape))
        return unit * begin, unit * (begin + self.local_units[rank])

    def _unit(self, shape: tuple[int, ...]) -> int:
        """Elements of one of ``local_units``."""
        if len(self.dims) > len(shape):
            raise ValueError(f"{self} cuts {len(self.dims)} dimensions, but a tensor of shape {shape} has {len(shape)}")
        numel, total = math.prod(shape), sum(self.local_units)
        if numel % total:
            raise ValueError(f"the {numel} elements of shape {shape} do not divide into the {total} units of {self}")
        unit = numel // total
        block = math.prod(shape[len(self.dims) :])
        if numel and unit * math.gcd(*self.local_units) % block:
            rank = next(rank for rank, units in enumerate(self.local_units) if unit * units % block)
            raise ValueError(
                f"{self} gives rank {rank} {unit * self.local_units[rank]} elements of shape {shape}, which cuts a "
                f"block of {block} (the dimensions after the first {len(self.dims)}); cut more dimensions or choose "
                "other units"
            )
        return unit


def check_shape(shape: Sequence[int] | Any) -> tuple[int, ...]:
    """``shape`` as a tuple.

    Raises:
        TypeError: It is not a sequence of integers.
        ValueError: A size is negative.
    """
    if not isinstance(shape, Sequence) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"shape must be a sequence of integers, got {shape!r}")
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape has sizes of at least 0, got {tuple(shape)}")
    return tuple(shape)
