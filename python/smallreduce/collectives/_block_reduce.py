"""The all-reduce of blocks that all ranks choose alike: no packets, but torch's own all-reduce of fewer elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce._layout import BLOCK
from smallreduce.codecs import RandomBlocks
from smallreduce.collectives._channel import Channel, Exchange
from smallreduce.collectives._engine import BucketEngine

__all__ = ["BlockReduce"]

_LARGEST = torch.finfo(torch.float32).max

_TILE = 1 << 16
"""Elements that are read, added and checked while they are in a CPU's cache."""


class _Segment(NamedTuple):
    offset: int
    length: int
    owed_at: int  # where its residual begins


class BlockReduce(BucketEngine):
    """All-reduce in fp32 of the blocks that the codec chooses in each segment; all other elements become zero
    (docs/wire-formats.md, section 12).

    The host chooses, so a ``step`` that is a tensor on a CUDA device is waited for.

    Args:
        segments, codec, dtype, channel: As for :class:`AllReduce`.
    """

    def __init__(
        self, segments: Sequence[tuple[int, int]], codec: RandomBlocks, dtype: torch.dtype, channel: Channel
    ) -> None:
        super().__init__(channel, [0])
        self._codec = codec
        self._dtype = dtype
        self._segments: list[_Segment] = []
        blocks = 0
        for offset, length in segments:
            self._segments.append(_Segment(offset, length, BLOCK * blocks))
            blocks += -(-length // BLOCK)
        self.worker_numel = BLOCK * blocks
        self.collectives = 1

    def _prepare(self, server: Tensor | None, seed: int, bucket: int, step: int | Tensor) -> None:
        self._spans = [
            self._codec.spans(segment.length, self._codec.key(seed, bucket, number, int(step)))
            for number, segment in enumerate(self._segments)
        ]
        self._lengths = [length for spans in self._spans for _, length in spans]
        world = self.channel.world_size
        self.bytes_sent = 2 * (world - 1) * 4 * sum(self._lengths) // world

    def encode(self, chunk: int) -> None:
        """Nothing yet: the sum may be taken in the buffer itself, which stays as it is until the ranks agree."""

    def send(self, chunk: int, tag: int) -> Exchange:
        with self._writing():
            checks = [self._scan(segment) for segment in self._segments]
            self._chosen = self._slices(self._buffer, [segment.offset for segment in self._segments])
            # A single slice of fp32 is summed where it stands.
            packed = self._chosen[0] if len(self._chosen) == 1 else _joined(self._chosen, self._buffer)
            self._packed = packed.float()
            self._mark(self._packed, checks)
            if self._worker is not None:
                self._pay(self._packed, self._worker)
            self._clear_the_rest()
            # The factor comes before the sum, as in DDP without a hook.
            if self._factor != 1.0:
                self._packed.mul_(self._factor)
            work: dist.Work = dist.all_reduce(self._packed, group=self.channel.group, async_op=True)
        return work

    def turn(self, chunk: int, tag: int) -> None:
        """There is one stage only."""

    def finish(self, chunk: int) -> None:
        packed = self._packed
        if len(self._chosen) == 1 and packed.data_ptr() == self._chosen[0].data_ptr():
            return
        with self._writing():
            if self._dtype != torch.float32:
                largest = torch.finfo(self._dtype).max
                packed = torch.where(packed.isinf(), packed, packed.clamp(-largest, largest))
            if self._chosen:
                torch._foreach_copy_(self._chosen, packed.split(self._lengths))

    def done(self) -> None:
        del self._chosen, self._packed
        super().done()

    def _writing(self) -> torch.inference_mode:
        # Inference tensors can be written to in inference mode alone, which is the caller's thread's.
        return torch.inference_mode(any(t is not None and t.is_inference() for t in (self._buffer, self._worker)))

    def _slices(self, tensor: Tensor, begins: Sequence[int]) -> list[Tensor]:
        """What is chosen, of segments that begin there in ``tensor``."""
        return [
            tensor.narrow(0, begin + offset, length)
            for begin, spans in zip(begins, self._spans, strict=True)
            for offset, length in spans
        ]

    def _scan(self, segment: _Segment) -> Tensor:
        """Adds all of a segment that is finite to its residual, if there is one. Returns NaN if not all is, else 0."""
        checks = [self._buffer.new_zeros(())]
        size = _TILE if self._buffer.device.type == "cpu" else max(segment.length, 1)
        for begin in range(0, segment.length, size):
            length = min(size, segment.length - begin)
            x = self._buffer.narrow(0, segment.offset + begin, length)
            low, high = x.aminmax()
            checks.append(0 * low + 0 * high)
            if self._worker is not None:
                owed = self._worker.narrow(0, segment.owed_at + begin, length)
                owed.add_(x.nan_to_num(0.0, 0.0, 0.0)).clamp_(-_LARGEST, _LARGEST)
        return torch.stack(checks).sum()

    def _mark(self, packed: Tensor, checks: Sequence[Tensor]) -> None:
        """Makes the first element chosen of a segment NaN if any of its elements is not finite, lest it be lost."""
        first = 0
        for check, spans in zip(checks, self._spans, strict=True):
            packed[first : first + 1].masked_fill_(check.isnan(), torch.nan)
            first += sum(length for _, length in spans)

    def _pay(self, packed: Tensor, worker: Tensor) -> None:
        """Moves what is owed into ``packed``, except where that is not finite."""
        places = self._slices(worker, [segment.owed_at for segment in self._segments])
        owed = _joined(places, worker)
        finite = packed.isfinite()
        packed.copy_(torch.where(finite, owed, packed))
        owed.masked_fill_(finite, 0.0)
        if places:
            torch._foreach_copy_(places, owed.split(self._lengths))

    def _clear_the_rest(self) -> None:
        gaps = []
        for segment, spans in zip(self._segments, self._spans, strict=True):
            end = 0
            for offset, length in [*spans, (segment.length, 0)]:
                gaps.append(self._buffer.narrow(0, segment.offset + end, offset - end))
                end = offset + length
        torch._foreach_zero_(gaps)


def _joined(slices: Sequence[Tensor], of: Tensor) -> Tensor:
    return torch.cat([*slices, of.new_empty(0)])
