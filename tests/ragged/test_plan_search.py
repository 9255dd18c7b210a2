"""The shards of a plan are the smallest there are, and why the search may go about it as it does."""

from __future__ import annotations

import itertools
import random

import pytest
from plan_definition import Case, brute_force, illegal, is_legal, lower_bound, random_cases

from smallreduce.ragged._plan import plan
from smallreduce.ragged._plan_layouts import beam_search, earliest, in_order, kinds_of


def test_the_shards_of_small_plans_are_the_smallest() -> None:
    """On all of ten thousand, of which many have no layout in equal parts."""
    beyond = 0
    for case in random_cases(10000, seed=0):
        made, best = plan(*case), brute_force(case)
        assert illegal(made) == 0
        assert made.shard_size == best, case
        beyond += best - case.align >= made.numel / case.world_size
    assert beyond > 2000


def test_up_to_eight_tensors_all_orders_are_tried() -> None:
    for case in random_cases(60, seed=3, tensors=(6, 8), ranks=(4, 16)):
        assert plan(*case).shard_size == brute_force(case), case


def test_the_shards_of_larger_plans_are_seldom_larger_than_the_smallest() -> None:
    """More orders than are tried: at least 95 % of the plans have the smallest shards, and none has twice them."""
    cases, smallest = list(random_cases(40, seed=2, tensors=(10, 11), ranks=(8, 24))), 0
    for case in cases:
        made, best = plan(*case), brute_force(case)
        assert illegal(made) == 0
        assert best <= made.shard_size < 2 * best, case
        smallest += made.shard_size == best
    assert smallest >= 0.95 * len(cases)


def test_brute_force_is_right() -> None:
    """Against all offsets of all tensors."""
    cases = random.Random(0)
    for _ in range(150):
        tensors = tuple((cases.randint(0, 6), cases.randint(1, 4)) for _ in range(cases.randint(1, 3)))
        case = Case(tensors, cases.randint(1, 3), cases.randint(1, 2))

        def has_layout(shard_size: int, case: Case = case) -> bool:
            for offsets in itertools.product(range(case.world_size * shard_size + 1), repeat=len(case.tensors)):
                placed = list(zip(case.tensors, offsets, strict=True))
                if not all(is_legal(tensor, at, shard_size, case.world_size) for tensor, at in placed):
                    continue
                elements = [element for (numel, _), at in placed for element in range(at, at + numel)]
                if len(elements) == len(set(elements)):
                    return True
            return False

        sizes = range(0, brute_force(case) + 1, case.align)
        assert [has_layout(size) for size in sizes] == [False] * (len(sizes) - 1) + [True], case


def test_the_bound_is_one() -> None:
    reached = 0
    for case in random_cases(2000, seed=4):
        best = brute_force(case)
        assert lower_bound(case) <= best, case
        reached += lower_bound(case) == best
    assert reached > 1000


@pytest.mark.parametrize("shard_size", range(1, 9))
def test_the_earliest_offset(shard_size: int) -> None:
    ranks = 8  # enough for what spans the most shards, beginning in the third
    for numel, block, position in itertools.product(range(2 * shard_size + 8), range(1, 7), range(shard_size + 1)):
        for whole in {False, shard_size % block == 0}:

            def may_begin(at: int, numel: int = numel, block: int = block, whole: bool = whole) -> bool:
                cuts = sum(at < cut * shard_size < at + numel for cut in range(1, ranks))
                return is_legal((numel, block), at, shard_size, ranks) and (whole or cuts < 2)

            if -(-numel // shard_size) + 3 > ranks:
                continue
            expected = next((at for at in range(position, 3 * shard_size) if may_begin(at)), None)
            assert earliest(position, numel, block, shard_size, whole) == expected


def test_what_fits_in_an_order_fits_into_larger_shards_of_the_same_grid() -> None:
    """Bisection finds the smallest of them."""
    found = 0
    for case in random_cases(1000, seed=5, tensors=(1, 6), ranks=(1, 9)):
        total = sum(numel for numel, _ in case.tensors)
        for grid in (1, 2, 6, 12):
            sizes = range(grid, total + grid, grid)
            fits = [in_order(case.tensors, range(len(case.tensors)), case.world_size, size, grid) for size in sizes]
            feasible = [offsets is not None for offsets in fits]
            assert feasible == sorted(feasible), (case, grid)
            found += any(feasible) and not all(feasible)
    assert found > 1000


def test_no_order_ends_earlier_than_a_wide_beam() -> None:
    for case in random_cases(300, seed=6, tensors=(2, 5), ranks=(2, 9)):
        total, count = sum(numel for numel, _ in case.tensors), len(case.tensors)
        kinds = kinds_of(case.tensors)
        for size in range(max(1, total // case.world_size), total + 1):
            orders = itertools.permutations(range(count))
            some = any(in_order(case.tensors, order, case.world_size, size, size) is not None for order in orders)
            beam = beam_search(kinds, case.world_size, size, size, width=1 << count, lookahead=count)
            assert (beam is not None) == some
            if some:
                break


def test_the_order_as_given_is_kept_where_no_other_has_smaller_shards() -> None:
    kept = 0
    for case in random_cases(500, seed=7, tensors=(2, 5), ranks=(2, 6)):
        made = plan(*case)
        position = 0
        for tensor in case.tensors:
            offsets = range(position, case.world_size * made.shard_size + 1)
            at = next((at for at in offsets if is_legal(tensor, at, made.shard_size, case.world_size)), None)
            if at is None:
                break
            position = at + tensor[0]
        else:
            kept += 1
            assert list(made.offsets) == sorted(made.offsets), case
    assert 100 < kept < 500


def test_a_bucket_of_many_kinds_of_blocks() -> None:
    """More choices of blocks that the shard may be a multiple of than are tried. All tensors are larger than it."""
    generator = random.Random(0)
    tensors = [(block * generator.randint(20, 40), block) for block in range(30, 70)]
    case = Case(tuple(tensors), 100, 8)
    made = plan(*case)
    assert illegal(made) == 0
    assert lower_bound(case) <= made.shard_size <= 2 * lower_bound(case)
