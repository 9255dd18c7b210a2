"""A plan in plain text: its figures, its tensors, and a picture of the shards."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smallreduce.ragged._plan import Plan

__all__ = ["report"]

_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_COLUMNS = 64
_ROWS = 16
_PIECES = 4


def report(plan: Plan) -> str:
    """The plan's figures; a row for each rank, in which letters stand for tensors and dots for padding; a line for each
    tensor. Of more ranks or tensors than 16 only some."""
    tensors, ranks = _count(len(plan.tensors), "tensor"), _count(plan.world_size, "rank")
    figures = (
        f"{tensors}, {plan.numel:,} elements, on {ranks}: shards of {plan.shard_size:,}, a multiple of {plan.align:,}\n"
        f"padding: {plan.padding:,} elements, {plan.padding_share:.2%} of the bucket; "
        f"the fullest rank has {plan.imbalance:.3f} times the mean"
    )
    parts = [figures]
    if plan.shard_size:
        parts.append(_picture(plan))
    if plan.tensors:
        parts.append(_legend(plan))
    return "\n\n".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _letter(index: int) -> str:
    return _LETTERS[index % len(_LETTERS)]


def _shown(count: int) -> Sequence[int]:
    """All of a few, else the first and the last."""
    return range(count) if count <= _ROWS else [*range(_ROWS - 4), *range(count - 4, count)]


def _picture(plan: Plan) -> str:
    columns = min(_COLUMNS, plan.shard_size)
    spans = sorted(
        (begin, begin + numel, index)
        for index, (begin, (numel, _)) in enumerate(zip(plan.offsets, plan.tensors, strict=True))
        if numel
    )
    width = len(str(plan.world_size - 1))
    lines, last = [], -1
    for rank in _shown(plan.world_size):
        if rank != last + 1:
            lines.append(f"{'...':>{width + 5}}")
        last = rank
        edges = [rank * plan.shard_size + column * plan.shard_size // columns for column in range(columns + 1)]
        inside = [span for span in spans if span[0] < edges[-1] and span[1] > edges[0]]
        cells = (_cell(begin, end, inside) for begin, end in itertools.pairwise(edges))
        lines.append(f"rank {rank:>{width}}  {''.join(cells)}")
    if columns < plan.shard_size:
        lines.append(f"{'':{width + 7}}one letter: {plan.shard_size / columns:,.1f} elements")
    return "\n".join(lines)


def _cell(begin: int, end: int, spans: Sequence[tuple[int, int, int]]) -> str:
    """What has the most of a range of elements."""
    lengths = {index: max(0, min(end, until) - max(begin, since)) for since, until, index in spans}
    padding = end - begin - sum(lengths.values())
    index = max(lengths, key=lengths.__getitem__, default=None)
    return "." if index is None or lengths[index] < padding else _letter(index)


def _legend(plan: Plan) -> str:
    header = ("", "numel", "block", "offset", "on ranks")
    rows = []
    for index in range(min(len(plan.tensors), _ROWS)):
        numel, block = plan.tensors[index]
        rows.append((_letter(index), f"{numel:,}", f"{block:,}", f"{plan.offsets[index]:,}", _pieces(plan, index)))
    _, *widths, _ = (max(map(len, column)) for column in zip(header, *rows, strict=True))
    lines = []
    for letter, *figures, pieces in (header, *rows):
        aligned = (cell.rjust(width) for cell, width in zip(figures, widths, strict=True))
        lines.append("  ".join([letter or " ", *aligned, pieces]))
    if len(plan.tensors) > len(rows):
        lines.append(f"and {_count(len(plan.tensors) - len(rows), 'more tensor')}")
    return "\n".join(lines)


def _pieces(plan: Plan, index: int) -> str:
    pieces = list(plan.pieces(index))
    if not pieces:
        return "none"
    first, last = pieces[0][0], pieces[-1][0]
    ranks = f"{first}" if first == last else f"{first}-{last}"
    lengths = [f"{length:,}" for _, length in pieces]
    if len(lengths) > _PIECES:
        lengths = [*lengths[:2], "...", lengths[-1]]
    return f"{ranks}: {' + '.join(lengths)}"
