"""The reduction between replicas of a sharded model (HSDP), for ``FSDPModule.set_all_reduce_hook``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives import Start, channel_of, engine_for, ring_bytes
from smallreduce.fsdp._leg import Leg, Progress, borrow
from smallreduce.fsdp._torch_groups import Bucket

__all__ = ["ReplicaReduce"]


class ReplicaReduce:
    """Averages one module's shard of the gradients over the replicas, in place.

    Args:
        bucket: The module's.
        leg: The codec; and what counts.
        progress: The module's.
        group: The ranks that hold the same shard.
    """

    def __init__(self, bucket: Bucket, leg: Leg, progress: Progress, group: dist.ProcessGroup) -> None:
        self._bucket = bucket
        self._leg = leg
        self._progress = progress
        self._group = group

    def __call__(self, reduce_output: Tensor) -> None:
        """It is complete when this returns (CUDA: for the current stream)."""
        if reduce_output.is_cuda:
            # torch has allocated it on its reduce-scatter stream, calls this on another, and may drop it right after.
            reduce_output.record_stream(torch.cuda.current_stream(reduce_output.device))
        leg, dtype, numel, group = self._leg, reduce_output.dtype, reduce_output.numel(), self._group
        step = self._progress.between
        self._progress.between += 1
        uncompressed = ring_bytes(reduce_output.nbytes, group.size())
        if leg.is_exact(dtype) or group.size() == 1:
            # As torch's own HSDP does.
            dist.all_reduce(reduce_output, op=dist.ReduceOp.AVG, group=group)
            leg.count(uncompressed)
            return
        codec = leg.codec
        assert codec is not None and not isinstance(codec, tuple)
        segments = self._bucket.segments(trainable=True)
        if sum(length for _, length in segments) != numel:
            segments = ((0, numel),)
        channel = channel_of(group, reduce_output.device)
        key = ("fsdp.replicas", segments, codec, dtype)
        engine, give_back = borrow(channel, key, lambda: engine_for(segments, codec, dtype, channel))
        work = engine.launch(
            reduce_output, dist.ReduceOp.AVG, None, None, leg.seed, 3 * self._bucket.number + 2, step,
            after=give_back, start=Start(background=False),
        )  # fmt: skip
        leg.count(uncompressed, engine.bytes_sent)
        work.wait()
