"""Where gradients lie in the buffer that is reduced: a part for each rank, with what that rank owns of each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smallreduce.collectives._engine import PerRank
from smallreduce.ragged._plan import Plan

__all__ = ["Packing"]


class _Piece(NamedTuple):
    """What one rank owns of one tensor."""

    rank: int
    begin: int  # in the tensor
    offset: int  # in the rank's part
    length: int


class Packing:
    """Some of the tensors of a plan. All of them lie where the plan has them, each in one piece; of fewer, a part has
    those pieces alone, one after the other, so that what has no gradient does not travel.

    Args:
        plan: Of the bucket.
        members: Numbers of tensors in the plan.

    Attributes:
        part: Elements of a part, as many for every rank.
    """

    def __init__(self, plan: Plan, members: Sequence[int]) -> None:
        self._plan = plan
        self._members = tuple(members)
        self._is_whole = len(self._members) == len(plan.tensors)
        self._pieces = self._place()
        self.part = plan.shard_size
        if not self._is_whole:
            longest = max(
                (piece.offset + piece.length for pieces in self._pieces.values() for piece in pieces), default=0
            )
            self.part = plan.align * -(-longest // plan.align)

    def _place(self) -> dict[int, list[_Piece]]:
        plan, ends = self._plan, [0] * self._plan.world_size
        placed: dict[int, list[_Piece]] = {}
        for member in sorted(self._members, key=plan.offsets.__getitem__):
            begin, placed[member] = 0, []
            for rank, length in plan.pieces(member):
                inside = plan.offsets[member] + begin - rank * plan.shard_size
                placed[member].append(_Piece(rank, begin, inside if self._is_whole else ends[rank], length))
                ends[rank] += length
                begin += length
        return placed

    @functools.cached_property
    def segments(self) -> PerRank:
        """Of every rank's part, in the order in which they lie."""
        of: list[list[tuple[int, int]]] = [[] for _ in range(self._plan.world_size)]
        for pieces in self._pieces.values():
            for piece in pieces:
                of[piece.rank].append((piece.offset, piece.length))
        return PerRank(tuple(tuple(sorted(part)) or ((0, 0),) for part in of))

    def pack(self, tensors: Sequence[Tensor], buffer: Tensor) -> None:
        """Copies the members' tensors, in the order of ``members``, into the flat buffer, in its dtype."""
        targets, sources = [], []
        for member, tensor in zip(self._members, tensors, strict=True):
            if self._is_whole:
                begin = self._plan.offsets[member]
                targets.append(buffer[begin : begin + tensor.numel()].view(tensor.shape))
                sources.append(tensor)
                continue
            flat = tensor.reshape(-1)
            for piece in self._pieces[member]:
                begin = piece.rank * self.part + piece.offset
                targets.append(buffer[begin : begin + piece.length])
                sources.append(flat[piece.begin : piece.begin + piece.length])
        if targets:
            torch._foreach_copy_(targets, sources)

    def local(self, member: int, rank: int, part: Tensor) -> Tensor:
        """What the rank owns of a member, 1-D: a view of its part."""
        for piece in self._pieces[member]:
            if piece.rank == rank:
                return part[piece.offset : piece.offset + piece.length]
        return part[:0]
