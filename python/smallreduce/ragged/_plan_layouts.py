"""Layouts for a given shard size: where each tensor begins, so that no cut between shards divides a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Kind", "Tensors", "beam_search", "earliest", "in_order", "kinds_of"]

Tensors = Sequence[tuple[int, int]]
"""``(numel, block)`` of each tensor."""


class Kind(NamedTuple):
    """Equal tensors, which may take each other's places."""

    numel: int
    block: int
    indices: tuple[int, ...]


def kinds_of(tensors: Tensors) -> list[Kind]:
    """The largest first: a small one fits into what they leave, not the other way round."""
    indices: dict[tuple[int, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        indices.setdefault(tensor, []).append(index)
    return [Kind(numel, block, tuple(indices[numel, block])) for numel, block in sorted(indices, reverse=True)]


def earliest(position: int, numel: int, block: int, shard_size: int, whole: bool) -> int | None:
    """The first offset from ``position`` on where a tensor may begin; None: there is none, however long the bucket.

    Args:
        whole: Whether it may contain a whole shard. ``shard_size`` is then a multiple of ``block``.
    """
    cut = position - position % shard_size + shard_size
    if position + numel <= cut:
        return position
    start = cut - (cut - position) // block * block
    if whole or start + numel <= cut + shard_size:
        return start
    if numel <= shard_size:
        return cut
    # It spans the next cut instead, or none ever: all shards are alike from their beginning on.
    start = cut + shard_size - shard_size // block * block
    return start if start + numel <= cut + 2 * shard_size else None


def in_order(tensors: Tensors, order: Sequence[int], world_size: int, shard_size: int, grid: int) -> list[int] | None:
    """Offsets of the tensors, each laid behind the one before it in ``order``, as early as may be; None: they do not
    fit. No layout in that order ends earlier, and they fit into larger shards, too, of the same ``grid``.

    Args:
        order: Indices of the tensors.
        grid: A divisor of ``shard_size``. Tensors whose blocks divide it may contain whole shards.
    """
    padding = world_size * shard_size - sum(numel for numel, _ in tensors)
    offsets = [0] * len(tensors)
    position = 0
    for index in order:
        numel, block = tensors[index]
        start = earliest(position, numel, block, shard_size, grid % block == 0)
        if start is None:
            return None
        padding -= start - position
        if padding < 0:
            return None
        offsets[index] = start
        position = start + numel
    return offsets


_Path = tuple[int, int, "_Path"] | None


class _State(NamedTuple):
    """A choice of tensors, laid in the order in which they take the least padding.

    Attributes:
        position: Where they end.
        padding: What lies between them.
        left: Numbers of the kinds of which there are tensors left.
        path: Kind and offset of the last one, and the path before it.
    """

    position: int
    padding: int
    left: tuple[int, ...]
    path: _Path


def beam_search(
    kinds: Sequence[Kind], world_size: int, shard_size: int, grid: int, width: int, lookahead: int
) -> list[int] | None:
    """Offsets of the tensors in an order of its own; None: it found none that fits.

    Tensor by tensor it keeps the ``width`` choices of what to lay first that take the least padding. Where there are no
    more choices than that, and no more kinds than ``lookahead``, no order is better than the one that it finds.

    Args:
        grid: As for :func:`in_order`.
        lookahead: How many kinds it tries next, the largest of which tensors are left.
    """
    count = sum(len(kind.indices) for kind in kinds)
    most = world_size * shard_size - sum(kind.numel * len(kind.indices) for kind in kinds)
    whole = [grid % kind.block == 0 for kind in kinds]
    # A choice is the number of tensors of each kind, as the digits of one integer.
    units, chosen = [], 1
    for kind in kinds:
        units.append(chosen)
        chosen *= len(kind.indices) + 1
    states = {0: _State(0, 0, tuple(range(len(kinds))), None)}
    for _ in range(count):
        steps = []
        for choice, (position, padding, left, _) in states.items():
            for number in left[:lookahead]:
                numel, block, _ = kinds[number]
                start = earliest(position, numel, block, shard_size, whole[number])
                if start is not None and padding + start - position <= most:
                    steps.append((padding + start - position, start, number, choice))
        steps.sort(key=lambda step: step[0])
        following: dict[int, _State] = {}
        for padding, start, number, choice in steps:
            kind, unit = kinds[number], units[number]
            if choice + unit in following:
                continue  # the same tensors with less padding
            before = states[choice]
            left = before.left
            if choice // unit % (len(kind.indices) + 1) == len(kind.indices) - 1:
                place = left.index(number)
                left = left[:place] + left[place + 1 :]
            following[choice + unit] = _State(start + kind.numel, padding, left, (number, start, before.path))
            if len(following) == width:
                break
        if not following:
            return None
        states = following
    return _offsets(kinds, next(iter(states.values())).path)


def _offsets(kinds: Sequence[Kind], path: _Path) -> list[int]:
    offsets = [0] * sum(len(kind.indices) for kind in kinds)
    indices = [list(kind.indices) for kind in kinds]
    while path is not None:
        number, start, path = path
        offsets[indices[number].pop()] = start
    return offsets
