"""RaggedShard: which elements a rank owns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest

from smallreduce.ragged._placement import RaggedShard

SHAPES = [shape for dims in range(4) for shape in itertools.product(range(4), repeat=dims)]


def _splits(numel: int, world: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations_with_replacement(range(numel + 1), world - 1):
        edges = (0, *cuts, numel)
        yield tuple(edges[r + 1] - edges[r] for r in range(world))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_from_lengths_and_back(world: int) -> None:
    for shape in SHAPES:
        numel = math.prod(shape)
        for lengths in _splits(numel, world):
            placement = RaggedShard.from_lengths(shape, lengths)
            ranges = placement.ranges(shape)
            assert [end - begin for begin, end in ranges] == list(lengths), (shape, lengths)
            assert ranges == [placement.range(shape, rank) for rank in range(world)]
            assert ranges[0][0] == 0 and ranges[-1][1] == numel
            assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
            if numel:
                assert math.gcd(*placement.local_units) == 1
            if placement.dims:  # fewer would cut a block
                with pytest.raises(ValueError, match="cuts a block"):
                    RaggedShard(placement.dims[:-1], placement.local_units).ranges(shape)


def test_units_are_shares() -> None:
    placement = RaggedShard((0,), (1, 2, 1, 1))
    assert placement.ranges((10, 4)) == [(0, 8), (8, 24), (24, 32), (32, 40)]
    assert placement.ranges((5,)) == [(0, 1), (1, 3), (3, 4), (4, 5)]
    assert placement.world_size == 4
    assert RaggedShard((0, 1), (0, 3, 1)).ranges((2, 4, 3)) == [(0, 0), (0, 18), (18, 24)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_root_has_all(shape: tuple[int, ...]) -> None:
    ranges = RaggedShard.on_root(1, 3).ranges(shape)
    assert [end - begin for begin, end in ranges] == [0, math.prod(shape), 0]
    if math.prod(shape):
        assert RaggedShard.from_lengths(shape, [0, math.prod(shape), 0]) == RaggedShard.on_root(1, 3)


def test_placements_are_values() -> None:
    assert RaggedShard((0,), (1, 2)) == RaggedShard((0,), (1, 2)) != RaggedShard((0,), (2, 4))
    assert len({RaggedShard((0,), (1, 2)), RaggedShard((0,), (1, 2)), RaggedShard((), (0, 1))}) == 2


@pytest.mark.parametrize(
    "dims, units, error, message",
    [
        ((1,), (1, 1), ValueError, r"leading dimensions, .* got \(1,\)"),
        ((0, 2), (1, 1), ValueError, "leading dimensions"),
        ((1, 0), (1, 1), ValueError, "leading dimensions"),
        ((0,), (), ValueError, r"local_units must be at least 0, .* got \(\)"),
        ((0,), (0, 0), ValueError, "one above it"),
        ((0,), (2, -1), ValueError, "at least 0"),
        ([0], (1, 1), TypeError, r"dims must be a tuple of integers, got \[0\]"),
        ((0,), [1, 1], TypeError, "local_units must be a tuple of integers"),
        ((0,), (1.0, 1), TypeError, "local_units must be a tuple of integers"),
        ((0,), (True, 1), TypeError, "local_units must be a tuple of integers"),
    ],
)
def test_what_is_no_placement(dims: object, units: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RaggedShard(dims, units)  # type: ignore[arg-type]


def test_what_does_not_fit_a_shape() -> None:
    with pytest.raises(ValueError, match=r"the 7 elements of shape .* do not divide into the 2 units"):
        RaggedShard((0,), (1, 1)).ranges((7,))
    with pytest.raises(ValueError, match=r"rank 0 6 elements of shape .* cuts a block of 4"):
        RaggedShard((0,), (1, 1)).ranges((3, 4))
    with pytest.raises(ValueError, match=r"cuts 2 dimensions, but a tensor of shape .* has 1"):
        RaggedShard((0, 1), (1, 1)).ranges((4,))
    with pytest.raises(ValueError, match="sizes of at least 0"):
        RaggedShard((0,), (1, 1)).ranges((-4,))
    with pytest.raises(TypeError, match="shape must be a sequence of integers, got 4"):
        RaggedShard((0,), (1, 1)).ranges(4)  # type: ignore[arg-type]
    for lengths in ([1, 2], [5, -1], []):
        with pytest.raises(ValueError, match="add up to the 4 elements of shape"):
            RaggedShard.from_lengths((2, 2), lengths)
    for root in (-1, 3):
        with pytest.raises(ValueError, match=f"from 0 to 2, got {root}"):
            RaggedShard.on_root(root, 3)
