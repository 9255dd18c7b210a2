"""What the communication objects of all modules have in common: codec, randomness, engines, and what was sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from smallreduce._layout import ELEMENT_TYPES
from smallreduce.codecs import PacketCodec
from smallreduce.collectives import Channel, Work
from smallreduce.collectives._call import is_plain
from smallreduce.fsdp._stats import LegStats

__all__ = ["Codecs", "Gathering", "Leg", "Progress", "borrow"]

Codecs = PacketCodec | tuple[PacketCodec, PacketCodec]
"""Of one level, or inside a node and between nodes."""

E = TypeVar("E")


@dataclass
class Progress:
    """How far one module has come; random bits depend on it.

    Attributes:
        step: Reductions of its gradients over the shards.
        between: Those over the replicas.
    """

    step: int = 0
    between: int = 0

    def stored(self) -> list[int]:
        """What is saved of it."""
        return [self.step, self.between]

    def restore(self, stored: Sequence[int]) -> None:
        """Takes over what :meth:`stored` gave."""
        self.step, self.between = stored


@dataclass
class Leg:
    """Weights, gradients, or gradients between replicas.

    Attributes:
        codec: None: torch's own collective.
        seed: Base of the random bits.
    """

    codec: Codecs | None
    seed: int
    calls: int = 0
    exact_calls: int = 0
    bytes_sent: int = 0
    uncompressed_bytes: int = 0

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether torch's own collective takes data of this dtype."""
        if isinstance(self.codec, tuple):
            return dtype not in ELEMENT_TYPES
        return is_plain(self.codec, dtype) or dtype not in ELEMENT_TYPES

    def count(self, uncompressed_bytes: int, bytes_sent: int | None = None) -> None:
        """Adds a call; without ``bytes_sent`` one of torch's own collective."""
        self.calls += 1
        self.exact_calls += bytes_sent is None
        self.uncompressed_bytes += uncompressed_bytes
        self.bytes_sent += uncompressed_bytes if bytes_sent is None else bytes_sent

    def stats(self) -> LegStats:
        codec = ", ".join(map(str, self.codec)) if isinstance(self.codec, tuple) else self.codec
        spelling = None if codec is None else str(codec)
        return LegStats(spelling, self.calls, self.exact_calls, self.bytes_sent, self.uncompressed_bytes)


class Gathering(dist.Work):
    """Our Work in the form in which torch waits for one when it copies the parameters out."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def wait(self, timeout: Any = None) -> bool:
        return self._work.wait()

    def is_completed(self) -> bool:
        return self._work.is_completed()


def borrow(channel: Channel, key: tuple[Any, ...], make: Callable[[], E]) -> tuple[E, Callable[[], None]]:
    """An engine, and what gives it back to the channel when it is done. Modules of the same form share one, and with it
    its buffers."""
    engine: E = channel.borrow(key) or make()
    return engine, lambda: channel.keep(key, engine)
