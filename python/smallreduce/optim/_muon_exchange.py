"""Matrices that lie on several ranks: each is brought to one, orthogonalised there, and brought back."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives import Count
from smallreduce.optim._muon_matrix import Matrix
from smallreduce.optim._muon_owners import Owners
from smallreduce.ragged import RaggedShard, RaggedTensor
from smallreduce.ragged._redistribute import Redistribution, redistribute_many

__all__ = ["orthogonalize_sharded"]


def orthogonalize_sharded(matrices: Sequence[Matrix], owners: Owners, group: dist.ProcessGroup, count: Count) -> None:
    """A step of the matrices that are sharded over one process group: a collective.

    A batch travels with one all-to-all each way. While the ranks orthogonalise what they own of it, the next one comes
    and the one before goes back. All is started from the thread of the caller, in one order on all ranks.

    Args:
        matrices: Of parameters that are RaggedTensors on ``group``; the same on all ranks, in the same order.
        owners: Of them.
        count: To which is added what this rank sends.
    """
    batches = (_Batch(members, matrices, owners, group, count) for members in owners.batches)
    before: _Batch | None = None
    here = next(batches, None)
    while here is not None:
        following = next(batches, None)
        here.orthogonalize()
        if before is not None:
            before.apply()
        before, here = here, following
    if before is not None:
        before.apply()


class _Batch:
    """A batch, from its momentum to its step. Making it starts to bring it to its owners."""

    def __init__(
        self,
        members: Sequence[int],
        matrices: Sequence[Matrix],
        owners: Owners,
        group: dist.ProcessGroup,
        count: Count,
    ) -> None:
        self._group, self._count = group, count
        rank, world = group.rank(), group.size()
        self._whole = [matrices[one] for one in members if not owners.moves[one] and owners.roots[one] == rank]
        self._moved = [matrices[one] for one in members if owners.moves[one]]
        roots = [owners.roots[one] for one in members if owners.moves[one]]
        self._is_mine = [root == rank for root in roots]
        self._sources = [_sharded(matrix.parameter).placement for matrix in self._moved]
        self._targets = [RaggedShard.on_root(root, world) for root in roots]
        updates = [_sharded(matrix.advance()).to_local() for matrix in self._moved]
        self._coming = self._start(updates, self._sources, self._targets)
        self._going: Redistribution[list[Tensor]] | None = None

    def _start(
        self, locals: Sequence[Tensor], sources: Sequence[RaggedShard], targets: Sequence[RaggedShard]
    ) -> Redistribution[list[Tensor]]:
        shapes = [matrix.parameter.shape for matrix in self._moved]
        moving = redistribute_many(locals, shapes, sources, targets, self._group, async_op=True)
        self._count.collectives += 1 if self._moved else 0
        self._count.bytes_sent += moving.bytes_sent
        return moving

    def orthogonalize(self) -> None:
        """Waits for it, orthogonalises what this rank owns, and starts to bring it back."""
        updates = self._coming.wait()
        orthogonal = [
            matrix.orthogonalize(update) if is_mine else update  # else it is empty
            for matrix, update, is_mine in zip(self._moved, updates, self._is_mine, strict=True)
        ]
        self._going = self._start(orthogonal, self._targets, self._sources)
        for matrix in self._whole:
            update = _sharded(matrix.advance()).to_local()
            _apply(matrix, matrix.orthogonalize(update))

    def apply(self) -> None:
        """Waits for it to be back, and takes the steps."""
        assert self._going is not None
        for matrix, orthogonal in zip(self._moved, self._going.wait(), strict=True):
            _apply(matrix, orthogonal)


def _apply(matrix: Matrix, orthogonal: Tensor) -> None:
    parameter = _sharded(matrix.parameter)
    matrix.apply(RaggedTensor(orthogonal, parameter.shape, parameter.placement, parameter.group))


def _sharded(tensor: Tensor) -> RaggedTensor:
    assert isinstance(tensor, RaggedTensor)
    return tensor
