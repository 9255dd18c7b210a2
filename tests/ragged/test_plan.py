"""``ragged.plan``: what a plan says of its layout, which layouts it refuses, and which arguments."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plan_definition import illegal, random_cases

from smallreduce.ragged._plan import Plan, plan


def random_tensors(generator: random.Random, count: int) -> list[tuple[int, int]]:
    """Of sizes and blocks of all magnitudes, some equal and some empty."""
    tensors = []
    for _ in range(count):
        block = generator.choice([1, 2, 3, 8, 100, 768, 1000, 1024])
        numel = generator.choice([0, 1, 7, 64, 500]) * block + generator.choice([0, 0, generator.randrange(block)])
        tensors.append((numel, block))
    return tensors


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 20, 200])
def test_every_plan_is_one(count: int, world_size: int) -> None:
    generator = random.Random(1000 * count + world_size)
    for align in (1, 8, 12):
        tensors = random_tensors(generator, count)
        made = plan(tensors, world_size, align)
        assert (made.world_size, made.align, made.tensors) == (world_size, align, tuple(tensors))
        assert illegal(made) == 0
        lengths = [made.lengths(index) for index in range(count)]
        assert [sum(of) for of in lengths] == [numel for numel, _ in tensors]
        filled = [sum(of[rank] for of in lengths) for rank in range(world_size)]
        assert len(filled) == world_size and max(filled) <= made.shard_size
        assert made.numel == sum(filled) and made.padding == world_size * made.shard_size - sum(filled)
        assert made.imbalance == (max(filled) * world_size / sum(filled) if any(filled) else 1)


def test_the_same_arguments_give_the_same_plan() -> None:
    for case in random_cases(200, seed=1, tensors=(6, 12), ranks=(2, 12)):
        made = plan(*case)
        assert plan([list(pair) for pair in case.tensors], case.world_size, case.align) == made
        assert plan([tuple(np.int64(n) for n in pair) for pair in case.tensors], *case[1:]) == made
        assert all(type(offset) is int for offset in made.offsets)


def test_lengths_are_what_the_ranks_have_of_a_tensor() -> None:
    made = Plan(4, 24, 2, tensors=((40, 8), (30, 1), (21, 6), (0, 3), (5, 5)), offsets=(0, 45, 75, 96, 40))
    assert [made.lengths(index) for index in range(5)] == [
        (24, 16, 0, 0),
        (0, 3, 24, 3),
        (0, 0, 0, 21),
        (0, 0, 0, 0),
        (0, 5, 0, 0),
    ]
    assert list(made.pieces(1)) == [(1, 3), (2, 24), (3, 3)]
    assert (made.numel, made.padding, made.padding_share, made.imbalance) == (96, 0, 0, 1)
    with pytest.raises(IndexError):
        made.lengths(5)


def test_figures_of_padding() -> None:
    made = plan([(8, 8), (4, 4)], 4)  # a block of 8 is not cut: 8 of 8, 4 of 8, and two ranks without any
    assert (made.shard_size, made.padding) == (8, 20)
    assert made.padding_share == 20 / 32 and made.imbalance == 8 / (12 / 4)


def test_nothing_to_lay() -> None:
    for tensors in ([], [(0, 5)], [(0, 1), (0, 2)]):
        made = plan(tensors, 3, 4)
        assert (made.shard_size, made.offsets) == (0, (0,) * len(tensors))
        assert (made.padding, made.padding_share, made.imbalance) == (0, 0, 1)
        assert [made.lengths(index) for index in range(len(tensors))] == [(0, 0, 0)] * len(tensors)


def test_one_rank_has_all_in_the_order_given() -> None:
    assert plan([(5, 5), (0, 1), (7, 2), (1, 9)], 1, 8) == Plan(
        1, 16, 8, ((5, 5), (0, 1), (7, 2), (1, 9)), (0, 5, 5, 12)
    )


def test_single_elements_are_cut_anywhere() -> None:
    made = plan([(5, 1), (6, 1), (1, 1)], 4)
    assert (made.shard_size, made.padding, made.offsets) == (3, 0, (0, 5, 11))


def test_the_short_last_block_is_not_cut() -> None:
    # 11 elements in blocks of 4, the last of 3: 4 + 4 + 3, and no cut after 9 or 10.
    made = plan([(11, 4)], 3)
    assert (made.shard_size, made.lengths(0)) == (4, (4, 4, 3))
    # Padding before it makes two ranks of 7 do, where 8 would be needed without.
    made = plan([(11, 4)], 2)
    assert (made.shard_size, made.offsets, made.lengths(0)) == (7, (3,), (4, 7))


def test_a_tensor_that_contains_a_shard_makes_its_block_divide_it() -> None:
    # 9.1 elements a rank would do, but the first tensor contains a shard, whichever that is.
    made = plan([(50, 10), (3, 1)], 6)
    assert made.shard_size == 10
    # Of two such tensors, both blocks.
    assert plan([(120, 4), (120, 6)], 20).shard_size == 12
    assert plan([(120, 4), (120, 6)], 21).shard_size == 12


def test_padding_lies_between_tensors_and_at_the_end() -> None:
    # The first ends inside a shard, and the cut after it must be a whole number of blocks of 3 from where the second
    # begins: an element of padding before it, and two in the end.
    made = plan([(6, 2), (9, 3)], 3, 2)
    assert (made.shard_size, made.offsets) == (6, (0, 6))
    made = plan([(7, 1), (9, 3)], 3, 6)
    assert (made.shard_size, made.offsets, made.padding) == (6, (0, 9), 2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([(4, 2)], 0), ValueError, "world_size must be at least 1, got 0"),
        (([(4, 2)], 2, 0), ValueError, "align must be at least 1, got 0"),
        (([(4, 2)], 2, -8), ValueError, "align must be at least 1, got -8"),
        (([(4, 2), (-1, 2)], 2), ValueError, "numel of tensor 1 must be at least 0, got -1"),
        (([(4, 0)], 2), ValueError, "block of tensor 0 must be at least 1, got 0"),
        (([(4, 2)], 2.0), TypeError, "world_size must be an int, got float"),
        (([(4, 2)], True), TypeError, "world_size must be an int, got bool"),
        (([(4, 2)], 2, "8"), TypeError, "align must be an int, got str"),
        (([(4, 2), (4, 2.0)], 2), TypeError, "block of tensor 1 must be an int, got float"),
        (([(None, 2)], 2), TypeError, "numel of tensor 0 must be an int, got NoneType"),
        (([(4, 2), 4], 2), TypeError, "tensor 1 must be a pair of its numel and its block, got 4"),
        (([(4, 2, 1)], 2), TypeError, r"tensor 0 must be a pair of its numel and its block, got \(4, 2, 1\)"),
        ((["42"], 2), TypeError, "tensor 0 must be a pair of its numel and its block, got '42'"),
    ],
)
def test_arguments_that_are_none(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        plan(*arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"offsets": (0, 6)}, ValueError, "tensors 0 and 1 overlap: one ends at 8, the other begins at 6"),
        ({"offsets": (0, 13)}, ValueError, "tensor 1 has elements 13 to 19 of a bucket of 18"),
        (
            {"offsets": (1, 12)},
            ValueError,
            "tensor 0, 8 elements at 1, is cut after 5 of them, which is no whole number of blocks of 2",
        ),
        (
            {"offsets": (0, 9)},
            ValueError,
            "tensor 1, 6 elements at 9, is cut after 3 of them, which is no whole number of blocks of 6",
        ),
        ({"offsets": (0,)}, ValueError, "expected an offset for each of 2 tensors, got 1"),
        ({"offsets": (-1, 12)}, ValueError, "an offset must be at least 0, got -1"),
        ({"offsets": (0, 12.0)}, TypeError, "an offset must be an int, got float"),
        ({"shard_size": 7}, ValueError, "shard_size must be a multiple of align, 3, got 7"),
        ({"shard_size": -6}, ValueError, "shard_size must be at least 0, got -6"),
        ({"shard_size": 0}, ValueError, "tensor 0 has elements 0 to 8 of a bucket of 0"),
        ({"tensors": ((8, 2), (6, 0))}, ValueError, "block of tensor 1 must be at least 1, got 0"),
    ],
)
def test_a_plan_is_a_legal_layout(change: dict[str, Any], error: type[Exception], message: str) -> None:
    legal = {"world_size": 3, "shard_size": 6, "align": 3, "tensors": ((8, 2), (6, 6)), "offsets": (0, 12)}
    assert illegal(Plan(**legal)) == 0
    with pytest.raises(error, match=f"^{message}$"):
        Plan(**legal | change)


def test_a_plan_is_refused_where_the_definition_refuses_it() -> None:
    """Random layouts, about half of them legal."""
    generator, refused = random.Random(0), 0
    for _ in range(2000):
        world_size, shard_size = generator.randint(1, 4), generator.randint(1, 8)
        tensors = tuple((generator.randint(0, 9), generator.randint(1, 4)) for _ in range(2))
        offsets = tuple(generator.randint(0, world_size * shard_size) for _ in range(2))
        layout = {
            "world_size": world_size,
            "shard_size": shard_size,
            "tensors": tensors,
            "offsets": offsets,
            "align": 1,
        }
        if illegal(SimpleNamespace(**layout)):
            refused += 1
            with pytest.raises(ValueError):
                Plan(**layout)
        else:
            Plan(**layout)
    assert 200 < refused < 1800
