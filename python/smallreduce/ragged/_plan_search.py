"""The smallest shards for which a layout is found."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

from smallreduce.ragged._plan_layouts import Kind, Tensors, beam_search, in_order, kinds_of

__all__ = ["smallest_layout"]

_Layout = Callable[[int, int], "list[int] | None"]
"""Offsets of the tensors for a shard size and a grid that divides it, or None: see :func:`in_order`."""

_STEPS = 1 << 15
"""That a beam search may try, about: some 20 ms. With eight tensors it tries every order."""


def smallest_layout(tensors: Tensors, world_size: int, align: int) -> tuple[int, list[int]]:
    """The shard size, a multiple of ``align``, and the offsets of the tensors, of which one at least is not empty.

    The block of a tensor that contains a whole shard must divide the shard. Once it is settled which tensors may, by a
    grid that divides the shard, tensors that fit in some order into shards of one size fit into larger ones, too, and
    the smallest is found by bisection. Where several layouts have the smallest shards the first stands: the order as
    given is tried before any other.
    """
    kinds = kinds_of(tensors)
    numel = sum(numel for numel, _ in tensors)
    least = _multiple(align, -(-numel // world_size))
    grids = sorted((_least_on(grid, kinds, least), grid) for grid in _grids(kinds, least, align))
    shard_size = _multiple(align, numel)
    offsets = in_order(tensors, range(len(tensors)), world_size, shard_size, align)
    assert offsets is not None, "the first shard has room for all"
    for layout in _layouts(tensors, kinds, world_size):
        for first, grid in grids:
            if first >= shard_size:
                break
            found = _smallest_on(grid, layout, first, shard_size)
            if found is not None:
                shard_size, offsets = found
    return shard_size, offsets


def _multiple(grid: int, numel: int) -> int:
    """The least multiple of ``grid`` that is not below ``numel``."""
    return -(-numel // grid) * grid


def _grids(kinds: Sequence[Kind], least: int, align: int) -> set[int]:
    """What shards of ``least`` elements or more may have to be multiples of: ``align``, and the blocks of any choice
    of tensors that can contain one. Where those are too many, of the largest few, and of those larger than each."""
    count = sum(len(kind.indices) for kind in kinds)
    numel = sum(kind.numel * len(kind.indices) for kind in kinds)
    most = max(32, 2048 // count)  # with eight tensors all choices
    grids, of_larger = {align}, align
    for kind in kinds:
        if kind.numel <= least:
            break
        of_larger = math.lcm(of_larger, kind.block)
        every = {*grids, *(math.lcm(grid, kind.block) for grid in grids)}
        more = every if len(every) <= most else {*grids, of_larger, least}
        grids = {grid for grid in more if grid < align + numel}  # larger shards are never needed
    return grids


def _least_on(grid: int, kinds: Sequence[Kind], least: int) -> int:
    """The least multiple of ``grid``, from ``least`` on, that leaves room for the largest block and for half of each
    tensor that may not contain a shard."""
    for kind in kinds:
        least = max(least, min(kind.numel, kind.block))
        if grid % kind.block:
            least = max(least, -(-kind.numel // 2))
    return _multiple(grid, least)


def _layouts(tensors: Tensors, kinds: Sequence[Kind], world_size: int) -> Iterator[_Layout]:
    indices = range(len(tensors))
    orders = [
        list(indices),
        sorted(indices, key=lambda index: tensors[index][1], reverse=True),
        sorted(indices, key=lambda index: tensors[index], reverse=True),
    ]
    for order in orders:
        yield functools.partial(in_order, tensors, order, world_size)
    lookahead = max(1, _STEPS // len(tensors))
    width = max(1, lookahead // len(kinds))
    yield functools.partial(beam_search, kinds, world_size, width=width, lookahead=lookahead)


def _smallest_on(grid: int, layout: _Layout, first: int, below: int) -> tuple[int, list[int]] | None:
    """The smallest shards with a layout, multiples of ``grid`` from ``first`` on, if any is smaller than ``below``."""
    high = (below - 1) // grid * grid
    found = layout(high, grid)
    if found is None:
        return None
    low, probe, step = first, first, grid
    # The smallest are most often close to the first.
    while probe < high:
        offsets = layout(probe, grid)
        if offsets is not None:
            high, found = probe, offsets
            break
        low, probe, step = probe + grid, probe + step, 2 * step
    while low < high:
        middle = low + (high - low) // grid // 2 * grid
        offsets = layout(middle, grid)
        if offsets is not None:
            high, found = middle, offsets
        else:
            low = middle + grid
    return high, found
