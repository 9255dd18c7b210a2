"""The wires among some ranks: how one exchange of a collective is issued, in two places in the order of the program.

The first stages of collectives are issued by the caller's thread, the second ones, on the CPU, by another, so each
place has a process group of its own there; what is issued in one place is in the same order on all ranks.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives._compat import all_gather_single, all_to_all_single

__all__ = ["Exchange", "GlooLinks", "Links", "NcclLinks"]


class Exchange(Protocol):
    """Messages between the ranks, in flight."""

    def wait(self) -> object:
        """Blocks (NCCL: the current stream, not the thread) until they have arrived and what was sent may change."""


class Links(ABC):
    """The wires among ``world_size`` ranks, of which this one is ``rank``."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    @property
    @abstractmethod
    def group(self) -> dist.ProcessGroup:
        """For collectives of torch's own, in the order of the first stages."""

    @abstractmethod
    def all_to_all(self, output: Tensor, input: Tensor, tag: int, second: bool = False) -> Exchange:
        """Starts to send the r-th W-th of ``input`` to rank r, as whose r-th W-th of ``output`` it arrives here;
        ``second`` as a second stage, which :meth:`Stages.turn` issues."""

    @abstractmethod
    def all_gather(self, output: Tensor, mine: Tensor, tag: int, second: bool = False) -> Exchange:
        """Starts to send ``mine``, which may be this rank's W-th of ``output``, to all ranks."""


class _Messages:
    """Of one exchange, each with its own handle."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            if not work.wait():
                raise RuntimeError("a message between the ranks was aborted")


class GlooLinks(Links):
    """Between two ranks numbered messages, among more gloo's collectives, on two private clones of their group.

    A collective of gloo's goes through threads and buffers of its own, which messages spare; but among more than two
    ranks it keeps the load on the links even, where messages to all at once meet in the queue before one receiver.

    Collectives: one clone takes the first stages, the other the second ones. Messages: each carries the number of its
    chunk in the order of the program, so they find each other whatever the order of issue. One clone takes those to the
    higher rank, the other those to the lower, since gloo's thread for incoming data spins for as long as another writes
    to the same connection.

    Args:
        clones: Two groups of the same ranks that nothing else uses. They are the caller's to destroy, by emptying the
            list.
    """

    def __init__(self, clones: list[dist.ProcessGroup]) -> None:
        super().__init__(clones[0].rank(), clones[0].size())
        self._clones = clones
        if self.world_size == 2:
            # With TORCH_GLOO_LAZY_INIT the first receive waits for a connection that the other rank may be the one to
            # open, in its own first receive on that clone.
            for clone in clones:
                dist.barrier(group=clone)

    @property
    def group(self) -> dist.ProcessGroup:
        return self._clones[0]

    def all_to_all(self, output: Tensor, input: Tensor, tag: int, second: bool = False) -> Exchange:
        if self.world_size != 2:
            return all_to_all_single(output, input, self._clones[second])
        return self._swap(output, input.chunk(2)[1 - self.rank], input.chunk(2)[self.rank], tag)

    def all_gather(self, output: Tensor, mine: Tensor, tag: int, second: bool = False) -> Exchange:
        if self.world_size != 2:
            return all_gather_single(output, mine, self._clones[second])
        return self._swap(output, mine, mine, tag)

    def _swap(self, output: Tensor, sent: Tensor, kept: Tensor, tag: int) -> Exchange:
        """Starts to send to the other of two ranks; its part of ``output`` arrives, ours is ``kept``."""
        parts = output.chunk(2)
        other = 1 - self.rank
        if parts[self.rank].data_ptr() != kept.data_ptr():
            parts[self.rank].copy_(kept)
        # What is awaited comes first, so that it has a place when it arrives.
        received = self._clones[self.rank].recv([parts[other]], other, tag)
        return _Messages([received, self._clones[other].send([sent], other, tag)])


class NcclLinks(Links):
    """NCCL's collectives, in the order of the stream."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group = weakref.ref(group)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError("the process group has been destroyed")
        return group

    def all_to_all(self, output: Tensor, input: Tensor, tag: int, second: bool = False) -> Exchange:
        return all_to_all_single(output, input, self.group)

    def all_gather(self, output: Tensor, mine: Tensor, tag: int, second: bool = False) -> Exchange:
        return all_gather_single(output, mine, self.group)
