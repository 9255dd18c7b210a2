"""The all-gather of one FSDP2 module: its weights as packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.codecs import PacketCodec
from smallreduce.collectives import AllGather, Channel, all_gather_for, channel_of
from smallreduce.collectives._engine import PartSegments, Segments
from smallreduce.collectives._levels import Levels
from smallreduce.fsdp._leg import Gathering, Leg, borrow
from smallreduce.fsdp._torch_groups import Bucket, Version

__all__ = ["WeightGather", "borrow_engine", "check_numel"]


class WeightGather:
    """What ``FSDPModule.set_custom_all_gather`` takes.

    A backward pass, and what it computes again, sees the weights with the random bits of the latest forward pass.

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
        self._kept_step = 0  # that of the packets
        self._kept_version: Version = ()  # of this rank's weights in them
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

        Raises:
            RuntimeError: In a backward pass with packets that are kept, where this rank's weights have changed since
                the forward pass; or the sizes are not those of the module.
        """
        leg, dtype, numel = self._leg, input_tensor.dtype, input_tensor.numel()
        in_backward = self._bucket.in_backward
        if not in_backward:
            self._forward_step = self._step()
        step = self._forward_step
        uncompressed = (group.size() - 1) * input_tensor.nbytes
        if leg.is_exact(dtype):
            leg.count(uncompressed)
            return self._stock(output_tensor, input_tensor, group, async_op)
        check_numel(self._bucket, self._segments, numel)
        # Whether anything is sent must not depend on what one rank alone knows.
        if self._kept is not None and in_backward and self._kept_step == step:
            if self._kept_version != self._bucket.version:
                raise RuntimeError(
                    f"the weights of {self._bucket.label} have changed since the latest forward pass, whose packets "
                    "are kept: run the backward pass before they change, or compress without keep_packets"
                )
            self._kept.decode(output_tensor)
            leg.count(uncompressed, 0)
            return None
        channel = channel_of(group, output_tensor.device)
        form = leg, self._segments, numel, dtype, channel, self._node_size
        give_back: Callable[[], None] | None = None
        if self._keep_packets and self._bucket.reshards_after_forward:
            if self._kept is None or self._kept.channel is not channel:  # which has been shut down
                self._kept = gather_engine(*form)
            engine = self._kept
            self._kept_step, self._kept_version = step, self._bucket.version
        else:
            self._kept = None
            engine, give_back = borrow_engine(*form)
        work = engine.launch(output_tensor, input_tensor, leg.seed, 3 * self._bucket.number, step, after=give_back)
        leg.count(uncompressed, engine.bytes_sent)
        if not async_op and output_tensor.is_cuda:
            # For the stream of torch that this is called on; the host waits for nothing.
            work.wait()
            return None
        return Gathering(work)


def check_numel(bucket: Bucket, segments: Segments, numel: int) -> None:
    """Raises RuntimeError unless a rank's part is of the module's parameters, one after another, and nothing else."""
    expected = sum(length for _, length in segments)
    if numel != expected:
        raise RuntimeError(
            f"{bucket.label} gathers {numel} elements from each rank, but its parameters have {expected} there: "
            "compress a model after everything that changes what its modules gather"
        )


def gather_engine(
    leg: Leg, segments: PartSegments, numel: int, dtype: torch.dtype, channel: Channel, node_size: int | None
) -> AllGather:
    """The engine for a module's weights, on one level or, with ``node_size``, on two."""
    assert isinstance(leg.codec, PacketCodec)
    route = channel if node_size is None else Levels(channel, node_size)
    return all_gather_for(segments, numel, leg.codec, dtype, route)


def borrow_engine(
    leg: Leg, segments: PartSegments, numel: int, dtype: torch.dtype, channel: Channel, node_size: int | None
) -> tuple[AllGather, Callable[[], None]]:
    """One that is idle, and what gives it back."""
    key = ("fsdp.gather", segments, leg.codec, dtype, node_size)
    return borrow(channel, key, lambda: gather_engine(leg, segments, numel, dtype, channel, node_size))
