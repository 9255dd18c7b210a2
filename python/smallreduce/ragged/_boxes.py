"""Ranges of a flattened tensor as boxes of the tensor, by which torch.distributed.checkpoint names its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from smallreduce.ragged._placement import check_shape

__all__ = ["Box", "boxes", "flat_range"]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""``(offsets, sizes)``, one of each for every dimension."""


def boxes(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """The fewest boxes, each contiguous in the flattened tensor of ``shape``, that make up its elements from ``begin``
    to ``end``, in their order: at most ``2 * len(shape) - 1``, for a range without elements none.

    Raises:
        ValueError: The range is not one of the tensor's.
    """
    shape = check_shape(shape)
    if not 0 <= begin <= end <= math.prod(shape):
        raise ValueError(f"elements {begin} to {end} are not a range of the {math.prod(shape)} of shape {shape}")
    if not shape:
        return [((), ())] if begin < end else []
    strides = _strides(shape)
    found = []
    while begin < end:
        # A box that starts here is a run of equal slices of one dimension: each as large as the position is aligned to
        # and the rest of the range allows, and as many as the range and the dimension have left. Taking all is best,
        # since a shorter box would end where no larger slices start.
        dim = next(dim for dim, stride in enumerate(strides) if begin % stride == 0 and stride <= end - begin)
        offsets = tuple(begin // stride % size for stride, size in zip(strides, shape, strict=True))
        count = min((end - begin) // strides[dim], shape[dim] - offsets[dim])
        found.append((offsets, (*(1,) * dim, count, *shape[dim + 1 :])))
        begin += count * strides[dim]
    return found


def flat_range(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """``(begin, end)`` of a box in the flattened tensor of ``shape``: the inverse of :func:`boxes` for each of them.

    Raises:
        ValueError: It is not a box of the tensor, or its elements are not contiguous.
    """
    shape = check_shape(shape)
    if not len(offsets) == len(sizes) == len(shape) or not all(
        0 <= offset <= offset + size <= whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
    ):
        raise ValueError(f"no box of shape {shape} is at {tuple(offsets)} of sizes {tuple(sizes)}")
    begin = sum(offset * stride for offset, stride in zip(offsets, _strides(shape), strict=True))
    partial = [dim for dim, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole]
    if math.prod(sizes) and partial and any(size != 1 for size in sizes[: partial[-1]]):
        raise ValueError(f"the box at {tuple(offsets)} of sizes {tuple(sizes)} is not contiguous in shape {shape}")
    return begin, begin + math.prod(sizes)


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
