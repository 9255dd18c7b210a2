"""One of DDP's buckets: which elements take which codec, and the engines that reduce them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from smallreduce._layout import BLOCK
from smallreduce.codecs import Codec, PacketCodec
from smallreduce.collectives._channel import Channel
from smallreduce.collectives._count import Count
from smallreduce.collectives._engine_for import engine_for
from smallreduce.ddp._memory import Binding, blocks_of
from smallreduce.ddp._policy import Choice
from smallreduce.ddp._stats import BucketStats

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


@dataclass(frozen=True)
class Slot:
    """Where a parameter's gradient stands in a bucket's buffer (elements), and how it is reduced."""

    name: str
    offset: int
    numel: int
    choice: Choice


class Part:
    """The parameters of a bucket that one codec compresses: one call of one engine for each step.

    Attributes:
        number: Bucket and part, from which the random bits are derived; unique in a step.
        binding: The residuals; None without error feedback.
        input_norm, error_norm: 2-norms of the last measured step's input and of what its encoding took away.
    """

    def __init__(self, slots: Sequence[Slot], codec: Codec, dtype: torch.dtype, channel: Channel, number: int) -> None:
        self.slots = tuple(slots)
        self.codec = codec
        self.number = number
        self.engine = engine_for([(slot.offset, slot.numel) for slot in slots], codec, dtype, channel)
        self.binding: Binding | None = None
        self.input_norm: torch.Tensor | None = None
        self.error_norm: torch.Tensor | None = None

    @property
    def collectives(self) -> int:
        return self.engine.collectives

    def packet_blocks(self) -> list[int]:
        """Where the server residuals lie; see :func:`smallreduce.ddp._memory.bind`."""
        return self.engine.packet_blocks

    def measure_input(self, buffer: torch.Tensor, residual: torch.Tensor) -> None:
        """Takes the norm of gradient plus residual, before the engine replaces both."""
        norms = []
        block = 0
        for slot in self.slots:
            owed = residual.narrow(0, BLOCK * block, slot.numel)
            norms.append(torch.linalg.vector_norm(buffer.narrow(0, slot.offset, slot.numel) + owed))
            block += blocks_of(slot.numel)
        self.input_norm = torch.linalg.vector_norm(torch.stack(norms))

    def measure_error(self, residual: torch.Tensor) -> None:
        """Takes the norm of the residual, once the engine has written it."""
        self.error_norm = torch.linalg.vector_norm(residual)


@dataclass
class BucketPlan:
    """What the hook does with one bucket, as long as DDP keeps its form.

    Attributes:
        form: Identities of the parameters in their order, dtype and device: another form needs another plan.
        exact: The slots that are reduced without a codec.
        channel: Of the group, whose private groups take the exact collectives too; None at world size 1.
        held: Tensors of the last call. On CUDA, streams other than the one that they were allocated on may use them
            until DDP has waited for the call's future, which it has when the next call comes.
    """

    index: int
    form: tuple[object, ...]
    dtype: torch.dtype
    numel: int
    slots: tuple[Slot, ...]
    exact: tuple[Slot, ...]
    parts: tuple[Part, ...]
    channel: Channel | None
    steps: int = 0
    compressed_steps: int = 0
    count: Count = field(default_factory=Count)
    held: list[torch.Tensor | None] = field(default_factory=list)

    def reduce_exactly(self, buffer: torch.Tensor, channel: Channel) -> torch.futures.Future[torch.Tensor]:
        """Starts the reduction that DDP without a hook would do."""
        # DDP's own arithmetic: its bits depend on the factor coming before the sum.
        work = dist.all_reduce(buffer.mul_(1.0 / channel.world_size), group=channel.group, async_op=True)
        self.count.add_all_reduce(buffer, channel.world_size)

        def finish(future: torch.futures.Future[Any]) -> torch.Tensor:
            future.wait()
            return buffer

        reduced: torch.futures.Future[torch.Tensor] = work.get_future().then(finish)
        return reduced

    def stats(self) -> BucketStats:
        measured = [(part.input_norm, part.error_norm) for part in self.parts]
        inputs = [float(norm) for norm, error in measured if norm is not None and error is not None]
        errors = [float(error) for norm, error in measured if norm is not None and error is not None]
        norms = []
        for part in self.parts:
            if part.binding is not None:
                # T of docs/wire-formats.md, section 8, times 2^-5 shortens a vector by sqrt(32).
                hadamard = isinstance(part.codec, PacketCodec) and part.codec.format.hadamard
                factor = math.sqrt(BLOCK) if hadamard else 1.0
                norms += [float(part.binding.worker[0].norm()), factor * float(part.binding.server[0].norm())]
        relative = None
        if inputs:
            relative = math.hypot(*errors) / math.hypot(*inputs) if math.hypot(*inputs) else 0.0
        return BucketStats(
            index=self.index,
            dtype=self.dtype,
            numel=self.numel,
            compressed_numel=sum(slot.numel for part in self.parts for slot in part.slots),
            codecs=tuple(part.codec.spelling for part in self.parts),
            steps=self.steps,
            collectives=self.count.collectives,
            bytes_sent=self.count.bytes_sent,
            uncompressed_bytes=self.count.uncompressed_bytes,
            relative_error=relative,
            residual_norm=math.hypot(*norms) if norms else None,
        )


def slots_of(bucket: GradBucket, names: Sequence[str], choices: Sequence[Choice]) -> tuple[Slot, ...]:
    buffer = bucket.buffer()
    return tuple(
        Slot(name, int(gradient.storage_offset() - buffer.storage_offset()), gradient.numel(), choice)
        for name, gradient, choice in zip(names, bucket.gradients(), choices, strict=True)
    )


def plan_bucket(
    bucket: GradBucket,
    form: tuple[object, ...],
    slots: tuple[Slot, ...],
    channel: Channel | None,
    dtype: torch.dtype | None = None,
) -> BucketPlan:
    """Groups the slots by codec and makes an engine for each; without a channel (world size 1) everything is exact.

    Args:
        dtype: Of the buffers that the engines take; None: the bucket's own.
    """
    buffer = bucket.buffer()
    by_codec: dict[Codec, list[Slot]] = {}
    if channel is not None:
        for slot in slots:
            if slot.choice.codec is not None:
                by_codec.setdefault(slot.choice.codec, []).append(slot)
    parts = tuple(
        # 256 codecs in one bucket are more than there are.
        Part(part, codec, dtype or buffer.dtype, channel, bucket.index() << 8 | number)
        for number, (codec, part) in enumerate(by_codec.items())
        if channel is not None
    )
    exact = tuple(slot for slot in slots if channel is None or slot.choice.codec is None)
    return BucketPlan(bucket.index(), form, buffer.dtype, buffer.numel(), slots, exact, parts, channel)
