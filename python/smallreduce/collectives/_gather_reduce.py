"""The all-reduce of sparse packets for few ranks: each rank's packet goes to all of them, and each adds them up."""

from __future__ import annotations

from torch import Tensor

from smallreduce import ops
from smallreduce._layout import BLOCK, Layout
from smallreduce.collectives._channel import Channel
from smallreduce.collectives._engine import BucketEngine, stage_seed
from smallreduce.collectives._links import Exchange

__all__ = ["GatherReduce"]


class GatherReduce(BucketEngine):
    """All-reduce through one packet of the whole bucket from each rank, gathered and added in rank order.

    One exchange, and nothing is lost in a second encoding, so there is no server's residual; but what a rank receives
    grows with the number of ranks.

    Args:
        layout: The one packet of a rank.
        channel: ``channel_of(group, device)``.
    """

    def __init__(self, layout: Layout, channel: Channel) -> None:
        self.layout = layout
        super().__init__(channel, [channel.world_size * layout.stride])
        self.worker_numel = BLOCK * layout.blocks
        self.collectives = 1
        self.is_sparse = True
        self.bytes_sent = (channel.world_size - 1) * layout.stride

    @property
    def _mine(self) -> Tensor:
        return self._sent[0].chunk(self.channel.world_size)[self.channel.rank]

    def _prepare(self, server: Tensor | None, seed: int, bucket: int, step: int | Tensor) -> None:
        self._seed = stage_seed(seed, bucket, self.channel.rank, 0)
        self._at_step = self._step(step)

    def encode(self, chunk: int) -> None:
        ops.encode(self._buffer, self.layout, self._mine, self._worker, self._seed, self._at_step)
        self._mask(self._mine, self.layout)

    def send(self, chunk: int, tag: int) -> Exchange:
        return self.channel.links.all_gather(self._sent[chunk], self._mine, tag)

    def turn(self, chunk: int, tag: int) -> None:
        """There is one stage only."""

    def finish(self, chunk: int) -> None:
        ops.reduce(
            self._sent[chunk], self.layout.stride, self.channel.world_size, self._factor, self.layout, self._buffer,
            self.channel.error,
        )  # fmt: skip
