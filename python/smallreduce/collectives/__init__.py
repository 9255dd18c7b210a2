"""Compressed collectives on any torch process group.

For the layers above, beside the public functions: :func:`engine_for`, :func:`reduce_scatter_for` and
:func:`all_gather_for` make the engine of one bucket, :func:`group_of` and :func:`channel_of` give what it runs on,
:func:`agree` compares what the ranks are about to do, :func:`prepare_or_refuse` tells the others of an error of one
rank, and :class:`Count` counts what was sent.
"""

from smallreduce.collectives._agreement import agree, prepare_or_refuse
from smallreduce.collectives._all_gather import AllGather, all_gather, all_gather_for
from smallreduce.collectives._all_reduce import all_reduce
from smallreduce.collectives._channel import Channel, Start, channel_of, shutdown
from smallreduce.collectives._count import Count, ring_bytes
from smallreduce.collectives._engine import AllReduce, BucketEngine
from smallreduce.collectives._engine_for import engine_for
from smallreduce.collectives._group import group_of
from smallreduce.collectives._levels import Route
from smallreduce.collectives._reduce_scatter import ReduceScatter, reduce_scatter, reduce_scatter_for
from smallreduce.collectives._two_level import SDP4BIT, TwoLevel, two_level
from smallreduce.collectives._work import Work

__all__ = [
    "AllGather",
    "AllReduce",
    "BucketEngine",
    "Channel",
    "Count",
    "ReduceScatter",
    "Route",
    "SDP4BIT",
    "Start",
    "TwoLevel",
    "Work",
    "agree",
    "all_gather",
    "all_gather_for",
    "all_reduce",
    "channel_of",
    "engine_for",
    "group_of",
    "prepare_or_refuse",
    "reduce_scatter",
    "reduce_scatter_for",
    "ring_bytes",
    "shutdown",
    "two_level",
]
