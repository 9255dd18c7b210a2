"""``str(plan)``: figures, a picture of the shards, and a line for each tensor."""

from __future__ import annotations

import textwrap

from smallreduce.ragged._plan import Plan, plan


def test_a_small_plan() -> None:
    made = Plan(3, 12, 4, tensors=((16, 8), (5, 1), (0, 3), (9, 3)), offsets=(4, 22, 20, 27))
    assert str(made) == textwrap.dedent(
        """\
        4 tensors, 30 elements, on 3 ranks: shards of 12, a multiple of 4
        padding: 6 elements, 16.67% of the bucket; the fullest rank has 1.200 times the mean

        rank 0  ....AAAAAAAA
        rank 1  AAAAAAAA..BB
        rank 2  BBBDDDDDDDDD

           numel  block  offset  on ranks
        A     16      8       4  0-1: 8 + 8
        B      5      1      22  1-2: 2 + 3
        C      0      3      20  none
        D      9      3      27  2: 9"""
    )


def test_a_letter_stands_for_several_elements() -> None:
    made = Plan(2, 640, 1, tensors=((640, 1), (1, 1), (6, 1), (5, 1), (15, 5)), offsets=(0, 641, 650, 660, 1265))
    picture = str(made).split("\n\n")[1].splitlines()
    # Ten elements a letter: one of B and nine of none, six of C and four of none, five of D and five of none.
    assert picture[1] == "rank 1  .CD" + 59 * "." + "EE"
    assert picture[0] == "rank 0  " + 64 * "A"
    assert picture[2].strip() == "one letter: 10.0 elements"


def test_many_ranks_and_tensors_are_abridged() -> None:
    made = plan([(10, 1)] * 100, 200)
    figures, picture, tensors = str(made).split("\n\n")
    assert figures.startswith("100 tensors, 1,000 elements, on 200 ranks: shards of 5, a multiple of 1\n")
    rows = picture.splitlines()
    assert rows[:2] == ["rank   0  AAAAA", "rank   1  AAAAA"] and rows[2] == "rank   2  BBBBB"
    assert [row.split()[1] for row in rows if row.startswith("rank")] == [
        *map(str, range(12)),
        "196",
        "197",
        "198",
        "199",
    ]
    assert rows[12].strip() == "..."
    assert tensors.splitlines()[-1] == "and 84 more tensors" and len(tensors.splitlines()) == 1 + 16 + 1


def test_a_tensor_on_many_ranks_is_abridged() -> None:
    assert str(plan([(4000, 1)], 4)).endswith("0-3: 1,000 + 1,000 + 1,000 + 1,000")
    assert str(plan([(4200, 1), (600, 1)], 6)).splitlines()[-2].endswith("  0-5: 800 + 800 + ... + 200")


def test_nothing_to_draw() -> None:
    assert str(plan([], 3)) == textwrap.dedent(
        """\
        0 tensors, 0 elements, on 3 ranks: shards of 0, a multiple of 1
        padding: 0 elements, 0.00% of the bucket; the fullest rank has 1.000 times the mean"""
    )
    assert str(plan([(0, 2)], 1)).splitlines()[-1] == "A      0      2       0  none"
