"""Where residuals lie: in the flat one that a reduce-scatter takes, and in what is kept of a parameter as a packet."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from smallreduce._layout import BLOCK, Layout
from smallreduce.codecs import IntQuant

__all__ = ["STORED", "Arrangement", "Divided", "packet_layout", "stored_nbytes"]

STORED = IntQuant(8, rounding="nearest")
"""How LoCo's residuals are kept."""


class Divided(Protocol):
    """A parameter, in the parts into which a reduce-scatter divides it: equally many elements each, padding included.

    Attributes:
        name: Of the parameter.
        shape: Of all of it.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> torch.Size: ...

    def parts(self, world_size: int) -> tuple[int, int]:
        """How many parts there are on so many ranks, and the elements of each."""

    def join(self, parts: Tensor) -> Tensor:
        """All parts, of shape (parts, elements of each), as the whole, in memory of its own."""

    def split(self, whole: Tensor, world_size: int) -> Tensor:
        """The reverse of :meth:`join`; the padding is zero."""


def _padded(numel: int) -> int:
    """Elements of so many, to the end of their last block."""
    return BLOCK * -(-numel // BLOCK)


def packet_layout(parts: int, numel: int, begin: int, distance: int) -> Layout:
    """That of one parameter's stored residual, over a flat one in which each of its parts, of ``numel`` elements,
    begins ``distance`` elements after the one before, the first at ``begin``."""
    segments = [(begin + part * distance, numel) for part in range(parts)]
    return Layout.build(segments, STORED.format, torch.float32)


class Arrangement:
    """Where the residuals of some parameters lie in a flat one, as the reduce-scatter of these sees it: part after
    part, in each parameter after parameter, each begun at a whole block.

    Attributes:
        slots: The parameters, in the order in which they lie.
        numel: Elements of the flat residual.
    """

    def __init__(self, slots: Iterable[Divided], world_size: int) -> None:
        self.slots = tuple(slots)
        self._parts = {slot.name: slot.parts(world_size) for slot in self.slots}
        counts = {count for count, _ in self._parts.values()}
        if len(counts) > 1:
            raise ValueError(f"parameters of one reduce-scatter have as many parts each, got {sorted(counts)}")
        self._count = counts.pop() if counts else 1
        self._begins: dict[str, int] = {}
        begin = 0
        for name, (_, numel) in self._parts.items():
            self._begins[name] = begin
            begin += _padded(numel)
        self._part = begin
        self.numel = self._count * begin
        self._padding = [span for slot in self.slots for span in self._padding_of(slot)]

    def _padding_of(self, slot: Divided) -> list[tuple[int, int]]:
        """Where a parameter's parts have elements that are none of its own. Only the first dimension is ever padded, so
        they are all from some place on."""
        (count, numel), first, own = self._parts[slot.name], self._begins[slot.name], slot.shape.numel()
        spans: list[tuple[int, int]] = []
        if numel == 0:
            return spans
        for part in range(own // numel, count):
            begin = first + part * self._part
            spans.append((begin + max(own - part * numel, 0), begin + numel))
        return spans

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's residual in a flat one, of shape (parts, elements of each)."""
        rows = flat.view(self._count, self._part)
        return {name: rows.narrow(1, self._begins[name], numel) for name, (_, numel) in self._parts.items()}

    def clear_padding(self, flat: Tensor) -> None:
        """Padding is not owed to anyone: what a codec leaves there (a Hadamard block spreads over it) is forgotten."""
        for begin, end in self._padding:
            flat[begin:end].zero_()

    @functools.cached_property
    def packets(self) -> dict[str, Layout]:
        """The layout of each parameter's stored residual."""
        return {
            name: packet_layout(count, numel, self._begins[name], self._part)
            for name, (count, numel) in self._parts.items()
        }


def stored_nbytes(feedback: str, slots: Sequence[Divided], world_size: int) -> int:
    """Bytes that the residuals of these parameters take on a rank.

    Args:
        feedback: ``"full"`` or ``"int8"``.
    """
    parts = [slot.parts(world_size) for slot in slots]
    if feedback == "full":
        return torch.float32.itemsize * sum(count * _padded(numel) for count, numel in parts)
    return sum(packet_layout(count, numel, 0, numel).stride for count, numel in parts)
