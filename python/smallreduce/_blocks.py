"""Blocks of flat tensors, taken out and put back: a few operations for each tensor, however many blocks there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Blocks", "put", "take"]


class Blocks(NamedTuple):
    """Some elements of a flat tensor, ascending: whole blocks by their numbers, then a slice; either may be empty.

    Attributes:
        size: Elements of a block.
        rows: int64, on the tensor's device: the numbers of the blocks; number i begins at element ``i * size``.
        offset, length: The slice.
    """

    size: int
    rows: Tensor
    offset: int
    length: int

    @classmethod
    def one_slice(cls, offset: int, length: int, device: torch.device | str) -> Blocks:
        return cls(1, torch.empty(0, dtype=torch.int64, device=device), offset, length)

    @property
    def numel(self) -> int:
        return self.rows.numel() * self.size + self.length

    def table(self, flat: Tensor) -> Tensor:
        """All whole blocks of ``flat``, one in each row."""
        whole = flat.numel() // self.size
        return flat[: whole * self.size].view(whole, self.size)

    def slice(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.offset, self.length)


def take(blocks: Sequence[Blocks], flats: Sequence[Tensor]) -> Tensor:
    """What is chosen of each of ``flats``, contiguous 1-D tensors of one dtype, one behind the other. It shares their
    memory where it is a single slice; else it is a copy."""
    parts = []
    for chosen, flat in zip(blocks, flats, strict=True):
        if chosen.rows.numel():
            parts.append(chosen.table(flat).index_select(0, chosen.rows).view(-1))
        if chosen.length:
            parts.append(chosen.slice(flat))
    return parts[0] if len(parts) == 1 else torch.cat([flats[0][:0], *parts])


def put(blocks: Sequence[Blocks], flats: Sequence[Tensor], values: Tensor) -> None:
    """Copies ``values``, of the dtype of ``flats`` and in the order in which :func:`take` gives them, to where they
    stand."""
    sizes = [size for chosen in blocks for size in (chosen.numel - chosen.length, chosen.length)]
    parts = values.split(sizes)
    for chosen, flat, rows in zip(blocks, flats, parts[::2], strict=True):
        if chosen.rows.numel():
            chosen.table(flat).index_copy_(0, chosen.rows, rows.view(-1, chosen.size))
    torch._foreach_copy_([chosen.slice(flat) for chosen, flat in zip(blocks, flats, strict=True)], list(parts[1::2]))
