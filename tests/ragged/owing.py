"""Error feedback composed from the operators, on whole parameters in one process; gradients whose sums are exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import smallreduce as sr
from fsdp.training import Given
from ragged.sharding import full
from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import PacketCodec

__all__ = ["Composed", "Units", "dyadic", "everyones", "gradients_of", "shard_units"]

_KEPT = sr.IntQuant(8, rounding="nearest")


def everyones(value: Any) -> list[Any]:
    """What each rank has."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def dyadic(shape: Sequence[int], rank: int, step: int) -> Tensor:
    """Multiples of 1/8 from 4 to 8, and their negatives.

    What a codec of integers loses of such, or of such and what it has lost before, is a multiple of 2^-14 (of 2^-13
    without the Hadamard transform, which adds 32 values): no group's largest is below 2, where a scale, of 8 bits,
    is one of 2^-13. All sums of a few are then exact in fp32, and so are means over powers of two."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    magnitudes = torch.randint(32, 65, tuple(shape), generator=generator) / 8.0
    return magnitudes * (2.0 * torch.randint(2, tuple(shape), generator=generator) - 1)


class Units(nn.Module):
    """Several models of which each has the gradients that it is called with."""

    def __init__(self, shapes: Sequence[Sequence[tuple[int, ...]]]) -> None:
        super().__init__()
        self.units = nn.ModuleList(Given(list(each)) for each in shapes)

    def forward(self, given: list[list[Tensor | None]]) -> Tensor:
        return torch.stack([unit(each) for unit, each in zip(self.units, given, strict=True)]).sum()


def shard_units(model: Units, **options: Any) -> Units:
    """Each of them by itself."""
    for unit in model.units:
        sr.ragged.fully_shard(unit, **options)
    return sr.ragged.fully_shard(model, **options)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """All of those that there are."""
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


class Composed:
    """The reduce-scatter with feedback of one parameter, on all ranks.

    Attributes:
        owed: What each rank keeps: fp32, or packets.
    """

    def __init__(
        self, shape: tuple[int, ...], world: int, codec: PacketCodec, beta: float | None = None, reset_every: int = 0
    ) -> None:
        numel = torch.Size(shape).numel()
        self._shape, self._beta, self._reset_every = shape, beta, reset_every
        self._layout = Layout.build([(0, numel)], codec.format, torch.float32)
        self._kept = Layout.build([(0, numel)], _KEPT.format, torch.float32)
        self._zeros = torch.zeros(numel)
        self.owed = [self._zeros.clone() if beta is None else self._packed(self._zeros) for _ in range(world)]

    def _packed(self, residual: Tensor) -> Tensor:
        packet = torch.zeros(self._kept.stride, dtype=torch.uint8)
        ops.encode(residual, self._kept, packet)
        return packet

    def _encode(self, x: Tensor, residual: Tensor, packet: Tensor) -> Tensor:
        """Encodes, and returns what is lost."""
        padded = torch.zeros(-(-len(residual) // 32) * 32)
        padded[: len(residual)] = residual
        ops.encode(x.reshape(-1), self._layout, packet, padded)
        return padded[: len(residual)]

    def reduce(self, given: Sequence[Tensor | None], step: int) -> Tensor | None:
        """The mean of the ranks' gradients; None: there is none in this step."""
        anew = self._beta is not None and step > 0 and step % self._reset_every == 0
        packets = torch.zeros(len(given), self._layout.stride, dtype=torch.uint8)
        for rank, x in enumerate(given):
            if x is None:
                if anew:
                    self.owed[rank] = self._packed(self._zeros)
                continue
            if self._beta is None:
                self.owed[rank] = self._encode(x, self.owed[rank], packets[rank])
                continue
            old = self._zeros.clone()
            if not anew:
                ops.decode(self.owed[rank], self._kept, old)
            lost = self._encode(x, old, packets[rank]) * (1 - self._beta)
            self.owed[rank] = self._packed(lost if anew else (lost / self._beta + old) * self._beta)
        if given[0] is None:
            return None
        mean = torch.empty(self._shape)
        ops.reduce(packets, self._layout.stride, len(given), 1 / len(given), self._layout, mean.view(-1))
        return mean
