"""The all-reduce on two levels: a reduce-scatter on two levels and an all-gather on two levels, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import PacketCodec
from smallreduce.collectives._engine import BucketEngine, Segments, chunk_count, cut, packets_of, stage_seed
from smallreduce.collectives._levels import Levels, grain_of
from smallreduce.collectives._links import Exchange

__all__ = ["TwoLevelAllReduce"]


class TwoLevelAllReduce(BucketEngine):
    """All-reduce of a bucket's segments through four exchanges: to the ranks of the node, to their counterparts in the
    other nodes, back from these, and back to the node. It takes no residuals.

    Args:
        segments: ``(offset, length)`` in elements of the buffer. The same on all ranks.
        codecs: Inside the node; and between nodes, also for the sums on their way back.
        dtype: Of the buffer.
        levels: At least two nodes, of at least two ranks.
    """

    worker_numel = 0

    def __init__(
        self, segments: Segments, codecs: tuple[PacketCodec, PacketCodec], dtype: torch.dtype, levels: Levels
    ) -> None:
        channel = levels.channel
        world, nodes = channel.world_size, levels.nodes
        self._levels = levels
        count = levels.chunks or chunk_count(sum(length for _, length in segments), world, codecs[0])
        # Rank r's part of chunk c is piece c * W + r.
        pieces = cut(segments, count * world, grain_of(codecs))
        intra, inter = (packets_of(pieces, codec, dtype) for codec in codecs)

        def of_ranks(packets: Layout, ranks: list[int], chunk: int) -> Layout:
            return packets.select([chunk * world + rank for rank in ranks])

        everyone, across, mine = levels.order, levels.counterparts, [channel.rank]
        self._layouts = [of_ranks(intra, everyone, chunk) for chunk in range(count)]
        self._sums = [
            [(of_ranks(intra, [rank], chunk), of_ranks(inter, [rank], chunk)) for rank in across]
            for chunk in range(count)
        ]
        self._own = [of_ranks(inter, mine, chunk) for chunk in range(count)]
        self._reduced = [of_ranks(inter, everyone, chunk) for chunk in range(count)]
        self._strides = [
            (first.stride, second.stride) for first, second in zip(self._layouts, self._reduced, strict=True)
        ]
        super().__init__(channel, [world * max(strides) for strides in self._strides])
        # The sums' packets are read as if each began with the first of its kind, so the last reach beyond the end.
        self._received = self._buffers([max((world + nodes - 1) * a, nodes * b) for a, b in self._strides])
        there = sum((world - nodes) * a + (nodes - 1) * b for a, b in self._strides)
        self.bytes_sent = there + sum((world - 1) * b for _, b in self._strides)
        self.collectives = 4 * count

    def _prepare(self, server: Tensor | None, seed: int, bucket: int, step: int | Tensor) -> None:
        if self._worker is not None or server is not None:
            raise ValueError("an all-reduce on two levels takes no residuals")
        rank, world = self.channel.rank, self.channel.world_size
        # The second encoding of the sums is a third stage: that of a rank beyond the last.
        stages = [(rank, 0), (rank, 1), (world + rank, 0)]
        self._seeds = [stage_seed(seed, bucket, of, stage) for of, stage in stages]
        self._at_step = self._step(step)

    def encode(self, chunk: int) -> None:
        ops.encode(self._buffer, self._layouts[chunk], self._sent[chunk], None, self._seeds[0], self._at_step)

    def send(self, chunk: int, tag: int) -> Exchange:
        nbytes = self.channel.world_size * self._strides[chunk][0]
        return self._levels.intra.all_to_all(self._received[chunk][:nbytes], self._sent[chunk][:nbytes], tag)

    def turn(self, chunk: int, tag: int) -> Exchange:
        levels, error = self._levels, self.channel.error
        first, second = self._strides[chunk]
        sent, received = self._sent[chunk], self._received[chunk]
        for node, (packets, packet) in enumerate(self._sums[chunk]):
            ops.reduce_encode(
                received[node * first :], levels.nodes * first, levels.node_size, 1.0, packets,
                sent[node * second :][:second], None, self._seeds[1], self._at_step, error, into=packet,
            )  # fmt: skip
        nbytes = levels.nodes * second
        # One thread issues all of these in the order of the chunks, so it may wait for one before the next.
        self.channel.wait_for(levels.inter.all_to_all(received[:nbytes], sent[:nbytes], tag, second=True))
        gathered = sent[: self.channel.world_size * second]
        arrived = gathered.chunk(levels.node_size)[levels.local_rank]
        mine = arrived.chunk(levels.nodes)[levels.node]
        ops.reduce_encode(
            received, second, levels.nodes, self._factor, self._own[chunk], mine, None, self._seeds[2], self._at_step,
            error,
        )  # fmt: skip
        self.channel.wait_for(levels.inter.all_gather(arrived, mine, tag, second=True))
        return levels.intra.all_gather(gathered, arrived, tag, second=True)

    def finish(self, chunk: int) -> None:
        ops.decode(self._sent[chunk], self._reduced[chunk], self._buffer, self.channel.error)
