"""What plans are checked against: what a legal one is, the smallest shards of all, and a bound where that takes too
long. Nothing here is shared with the planner: it is written from the definition, and slow."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from smallreduce.ragged._plan import Plan

__all__ = ["Case", "brute_force", "illegal", "is_legal", "lower_bound", "random_cases"]

Tensors = Sequence[tuple[int, int]]  # (numel, block)


class Case(NamedTuple):
    """The arguments of ``smallreduce.ragged.plan``."""

    tensors: tuple[tuple[int, int], ...]
    world_size: int
    align: int


def is_legal(tensor: tuple[int, int], offset: int, shard_size: int, world_size: int) -> bool:
    """Whether a tensor may begin at ``offset`` of the bucket, in which it is alone."""
    numel, block = tensor
    if offset < 0 or offset + numel > world_size * shard_size:
        return False
    cuts = (rank * shard_size for rank in range(1, world_size))
    return all((cut - offset) % block == 0 for cut in cuts if offset < cut < offset + numel)


def illegal(plan: Plan) -> int:
    """How many tensors are where they may not be, or overlap one before them; and whether the shard is not aligned."""
    placed = list(zip(plan.tensors, plan.offsets, strict=True))
    wrong = sum(not is_legal(tensor, offset, plan.shard_size, plan.world_size) for tensor, offset in placed)
    spans = sorted((offset, offset + numel) for (numel, _), offset in placed if numel)
    wrong += sum(end > begin for (_, end), (begin, _) in itertools.pairwise(spans))
    return wrong + (plan.shard_size % plan.align != 0)


def brute_force(case: Case) -> int:
    """The smallest shards of any layout: of all sizes, all orders, and in each all offsets."""
    sizes = itertools.count(0, case.align)
    return next(size for size in sizes if _fit(case, size))


def _fit(case: Case, shard_size: int) -> bool:
    tensors, extent = case.tensors, case.world_size * shard_size
    if sum(numel for numel, _ in tensors) > extent:
        return False
    # The first place where some of the tensors, as a set of bits, can end. Whatever is laid after them can be where it
    # would be if they ended later, so that only this one counts.
    ends = {0: 0}
    for placed in range(1 << len(tensors)):
        if placed not in ends:
            continue
        for index, tensor in enumerate(tensors):
            if placed >> index & 1:
                continue
            offsets = range(ends[placed], extent - tensor[0] + 1)
            offset = next((at for at in offsets if is_legal(tensor, at, shard_size, case.world_size)), None)
            if offset is not None:
                more = placed | 1 << index
                ends[more] = min(ends.get(more, extent), offset + tensor[0])
    return (1 << len(tensors)) - 1 in ends


def lower_bound(case: Case) -> int:
    """A size below which no shards can be.

    Of a block, a shard has all. A tensor of more than two shards contains two cuts that follow each other, both a whole
    number of blocks from its beginning: the shard is a multiple of its block.
    """
    total = sum(numel for numel, _ in case.tensors)
    least = max([-(-total // case.world_size), *(min(tensor) for tensor in case.tensors)])
    bounds = []
    # With shards from half of one tensor on, and up to half of the next larger one.
    for half in sorted({0, *(-(-numel // 2) for numel, _ in case.tensors)}):
        begin = max(least, half)
        blocks = (block for numel, block in case.tensors if numel > 2 * begin)
        grid = math.lcm(case.align, *blocks)
        bounds.append(-(-begin // grid) * grid)
    return min(bounds)


def random_cases(
    count: int, seed: int, tensors: tuple[int, int] = (1, 5), ranks: tuple[int, int] = (1, 5)
) -> Iterator[Case]:
    """Small cases, in which blocks and shards are of like sizes: tensors of up to 30 elements, about half of them whole
    numbers of blocks and some empty, in blocks of up to 8, and shards of multiples of up to 4.

    Args:
        tensors, ranks: The fewest and the most.
    """
    generator = random.Random(seed)
    for _ in range(count):
        pairs = []
        for _ in range(generator.randint(*tensors)):
            block, numel = generator.randint(1, 8), generator.randint(0, 30)
            pairs.append((numel // block * block if generator.random() < 0.5 else numel, block))
        yield Case(tuple(pairs), generator.randint(*ranks), generator.randint(1, 4))
