"""Which engine all-reduces a bucket: by the codec and, if it is sparse, by the sizes of its packets and the group."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smallreduce._layout import Layout
from smallreduce.codecs import Codec, PacketCodec, RandomBlocks
from smallreduce.collectives._block_reduce import BlockReduce
from smallreduce.collectives._channel import Channel
from smallreduce.collectives._engine import AllReduce, BucketEngine
from smallreduce.collectives._gather_reduce import GatherReduce

__all__ = ["engine_for", "gathers"]

GATHER_RANKS = 4
"""Up to so many ranks, sparse packets are gathered whatever their size."""

GATHER_NBYTES = 1 << 17
"""Among more, they are while a rank sends no more bytes than this: 1 ms on a link of 1 Gb/s. Neither number is
measured; the reasoning is that a second exchange takes about as long."""


def gathers(packet_nbytes: int, world_size: int) -> bool:
    """Whether sparse packets, one of ``packet_nbytes`` from each of ``world_size`` ranks, go whole to all ranks.

    A rank sends ``(W - 1) * P`` bytes so, and about ``2 * (W - 1) / W * P`` where packets are split among the ranks,
    which never comes to ``2 * P``. Splitting costs a second exchange, a second selection, and what that one leaves
    behind. The same on all ranks.
    """
    return world_size <= GATHER_RANKS or (world_size - 1) * packet_nbytes <= GATHER_NBYTES


def engine_for(segments: Sequence[tuple[int, int]], codec: Codec, dtype: torch.dtype, channel: Channel) -> BucketEngine:
    """The engine for ``segments``, ``(offset, length)`` in elements of a flat buffer of ``dtype``; the same kind on all
    ranks.

    Raises:
        TypeError: No engine takes the codec.
    """
    if isinstance(codec, RandomBlocks):
        return BlockReduce(segments, codec, dtype, channel)
    if not isinstance(codec, PacketCodec):
        raise TypeError(f"no all-reduce is known for the codec {codec}")
    if codec.format.is_sparse and gathers(Layout.build(segments, codec.format, dtype).stride, channel.world_size):
        return GatherReduce(segments, codec, dtype, channel)
    return AllReduce(segments, codec, dtype, channel)
