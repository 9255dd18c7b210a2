"""Compressed collectives for PyTorch: all-reduce, but small.

In use::

    import smallreduce as sr

    state = sr.ddp.register(ddp_model, "int4")     # one line for DistributedDataParallel
    sr.all_reduce(x, "int4")                       # or the collective itself
"""

from smallreduce import ddp, fsdp, metrics, optim, ragged
from smallreduce._native import build_info
from smallreduce.codecs import Cast, Codec, IntQuant, PacketCodec, RandomBlocks, Sign, TopK, codec, decode, encode
from smallreduce.collectives import TwoLevel, Work, all_gather, all_reduce, reduce_scatter, shutdown, two_level
from smallreduce.feedback import ErrorFeedback

__version__ = "0.1.0.dev0"

__all__ = [
    "Cast",
    "Codec",
    "ErrorFeedback",
    "IntQuant",
    "PacketCodec",
    "RandomBlocks",
    "Sign",
    "TopK",
    "TwoLevel",
    "Work",
    "all_gather",
    "all_reduce",
    "build_info",
    "codec",
    "ddp",
    "decode",
    "encode",
    "fsdp",
    "metrics",
    "optim",
    "ragged",
    "reduce_scatter",
    "shutdown",
    "two_level",
]
