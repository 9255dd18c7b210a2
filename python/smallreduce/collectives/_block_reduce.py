"""The all-reduce of blocks that all ranks choose alike: no packets, but torch's own all-reduce of fewer elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce._blocks import put, take
from smallreduce._layout import BLOCK
from smallreduce.codecs import RandomBlocks
from smallreduce.collectives._channel import Channel
from smallreduce.collectives._engine import BucketEngine
from smallreduce.collectives._links import Exchange

__all__ = ["BlockReduce"]

_LARGEST = torch.finfo(torch.float32).max

_TILE = 1 << 16
"""Elements that are read, added and checked while they are in a CPU's cache."""


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
        self._segments = list(segments)
        self._owed_at: list[tuple[int, int]] = []  # where each segment's residual stands
        blocks = 0
        for _, length in segments:
            codec.count(length)  # refuses too many blocks, before anything has begun
            self._owed_at.append((BLOCK * blocks, length))
            blocks += -(-length // BLOCK)
        self.worker_numel = BLOCK * blocks
        self.collectives = 1

    def _prepare(self, server: Tensor | None, seed: int, bucket: int, step: int | Tensor) -> None:
        self._chosen = [
            self._codec.choose(length, seed, bucket, number, int(step), self.channel.device)
            for number, (_, length) in enumerate(self._segments)
        ]
        self.channel.use(*(chosen.rows for chosen in self._chosen))
        world = self.channel.world_size
        self.bytes_sent = 2 * (world - 1) * 4 * sum(chosen.numel for chosen in self._chosen) // world

    def encode(self, chunk: int) -> None:
        """Nothing yet: the sum may be taken in the buffer itself, which stays as it is until the ranks agree."""

    def send(self, chunk: int, tag: int) -> Exchange:
        with self._writing():
            buffer = _parts(self._buffer, self._segments)
            owed = None if self._worker is None else _parts(self._worker, self._owed_at)
            checks = [_scan(x, None if owed is None else owed[number]) for number, x in enumerate(buffer)]
            # A single slice of fp32 is summed where it stands.
            packed = self._packed = take(self._chosen, buffer).float()
            self._mark(packed, checks)
            if owed is not None:
                self._pay(packed, owed)
            self._clear(buffer)
            # The factor comes before the sum, as in DDP without a hook.
            if self._factor != 1.0:
                packed.mul_(self._factor)
            work: dist.Work = dist.all_reduce(packed, group=self.channel.group, async_op=True)
        return work

    def turn(self, chunk: int, tag: int) -> None:
        """There is one stage only."""

    def finish(self, chunk: int) -> None:
        if self._in_place:
            return
        with self._writing():
            packed = self._packed
            if self._dtype != torch.float32:
                largest = torch.finfo(self._dtype).max
                packed = torch.where(packed.isinf(), packed, packed.clamp(-largest, largest)).to(self._dtype)
            put(self._chosen, _parts(self._buffer, self._segments), packed)

    def done(self) -> None:
        del self._chosen, self._packed
        super().done()

    def _writing(self) -> torch.inference_mode:
        # Inference tensors can be written to in inference mode alone, which is the caller's thread's.
        return torch.inference_mode(any(t is not None and t.is_inference() for t in (self._buffer, self._worker)))

    @property
    def _in_place(self) -> bool:
        return self._packed.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr()

    def _mark(self, packed: Tensor, checks: Sequence[Tensor]) -> None:
        """Makes the first element chosen of a segment NaN if any of its elements is not finite, lest it be lost."""
        first = 0
        for check, chosen in zip(checks, self._chosen, strict=True):
            packed[first : first + 1].masked_fill_(check.isnan(), torch.nan)
            first += chosen.numel

    def _pay(self, packed: Tensor, owed: Sequence[Tensor]) -> None:
        """Moves what is owed into ``packed``, except where that is not finite."""
        paid = take(self._chosen, owed)
        finite = packed.isfinite()
        packed.copy_(torch.where(finite, paid, packed))
        put(self._chosen, owed, paid.masked_fill_(finite, 0.0))

    def _clear(self, buffer: Sequence[Tensor]) -> None:
        """Sets to zero all but what is summed where it stands."""
        gaps = list(buffer)
        if self._in_place:
            pairs = list(zip(self._chosen, buffer, strict=True))
            gaps = [gap for chosen, x in pairs for gap in (x[: chosen.offset], x[chosen.offset + chosen.length :])]
        torch._foreach_zero_(gaps)


def _parts(flat: Tensor, places: Sequence[tuple[int, int]]) -> list[Tensor]:
    return [flat.narrow(0, offset, length) for offset, length in places]


def _scan(x: Tensor, owed: Tensor | None) -> Tensor:
    """Adds all of ``x`` that is finite to what is owed, unless nothing is kept. Returns NaN if not all is, else 0."""
    checks = [x.new_zeros(())]
    size = _TILE if x.device.type == "cpu" else max(x.numel(), 1)
    for begin in range(0, x.numel(), size):
        tile = x[begin : begin + size]
        low, high = tile.aminmax()
        checks.append(0 * low + 0 * high)
        if owed is not None:
            owed[begin : begin + size].add_(tile.nan_to_num(0.0, 0.0, 0.0)).clamp_(-_LARGEST, _LARGEST)
    return torch.stack(checks).sum()
