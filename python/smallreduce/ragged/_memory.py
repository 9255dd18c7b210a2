"""What compression took from the gradients of one bucket, to be added to the next."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smallreduce._layout import BLOCK
from smallreduce.collectives._pool import Pool
from smallreduce.fsdp._memory import Feedback, Loan, Memory
from smallreduce.fsdp._residual_layout import STORED

if TYPE_CHECKING:
    from smallreduce.ragged._bucket import Bucket

__all__ = ["Residuals", "Whole", "grain_of_feedback"]


def grain_of_feedback(feedback: Feedback | None) -> int:
    """Elements that no cut between ranks may divide, so that a parameter's residual is the same whoever owns what."""
    if feedback is None:
        return 1
    return BLOCK if feedback.kind == "full" else STORED.group


@dataclass(frozen=True)
class Whole:
    """A parameter whose residual lies in one piece on any number of ranks.

    The reduce-scatter sees what each rank owns, rank after rank, and each piece from a whole block on. A tensor of a
    plan is contiguous, and where feedback is given it is cut at whole blocks only: so what is owed to the next rank's
    piece follows that to the one before without a gap.
    """

    name: str
    shape: torch.Size

    def parts(self, world_size: int) -> tuple[int, int]:
        """One, of all elements."""
        return 1, self.shape.numel()

    def join(self, parts: Tensor) -> Tensor:
        """A copy, in the shape of the parameter."""
        return parts.clone().view(self.shape)

    def split(self, whole: Tensor, world_size: int) -> Tensor:
        """The reverse of :meth:`join`."""
        return whole.reshape(1, -1)


class Residuals:
    """Those of one bucket: for each parameter the residual of all of it, of which a rank owes a part to every other.

    Parameters are given feedback one by one: those without a gradient in a reduction go on owing what they owe.

    Args:
        bucket: With :func:`grain_of_feedback` in the blocks of its plan.

    Attributes:
        partial: Compressed reductions in which some trainable parameters had no gradient.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.partial = 0
        self._bucket = bucket
        self._memory: Memory | None = None
        self._order = sorted(range(len(bucket.plan.tensors)), key=bucket.plan.offsets.__getitem__)

    def memory(self, members: Collection[int] = ()) -> Memory | None:
        """What is owed to the parameters that are trainable, or members, now; None where nothing is ever owed."""
        bucket, policy = self._bucket, self._bucket.policy
        if policy.feedback is None or not policy.takes_feedback(bucket.shard.dtype):
            return None
        slots = [
            Whole(slot.name, slot.sharded.shape)
            for slot in (bucket.slots[index] for index in self._order)
            if slot.sharded.requires_grad or slot.index in members
        ]
        device = policy.ranks.device if bucket.shard.is_meta else bucket.shard.device
        if self._memory is not None:
            self._memory.follow(slots, device)
        elif slots:
            self._memory = policy.feedback.memory(slots, policy.ranks.shard.size(), device)
        return self._memory

    def lend(self, members: Collection[int], step: int, pool: Pool) -> Loan | None:
        """The residuals for a reduction, before which the one before has given them back.

        Args:
            members: Numbers of the parameters that are reduced.
            step: Of the bucket.
            pool: For what is only made for the reduction.
        """
        slots, chosen = self._bucket.slots, set(members)
        self.partial += any(slot.sharded.requires_grad and slot.index not in chosen for slot in slots)
        memory = self.memory(chosen)
        return None if memory is None else memory.lend(step, pool, {slots[index].name for index in chosen})
