"""Ranges of a flattened tensor as boxes: all of them, of all small shapes, against the definition."""

from __future__ import annotations

import itertools
import math

import pytest

from smallreduce.ragged._boxes import Box, boxes, flat_range

SHAPES = [shape for dims in range(4) for shape in itertools.product(range(4), repeat=dims)]
SHAPES += [(5, 4), (2, 3, 5), (2, 2, 2, 3)]


def _elements(shape: tuple[int, ...], box: Box) -> list[int]:
    """The flat indices of a box, in the order of its own elements."""
    number = {index: flat for flat, index in enumerate(itertools.product(*map(range, shape)))}
    offsets, sizes = box
    inside = (range(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    return [number[index] for index in itertools.product(*inside)]


def _all_boxes(shape: tuple[int, ...]) -> list[Box]:
    along = [[(begin, end - begin) for begin in range(n) for end in range(begin + 1, n + 1)] for n in shape]
    return [
        (tuple(offset for offset, _ in sides), tuple(size for _, size in sides)) for sides in itertools.product(*along)
    ]


def _is_contiguous(elements: list[int]) -> bool:
    return elements == list(range(elements[0], elements[0] + len(elements)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fewest_that_tile_a_range(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    runs = [elements for box in _all_boxes(shape) if _is_contiguous(elements := _elements(shape, box))]
    for begin in range(numel + 1):
        fewest = {begin: 0}
        for end in range(begin + 1, numel + 1):
            fewest[end] = 1 + min(fewest[run[0]] for run in runs if run[-1] + 1 == end and run[0] >= begin)
        for end in range(begin, numel + 1):
            found = boxes(shape, begin, end)
            assert [one for box in found for one in _elements(shape, box)] == list(range(begin, end))
            assert len(found) == fewest[end] <= max(2 * len(shape) - 1, 1)
            position = begin
            for offsets, sizes in found:
                assert flat_range(shape, offsets, sizes) == (position, position := position + math.prod(sizes))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_box_that_is_not_contiguous_is_no_range(shape: tuple[int, ...]) -> None:
    for box in _all_boxes(shape):
        elements = _elements(shape, box)
        if _is_contiguous(elements):
            assert flat_range(shape, *box) == (elements[0], elements[-1] + 1)
        else:
            with pytest.raises(ValueError, match="is not contiguous"):
                flat_range(shape, *box)


def test_what_is_no_range_or_box() -> None:
    for begin, end in ((-1, 2), (3, 2), (0, 7)):
        with pytest.raises(ValueError, match=f"elements {begin} to {end} are not a range of the 6"):
            boxes((2, 3), begin, end)
    for offsets, sizes in (((0,), (1,)), ((0, 2), (1, 2)), ((-1, 0), (1, 1)), ((0, 0), (1, -1))):
        with pytest.raises(ValueError, match="no box of shape"):
            flat_range((2, 3), offsets, sizes)
