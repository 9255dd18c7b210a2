"""The all-gather of one FSDP2 module: its weights as packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.codecs import PacketCodec
from smallreduce.collectives import AllGather, Channel, all_gather_for, channel_of
from smallreduce.collectives._engine import Segments
from smallreduce.collectives._levels import Levels
from smallreduce.fsdp._leg import Gathering, Leg, borrow
from smallreduce.fsdp._torch_groups import Bucket

__all__ = ["WeightGather", "borrow_engine", "check_group"]


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

    @property
    def nbytes(self) -> int:
        """Of the packets that are kept."""
        return 0 if self._kept is None else self._kept.nbytes

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
        check_group(self._bucket, group)
        weights = (step, self._bucket.version) if self._keep_packets else None
        if self._kept is not None and in_backward and self._kept_of == weights:
            self._kept.decode(output_tensor)
            leg.count(uncompressed, 0)
            return None
        channel = channel_of(group, output_tensor.device)
        form = leg, self._segments, numel, dtype, channel, self._node_size
        give_back: Callable[[], None] | None = None
        if self._keep_packets and self._bucket.reshards_after_forward:
            engine = self._kept = self._kept or gather_engine(*form)
            self._kept_of = weights
        else:
            engine, give_back = borrow_engine(*form)
        work = engine.launch(output_tensor, input_tensor, leg.seed, 3 * self._bucket.number, step, after=give_back)
        leg.count(uncompressed, engine.bytes_sent)
        if not async_op and output_tensor.is_cuda:
            # For the stream of torch that this is called on; the host waits for nothing.
            work.wait()
            return None
        return Gathering(work)


def check_group(bucket: Bucket, group: dist.ProcessGroup) -> None:
    """Raises RuntimeError unless it is the group that the module is sharded over."""
    if group.size() != bucket.shard_group.size():
        raise RuntimeError(
            f"{bucket.label} gathers over {group.size()} ranks, but is sharded over {bucket.shard_group.size()}: "
            "compressed weights bear no int in reshard_after_forward"
        )


def gather_engine(
    leg: Leg, segments: Segments, numel: int, dtype: torch.dtype, channel: Channel, node_size: int | None
) -> AllGather:
    """The engine for a module's weights, on one level or, with ``node_size``, on two."""
    assert isinstance(leg.codec, PacketCodec)
    route = channel if node_size is None else Levels(channel, node_size)
    return all_gather_for(segments, numel, leg.codec, dtype, route)


def borrow_engine(
    leg: Leg, segments: Segments, numel: int, dtype: torch.dtype, channel: Channel, node_size: int | None
) -> tuple[AllGather, Callable[[], None]]:
    """One that is idle, and what gives it back."""
    key = ("fsdp.gather", segments, leg.codec, dtype, node_size)
    return borrow(channel, key, lambda: gather_engine(leg, segments, numel, dtype, channel, node_size))
