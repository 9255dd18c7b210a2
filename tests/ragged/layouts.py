"""Uneven layouts to shard tensors by, drawn from a seeded generator: the same on all ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._tensor import RaggedTensor

SHAPES: list[tuple[int, ...]] = [(7, 5), (4, 3, 2), (13,), (1,), (2, 2), (64, 3), (0, 4), ()]


def uneven(rng: random.Random, shape: Sequence[int], world_size: int) -> RaggedShard:
    """Cuts anywhere, at whole rows or at the ends, so that some ranks have nothing."""
    numel = math.prod(shape)
    block = rng.choice([1, 1, numel // shape[0] if numel else 1, max(numel, 1)]) if shape else 1
    cuts = [0, *sorted(block * rng.randint(0, numel // block) for _ in range(world_size - 1)), numel]
    return RaggedShard.from_lengths(shape, [end - begin for begin, end in pairwise(cuts)])


def sharded(full: Tensor, rng: random.Random, group: dist.ProcessGroup | None = None) -> RaggedTensor:
    return RaggedTensor.distribute(full, uneven(rng, full.shape, dist.get_world_size(group)), group)
