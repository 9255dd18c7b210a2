"""Compressed collectives on any torch process group.

For the layers above, beside the public functions: :func:`engine_for` makes the engine of one bucket, :func:`channel_of`
gives what it runs on, :func:`agree` compares what the ranks are about to do, :func:`prepare_or_refuse` tells the others
of an error of one rank, and :class:`Count` counts what was sent.
"""

from smallreduce.collectives._agreement import agree, prepare_or_refuse
from smallreduce.collectives._all_gather import AllGather, all_gather
from smallreduce.collectives._all_reduce import all_reduce
from smallreduce.collectives._channel import Channel, channel_of, shutdown
from smallreduce.collectives._count import Count, ring_bytes
from smallreduce.collectives._engine import AllReduce, BucketEngine
from smallreduce.collectives._engine_for import engine_for
from smallreduce.collectives._reduce_scatter import ReduceScatter, reduce_scatter
from smallreduce.collectives._work import Work

__all__ = [
    "AllGather",
    "AllReduce",
    "BucketEngine",
    "Channel",
    "Count",
    "ReduceScatter",
    "Work",
    "agree",
    "all_gather",
    "all_reduce",
    "channel_of",
    "engine_for",
    "prepare_or_refuse",
    "reduce_scatter",
    "ring_bytes",
    "shutdown",
]
