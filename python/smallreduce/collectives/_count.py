"""What a rank has sent, by the convention of :mod:`smallreduce.metrics`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Count", "ring_bytes"]


@dataclass
class Count:
    """What was sent: collectives, payload bytes of this rank, and what plain DDP would have sent."""

    collectives: int = 0
    bytes_sent: int = 0
    uncompressed_bytes: int = 0

    def add(self, other: Count) -> None:
        self.collectives += other.collectives
        self.bytes_sent += other.bytes_sent
        self.uncompressed_bytes += other.uncompressed_bytes

    def add_all_reduce(self, tensor: Tensor, world_size: int) -> None:
        self.collectives += 1
        self.bytes_sent += ring_bytes(tensor.numel() * tensor.element_size(), world_size)


def ring_bytes(nbytes: int, world_size: int) -> int:
    """What a rank sends in a ring all-reduce of ``nbytes``."""
    return 2 * nbytes * (world_size - 1) // world_size
