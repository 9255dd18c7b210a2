"""Which engine all-reduces a bucket: by the codec and, if it is sparse, by the sizes of its packets and the group."""

from __future__ import annotations

import torch

from smallreduce._layout import Layout
from smallreduce.codecs import Codec, PacketCodec, RandomBlocks
from smallreduce.collectives._block_reduce import BlockReduce
from smallreduce.collectives._engine import AllReduce, BucketEngine, Segments
from smallreduce.collectives._gather_reduce import GatherReduce
from smallreduce.collectives._levels import Levels, Route
from smallreduce.collectives._two_level_reduce import TwoLevelAllReduce

__all__ = ["engine_for", "gathers"]

GATHER_RANKS = 4
"""Up to so many ranks, sparse packets are gathered whatever their size: a rank sends W/2 times what it would send if
they were split, at most twice as much, and nothing is selected a second time, which delays what it leaves behind."""

GATHER_NBYTES = 1 << 17
"""Among more, they are while that sends no more than so many bytes beyond what splitting them does: 1 ms on a link of
1 Gb/s, about what the second exchange and the second selection take there. A figure by reasoning, not by measurement;
on a faster link both sides are smaller."""


def gathers(packet_nbytes: int, world_size: int) -> bool:
    """Whether sparse packets, one of ``packet_nbytes`` (P) from each of ``world_size`` (W) ranks, go whole to all.

    A rank sends ``(W - 1) * P`` bytes so, and about ``2 * (W - 1) / W * P`` where packets are split among the ranks:
    ``(W - 1) * (W - 2) / W * P`` fewer, nothing at two ranks. The same on all ranks.
    """
    more = (world_size - 1) * (world_size - 2) * packet_nbytes  # W times
    return world_size <= GATHER_RANKS or more <= world_size * GATHER_NBYTES


def engine_for(
    segments: Segments, codec: Codec | tuple[PacketCodec, PacketCodec], dtype: torch.dtype, route: Route
) -> BucketEngine:
    """The engine for ``segments``, ``(offset, length)`` in elements of a flat buffer of ``dtype``; the same kind on all
    ranks.

    Args:
        codec: One; or two on :class:`Levels`: inside the node and between nodes.

    Raises:
        TypeError: No engine takes the codec.
    """
    if isinstance(route, Levels):
        assert not isinstance(codec, Codec)
        if not route.is_flat:
            return TwoLevelAllReduce(segments, codec, dtype, route)
        codec, route = route.one_of(codec), route.channel
    if isinstance(codec, RandomBlocks):
        return BlockReduce(segments, codec, dtype, route)
    if not isinstance(codec, PacketCodec):
        raise TypeError(f"no all-reduce is known for the codec {codec}")
    if codec.format.is_sparse:
        layout = Layout.build(segments, codec.format, dtype)
        if gathers(layout.stride, route.world_size):
            return GatherReduce(layout, route)
    return AllReduce(segments, codec, dtype, route)
