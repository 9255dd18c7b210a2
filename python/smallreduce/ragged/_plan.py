"""``smallreduce.ragged.plan``: the layout of a bucket whose equal shards cut no block."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from smallreduce.ragged._plan_picture import report
from smallreduce.ragged._plan_search import smallest_layout

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """Where each tensor begins in a bucket that is cut into equal shards, one for each rank.

    The bucket has ``world_size * shard_size`` elements, of which rank k owns those from ``k * shard_size`` on. Each
    tensor is contiguous in it, and what no tensor has is padding. A cut between shards inside a tensor is a whole
    number of the tensor's blocks away from its beginning, so that each block is on one rank; the last one of a tensor
    may be shorter than the others. ``str(plan)`` is a report with a picture of the layout.

    Args:
        world_size: Number of ranks.
        shard_size: Elements of a rank's shard, a multiple of ``align``; 0 only if all tensors are empty.
        align: What the size of a shard is a multiple of, in elements.
        tensors: ``(numel, block)`` in elements: the size of each tensor, and of its blocks.
        offsets: Of the first element of each tensor in the bucket. They need not ascend.

    Raises:
        TypeError: A value is not an integer, or a tensor not a pair of them.
        ValueError: A value out of range, or a layout that is none: tensors that overlap, that reach beyond the bucket,
            or of which a block is cut.
    """

    world_size: int
    shard_size: int
    align: int
    tensors: tuple[tuple[int, int], ...]
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # of a frozen instance
        set_field(self, "world_size", _integer(self.world_size, "world_size", 1))
        set_field(self, "align", _integer(self.align, "align", 1))
        set_field(self, "shard_size", _integer(self.shard_size, "shard_size", 0))
        set_field(self, "tensors", _pairs(self.tensors))
        set_field(self, "offsets", tuple(_integer(offset, "an offset", 0) for offset in self.offsets))
        if self.shard_size % self.align:
            raise ValueError(f"shard_size must be a multiple of align, {self.align}, got {self.shard_size}")
        if len(self.offsets) != len(self.tensors):
            raise ValueError(f"expected an offset for each of {len(self.tensors)} tensors, got {len(self.offsets)}")
        for index in range(len(self.tensors)):
            self._check_cuts(index)
        self._check_order()

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(numel for numel, _ in self.tensors)

    @property
    def padding(self) -> int:
        """Elements of the bucket that belong to no tensor."""
        return self.world_size * self.shard_size - self.numel

    @property
    def padding_share(self) -> float:
        """The part of the bucket that is padding, from 0 to 1; 0 of a bucket without elements."""
        return self.padding / max(1, self.world_size * self.shard_size)

    @property
    def imbalance(self) -> float:
        """The most elements of tensors that a rank has, over the mean of all ranks; 1 of a bucket without elements."""
        if self.numel == 0:
            return 1.0
        filled = [0] * self.world_size
        for index in range(len(self.tensors)):
            for rank, length in self.pieces(index):
                filled[rank] += length
        return max(filled) * self.world_size / self.numel

    def pieces(self, index: int) -> Iterator[tuple[int, int]]:
        """``(rank, elements)`` of a tensor on each rank that has any of it, ascending."""
        begin = self.offsets[index]
        end = begin + self.tensors[index][0]
        while begin < end:
            rank = begin // self.shard_size
            cut = min(end, (rank + 1) * self.shard_size)
            yield rank, cut - begin
            begin = cut

    def lengths(self, index: int) -> tuple[int, ...]:
        """Elements of a tensor on each rank, ``world_size`` of them: rank k's begin where those of rank k-1 end."""
        lengths = [0] * self.world_size
        for rank, length in self.pieces(index):
            lengths[rank] = length
        return tuple(lengths)

    def __str__(self) -> str:
        return report(self)

    def _check_cuts(self, index: int) -> None:
        (numel, block), begin = self.tensors[index], self.offsets[index]
        if begin + numel > self.world_size * self.shard_size:
            raise ValueError(
                f"tensor {index} has elements {begin} to {begin + numel} of a bucket of "
                f"{self.world_size * self.shard_size}"
            )
        done = 0
        for _, length in self.pieces(index):
            if done % block:
                raise ValueError(
                    f"tensor {index}, {numel} elements at {begin}, is cut after {done} of them, which is no whole "
                    f"number of blocks of {block}"
                )
            done += length

    def _check_order(self) -> None:
        end, before = 0, None
        for begin, index in sorted(
            (self.offsets[index], index) for index, (numel, _) in enumerate(self.tensors) if numel
        ):
            if begin < end:
                raise ValueError(
                    f"tensors {before} and {index} overlap: one ends at {end}, the other begins at {begin}"
                )
            end, before = begin + self.tensors[index][0], index


def plan(tensors: Sequence[tuple[int, int]], world_size: int, align: int = 1) -> Plan:
    """The layout of tensors in a bucket with the smallest shards, all of one size, that cut no block.

    Plain collectives then do for tensors whose blocks must not be cut, such as the groups of a quantizer: what is
    uneven is each tensor's part, not the shard. Finding the smallest shards is NP-hard. This is a heuristic after the
    structure-aware planner of veScale-FSDP (arXiv:2602.22437): the tensors are laid as early as may be in several
    orders, as given first, and in orders that a beam search finds; with eight tensors or fewer it tries all, and no
    layout has smaller shards. Of layouts with equally small shards the one that keeps the order as given is taken, if
    any does. The same arguments give the same plan on every rank; nothing is communicated.

    A tensor that contains whole shards makes the shard a multiple of its block, so that padding grows in steps with
    large blocks on many ranks. No layout avoids that while shards are equal and tensors contiguous.

    Args:
        tensors: ``(numel, block)`` of each, in elements: its size, 0 or more, and that of the blocks that may not be
            cut, 1 or more. A block of 1 lets a tensor be cut anywhere, one of ``numel`` nowhere. The last block may be
            shorter than the others.
        world_size: Number of ranks.
        align: What the shard shall be a multiple of, in elements. NCCL is slow on shards that are no multiple of 16
            bytes: with bf16 that is an ``align`` of 8.

    Raises:
        TypeError: A value is not an integer, or a tensor not a pair of them.
        ValueError: A value out of range.
    """
    pairs = _pairs(tensors)
    world_size, align = _integer(world_size, "world_size", 1), _integer(align, "align", 1)
    if not any(numel for numel, _ in pairs):
        return Plan(world_size, 0, align, pairs, (0,) * len(pairs))
    shard_size, offsets = smallest_layout(pairs, world_size, align)
    return Plan(world_size, shard_size, align, pairs, tuple(offsets))


def _pairs(tensors: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    pairs = []
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Sequence) or isinstance(tensor, (str, bytes)) or len(tensor) != 2:
            raise TypeError(f"tensor {index} must be a pair of its numel and its block, got {tensor!r}")
        numel, block = tensor
        pairs.append((_integer(numel, f"numel of tensor {index}", 0), _integer(block, f"block of tensor {index}", 1)))
    return tuple(pairs)


def _integer(value: object, name: str, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
