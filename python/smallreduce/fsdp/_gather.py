"""The all-gather of one FSDP2 module: its weights as packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.codecs import PacketCodec
from smallreduce.collectives import AllGather, all_gather_for, channel_of
from smallreduce.collectives._levels import Levels
from smallreduce.fsdp._leg import Gathering, Leg, borrow
from smallreduce.fsdp._torch_groups import Bucket

__all__ = ["WeightGather"]


class WeightGather:
    """What ``FSDPModule.set_custom_all_gather`` takes.

    Args:
        bucket: The module's.
        leg: The codec; and what counts.
        step: That of the module, which goes on from one optimizer's step to the next.
        node_size: Ranks of a node, to gather on two levels; None: on one.
        keep_packets: Decode the packets of the forward pass again in backward, instead of gathering twice.
    """

    def __init__(
        self, bucket: Bucket, leg: Leg, step: Callable[[], int], node_size: int | None, keep_packets: bool
    ) -> None:
        self._bucket = bucket
        self._leg = leg
        self._step = step
        self._forward_step = 0  # of the latest forward pass
        self._node_size = node_size
        self._keep_packets = keep_packets
        self._kept: AllGather | None = None  # with the packets of its latest call
        self._kept_of: object = None  # the step and the version of the weights in them
        self._stock = bucket.all_gather
        self._segments = bucket.segments()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor: Tensor = self._stock.allocate(size, dtype=dtype, device=device)
        return tensor

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        """Gathers ``input_tensor``, this rank's part of ``output_tensor``.

        On the CPU a Work is returned even where ``async_op`` is False: torch waits for it before it copies the
        parameters out, so that what it prefetches in backward overlaps with computing there too.
        """
        leg, dtype, numel = self._leg, input_tensor.dtype, input_tensor.numel()
        in_backward = self._bucket.in_backward
        if not in_backward:
            # A backward pass, and what it computes again, sees the weights of its forward pass.
            self._forward_step = self._step()
        step = self._forward_step
        uncompressed = (group.size() - 1) * input_tensor.nbytes
        if leg.is_exact(dtype):
            leg.count(uncompressed)
            return self._stock(output_tensor, input_tensor, group, async_op)
        if group.size() != self._bucket.shard_group.size():
            raise RuntimeError(
                f"{self._bucket.label} gathers over {group.size()} ranks, but is sharded over "
                f"{self._bucket.shard_group.size()}: compressed weights bear no int in reshard_after_forward"
            )
        assert isinstance(leg.codec, PacketCodec)
        weights = (step, self._bucket.version) if self._keep_packets else None
        if self._kept is not None and in_backward and self._kept_of == weights:
            self._kept.decode(output_tensor)
            leg.count(uncompressed, 0)
            return None
        codec, segments = leg.codec, self._segments
        channel = channel_of(group, output_tensor.device)
        route = channel if self._node_size is None else Levels(channel, self._node_size)

        def make() -> AllGather:
            return all_gather_for(segments, numel, codec, dtype, route)

        give_back: Callable[[], None] | None = None
        if self._keep_packets and self._bucket.reshards_after_forward:
            engine = self._kept = self._kept or make()
            self._kept_of = weights
        else:
            engine, give_back = borrow(channel, ("fsdp.gather", segments, codec, dtype, self._node_size), make)
        work = engine.launch(output_tensor, input_tensor, leg.seed, 3 * self._bucket.number, step, after=give_back)
        leg.count(uncompressed, engine.bytes_sent)
        if not async_op and output_tensor.is_cuda:
            # For the stream of torch that this is called on; the host waits for nothing.
            work.wait()
            return None
        return Gathering(work)
