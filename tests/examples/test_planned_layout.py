"""examples/train_gpt_ragged.py: the plan that it prints is the layout that the model gets."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import pytest

import smallreduce as sr
from ranks import run

EXAMPLES = str(Path(__file__).parents[2] / "examples")
sys.path.insert(0, EXAMPLES)

import train_gpt_ragged  # noqa: E402
from train_gpt import GPT, GPTConfig  # noqa: E402

WIDTH = 96  # no multiple of a group of 128


def _lengths(rank: int, world: int, given: dict[str, Any]) -> None:
    args = argparse.Namespace(**given)
    (block,) = GPT(GPTConfig(WIDTH, 1, WIDTH // 32, 32)).blocks
    plan = train_gpt_ragged.plan_of(block, args, world)
    sr.ragged.fully_shard(
        block,
        granularity=functools.partial(train_gpt_ragged.rows_of, args.optimizer),
        gradients=args.gradients,
        weights=args.weights,
        feedback=args.feedback,
        node_size=args.node_size,
    )
    for index, parameter in enumerate(block.parameters()):
        assert isinstance(parameter, sr.ragged.RaggedTensor)
        ranges = parameter.placement.ranges(parameter.shape)
        assert tuple(end - begin for begin, end in ranges) == plan.lengths(index), index
    shard = next(block.parameters()).to_local().untyped_storage().nbytes()  # of which all are views
    assert shard == 4 * plan.shard_size


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "adamw", "gradients": None, "weights": None, "feedback": None, "node_size": None},
        {
            "optimizer": "adam8bit",
            "gradients": ("int8", "int4:group=64"),
            "weights": "int8",
            "feedback": None,
            "node_size": 1,
        },
        {"optimizer": "muon", "gradients": "int4:group=32", "weights": "bf16", "feedback": "int8", "node_size": None},
    ],
)
@pytest.mark.parametrize("world", [2, 3])
def test_a_block_lies_as_printed(world: int, given: dict[str, Any]) -> None:
    run(_lengths, world, given)
