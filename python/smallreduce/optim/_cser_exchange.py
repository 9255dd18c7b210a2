"""What the ranks exchange: any codec's share of a flat tensor, or blocks of the parameters themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce._blocks import put, take
from smallreduce.codecs import Codec, RandomBlocks
from smallreduce.collectives._channel import Channel, Start
from smallreduce.collectives._count import Count
from smallreduce.collectives._engine_for import engine_for

__all__ = ["BlockAverage", "InFlight", "PartialSync", "mean_"]


class InFlight(Protocol):
    def wait(self) -> object: ...


class PartialSync:
    """PSync of the paper for tensors of one layout: each rank keeps what its codec takes away from its own tensor, and
    all get the mean of what is left.

    Where the codec encodes the mean once more, what that takes away is kept by the rank that encodes it, and sent with
    the next.

    Args:
        segments: ``(offset, length)`` of the parameters in the flat fp32 tensors.
        codec: None: exact, nothing is kept.
        number: The random bits depend on it; another for each sync.

    Attributes:
        server: That residual (fp32, in the codec's domain); of no elements where there is none.
        server_origins: int64, the block of the flat tensors that each of its blocks of 32 stands for.
    """

    def __init__(
        self, segments: Sequence[tuple[int, int]], codec: Codec | None, number: int, seed: int, channel: Channel
    ) -> None:
        self.codec = codec
        self._number = number
        self._seed = seed
        self._channel = channel
        self._engine = None if codec is None else engine_for(segments, codec, torch.float32, channel)
        self.server = torch.zeros(0 if self._engine is None else self._engine.server_numel, device=channel.device)
        self.server_origins = torch.empty(0, dtype=torch.int64) if self._engine is None else self._engine.server_origins

    def start(self, flat: Tensor, residual: Tensor | None, step: int, background: bool, count: Count) -> InFlight:
        """Starts it, in place: ``flat`` becomes the mean. ``residual`` is added before, and replaced by what is kept;
        None where nothing is."""
        if self._engine is None:
            count.add_all_reduce(flat, self._channel.world_size)
            return _sum(flat.mul_(1.0 / self._channel.world_size), self._channel)
        work = self._engine.launch(
            flat,
            dist.ReduceOp.AVG,
            worker=residual,
            server=self.server if self.server.numel() else None,
            seed=self._seed,
            bucket=self._number,
            step=step,
            start=Start(background=background),
        )
        count.collectives += self._engine.collectives
        count.bytes_sent += self._engine.bytes_sent
        return work

    def restore(self, server: Tensor) -> None:
        """Takes over a saved ``server``.

        Raises:
            ValueError: It is of another layout.
        """
        if server.dtype != torch.float32 or server.shape != self.server.shape:
            raise ValueError(
                f"a server's residual must have {self.server.numel()} elements of torch.float32, got shape "
                f"{tuple(server.shape)} of {server.dtype}"
            )
        self.server.copy_(server)


class BlockAverage:
    """Averages blocks of the parameters, the same on all ranks, where they stand: implementation II of the paper.

    Args:
        parameters: fp32.
        number, seed: The choice depends on them.
    """

    def __init__(self, parameters: Sequence[Tensor], number: int, seed: int, channel: Channel) -> None:
        self._parameters = parameters
        self._number = number
        self._seed = seed
        self._channel = channel

    def start(self, codec: RandomBlocks, step: int, count: Count) -> InFlight:
        """Starts the average of what ``codec`` chooses in this step; call :meth:`finish` once it is there."""
        # Row-major order: only a parameter of another memory format is copied.
        self._flat = [parameter.detach().contiguous().view(-1) for parameter in self._parameters]
        self._chosen = [
            codec.choose(flat.numel(), self._seed, self._number, index, step, self._channel.device)
            for index, flat in enumerate(self._flat)
        ]
        self._mean = take(self._chosen, self._flat).mul(1.0 / self._channel.world_size)
        count.add_all_reduce(self._mean, self._channel.world_size)
        return _sum(self._mean, self._channel)

    def finish(self) -> None:
        """Puts the average in its place."""
        put(self._chosen, self._flat, self._mean)
        for parameter, flat in zip(self._parameters, self._flat, strict=True):
            if flat.data_ptr() != parameter.data_ptr():
                parameter.copy_(flat.view(parameter.shape))
        del self._flat, self._chosen, self._mean


def _sum(tensor: Tensor, channel: Channel) -> dist.Work:
    work: dist.Work = dist.all_reduce(tensor, group=channel.group, async_op=True)
    return work


def mean_(tensors: Sequence[Tensor], channel: Channel, count: Count) -> None:
    """Replaces tensors by their means over the ranks."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike]).mul_(1.0 / channel.world_size)
        count.add_all_reduce(flat, channel.world_size)
        _sum(flat, channel).wait()
        for tensor, mean in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(mean.view(tensor.shape))
