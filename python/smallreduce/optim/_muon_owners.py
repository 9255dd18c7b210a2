"""Which rank orthogonalises which matrix, and which matrices travel together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest

from smallreduce.optim._muon_newton_schulz import newton_schulz_cost
from smallreduce.ragged import RaggedShard

__all__ = ["Owners", "choose_owners"]

_ITEMSIZE = 2  # updates travel in bf16


@dataclass(frozen=True)
class Owners:
    """The matrices of one process group, by their numbers.

    Attributes:
        roots: The rank that orthogonalises each.
        moves: Whether it has to be brought there: else all of it is there.
        batches: The matrices that are brought and orthogonalised together, in their order; all matrices but those
            without elements. The numbers of one batch ascend.
        costs: What Newton-Schulz costs each rank, by :func:`newton_schulz_cost`.
    """

    roots: tuple[int, ...]
    moves: tuple[bool, ...]
    batches: tuple[tuple[int, ...], ...]
    costs: tuple[int, ...]

    @property
    def moving_batches(self) -> int:
        """Batches of which something has to be brought."""
        return sum(any(self.moves[one] for one in batch) for batch in self.batches)

    @property
    def imbalance(self) -> float:
        """The largest cost of a rank by the mean of all; 1 where there is none."""
        total = sum(self.costs)
        return max(self.costs) * len(self.costs) / total if total else 1.0


@lru_cache(maxsize=64)  # an optimizer asks for the same at every step
def choose_owners(
    shapes: tuple[tuple[int, int], ...], placements: tuple[RaggedShard, ...], batch_cap_nbytes: int
) -> Owners:
    """Shares out the matrices so that all ranks have about as much to do: a function of its arguments, so that all
    ranks come to the same without a word.

    A matrix that one rank holds whole stays there. Then, from the most costly one down, each of the others goes to the
    rank that has the least to do (Graham's LPT rule: the busiest rank has at most 4/3 of what it had at best, were no
    matrix bound); of several, to the one that holds most of it.

    Each rank's matrices, the most costly first, are cut into runs of at most ``batch_cap_nbytes``, or of one; a batch
    is one run of each rank. So ranks work on a batch for about as long, and hold no more than their runs of it.

    Args:
        shapes, placements: Of each matrix; all placements are for the same ranks.
        batch_cap_nbytes: In bytes of the bf16 updates.
    """
    world = placements[0].world_size
    owned = [
        [end - begin for begin, end in placement.ranges(shape)]
        for shape, placement in zip(shapes, placements, strict=True)
    ]
    numels = [math.prod(shape) for shape in shapes]
    order = sorted(range(len(shapes)), key=lambda one: -newton_schulz_cost(*shapes[one]))
    moves = [max(lengths) < numel for lengths, numel in zip(owned, numels, strict=True)]
    roots = [_largest(lengths) for lengths in owned]
    costs = [0] * world
    for one in sorted(order, key=lambda one: moves[one]):
        if moves[one]:
            roots[one] = min(range(world), key=lambda rank: (costs[rank], -owned[one][rank]))
        costs[roots[one]] += newton_schulz_cost(*shapes[one])
    runs = [
        _runs([one for one in order if roots[one] == rank and numels[one]], numels, batch_cap_nbytes)
        for rank in range(world)
    ]
    batches = [tuple(sorted(chain.from_iterable(of_ranks))) for of_ranks in zip_longest(*runs, fillvalue=())]
    return Owners(tuple(roots), tuple(moves), tuple(batches), tuple(costs))


def _largest(lengths: Sequence[int]) -> int:
    return max(range(len(lengths)), key=lambda rank: lengths[rank])


def _runs(matrices: Sequence[int], numels: Sequence[int], cap_nbytes: int) -> list[list[int]]:
    runs: list[list[int]] = []
    nbytes = 0
    for one in matrices:
        if not runs or nbytes + numels[one] * _ITEMSIZE > cap_nbytes:
            runs.append([])
            nbytes = 0
        runs[-1].append(one)
        nbytes += numels[one] * _ITEMSIZE
    return runs
