"""Where residuals lie, without any process group."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from smallreduce import IntQuant, Sign
from smallreduce.ddp import _memory
from smallreduce.ddp._memory import Residuals, Shard
from smallreduce.ddp._policy import Choice, choose


def test_parameters_are_cut_where_packets_are() -> None:
    # 5 + 0 + 3 blocks in packets of 2, 4 and 2: two chunks' worth on two ranks, the last packet empty.
    assert _memory._cut([5, 0, 3], [2, 4, 2, 0], world_size=2) == [
        (Shard(0, 0, 2), Shard(1, 2, 5)),
        (),
        (Shard(1, 0, 1), Shard(0, 1, 3)),
    ]


def _random_cut(generator: random.Random, blocks: int, packets: int) -> list[int]:
    ends = sorted(generator.randint(0, blocks) for _ in range(packets - 1))
    return [end - begin for begin, end in zip([0, *ends], [*ends, blocks], strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_every_block_moves_once(seed: int) -> None:
    generator = random.Random(seed)
    counts = [generator.randint(0, 9) for _ in range(6)]
    old, new = (_memory._cut(counts, _random_cut(generator, sum(counts), packets), world_size=3) for packets in (3, 6))
    for count, before, after in zip(counts, old, new, strict=True):
        moved = [
            (block, before[source].owner, after[target].owner)
            for source, target, begin, end in _memory._overlaps(before, after)
            for block in range(begin, end)
        ]
        assert [block for block, _, _ in moved] == list(range(count))
        for block, source, target in moved:
            assert any(shard.owner == source and shard.begin <= block < shard.end for shard in before)
            assert any(shard.owner == target and shard.begin <= block < shard.end for shard in after)


def test_saved_residuals_that_do_not_hold_together_are_refused() -> None:
    """As saved by rank 1 of 2: 40 elements, whose blocks 0 and 1 lie on ranks 0 and 1."""
    saved = {
        "codec": "int4",
        "numel": 40,
        "worker": torch.ones(40),
        "shards": [(0, 0, 1), (1, 1, 2)],
        "server": [None, torch.ones(32)],
    }
    residuals = Residuals.from_state_dict("w", saved, 1, 2)
    again = residuals.state_dict()
    assert torch.equal(again["worker"], saved["worker"]) and torch.equal(again["server"][1], saved["server"][1])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"numel": 41}, r"of w have a worker's of torch.float32 \[40\], expected torch.float32 \[41\]"),
        ({"numel": 40.0}, "types .*float"),
        ({"codec": None}, "types .*NoneType"),
        ({"worker": torch.ones(40, dtype=torch.float64)}, r"float64 \[40\], expected torch.float32 \[40\]"),
        ({"worker": torch.ones(1)}, r"\[1\], expected torch.float32 \[40\]"),
        ({"worker": None}, r"NoneType, expected torch.float32 \[40\]"),
        ({"shards": [(0, 0, 1)]}, r"begin at \[0, 2\], expected \[0, 1\]"),
        ({"shards": [(0, 0, 1), (2, 1, 2)]}, "impossible shards.*owner=2"),
        ({"shards": [(0, 0, 3), (1, 3, 1), (0, 1, 2)]}, "impossible shards.*begin=3, end=1"),
        ({"shards": [(0, 0), (1, 1)]}, "no triples"),
        ({"server": [None, torch.ones(31)]}, r"\[31\].*expected.*\[32\]"),
        ({"server": [torch.ones(32), None]}, "a server's on rank 1"),
        ({"server": [torch.ones(32)]}, "a server's on rank 1"),
        ({"more": 0}, "keys.*more"),
    ]
    for change, match in wrong:
        with pytest.raises(ValueError, match=match):
            Residuals.from_state_dict("w", {**saved, **change}, 1, 2)
    with pytest.raises(ValueError, match="keys"):
        Residuals.from_state_dict("w", {"codec": "int4"}, 1, 2)


def test_which_codec_a_parameter_takes() -> None:
    int4 = IntQuant(4)
    matrix, vector, double = torch.zeros(2, 2), torch.zeros(2), torch.zeros(2, 2, dtype=torch.float64)
    assert choose("a", matrix, int4, None, False) == Choice(int4)
    assert choose("a", matrix, None, None, False) == Choice(None, "the codec is None")
    assert choose("a", vector, int4, None, False) == Choice(None, "fewer than two dimensions")
    assert choose("a", double, int4, None, False).reason == "no codec takes torch.float64"
    assert choose("a", matrix, int4, None, True) == Choice(IntQuant(4, rounding="nearest"))
    assert choose("a", matrix, Sign(), None, True) == Choice(Sign())
    # A rule is asked about everything, and has the last word.
    rule = {"a": "int8", "b": int4, "c": None, "d": "fp32"}
    assert choose("a", vector, int4, lambda name, _: rule[str(name)], False) == Choice(IntQuant(8))
    assert choose("b", vector, None, lambda name, _: rule[str(name)], False) == Choice(int4)
    assert choose("c", matrix, int4, lambda name, _: rule[str(name)], False).codec is None
    assert choose("d", matrix, int4, lambda name, _: rule[str(name)], False).codec is None
    assert choose("d", matrix.bfloat16(), int4, lambda name, _: rule[str(name)], False).codec is not None
    with pytest.raises(ValueError, match="int5"):
        choose("a", matrix, int4, lambda *_: "int5", False)
    with pytest.raises(TypeError, match="float64"):
        choose("a", double, None, lambda *_: "int4", False)
