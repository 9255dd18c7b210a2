"""What :class:`SDP4Bit` did, and the memory that it takes: figures of this rank."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SDP4BitMemory", "SDP4BitStats"]


@dataclass(frozen=True)
class SDP4BitMemory:
    """Bytes of tensors on this rank, between steps.

    Attributes:
        weights: The trainable parameters, whole.
        master: This rank's part of their master; 0 where it is the weights themselves.
        optimizer_state: The tensors of the inner optimizer.
        gradients: Buffers for the gradients of the buckets in flight, and this rank's part of the reduced ones. The
            gradient of each parameter is freed as soon as it is in a buffer.
        packets: Buffers of the compressed collectives.
    """

    weights: int
    master: int
    optimizer_state: int
    gradients: int
    packets: int

    @property
    def total(self) -> int:
        return self.weights + self.master + self.optimizer_state + self.gradients + self.packets

    def __str__(self) -> str:
        return (
            f"{self.total} bytes: weights {self.weights}, master {self.master}, optimizer state "
            f"{self.optimizer_state}, gradients {self.gradients}, packets {self.packets}"
        )


@dataclass(frozen=True)
class SDP4BitStats:
    """What :meth:`SDP4Bit.stats` returns; all figures are of this rank and of this object, not of a loaded state.

    Attributes:
        world_size: Ranks in the group; with one rank nothing is sent and nothing compressed.
        buckets: How many.
        steps: Steps done.
        passes: Backward passes whose gradients were reduced.
        collectives: Collectives started; a compressed one counts as one.
        bytes_sent: Payload that this rank sent to others, by the convention of :mod:`smallreduce.metrics`: gradients,
            weights, norms, what ranks tell each other, and the first broadcast.
        gradient_bytes_sent, weight_bytes_sent: That of the gradients and of the weights alone.
        uncompressed_bytes: What gradients and weights would have been without codecs: a reduce-scatter in the master's
            dtype and an all-gather in that of the weights.
    """

    world_size: int
    buckets: int
    steps: int
    passes: int
    collectives: int
    bytes_sent: int
    gradient_bytes_sent: int
    weight_bytes_sent: int
    uncompressed_bytes: int

    @property
    def wire_ratio(self) -> float:
        """Uncompressed bytes for each byte of gradients and weights sent; NaN where nothing is sent."""
        sent = self.gradient_bytes_sent + self.weight_bytes_sent
        return self.uncompressed_bytes / sent if sent else float("nan")

    def __str__(self) -> str:
        return (
            f"{self.steps} steps on {self.world_size} ranks, {self.buckets} buckets: {self.bytes_sent} bytes sent "
            f"({self.gradient_bytes_sent} of gradients, {self.weight_bytes_sent} of weights) in {self.collectives} "
            f"collectives; wire ratio {self.wire_ratio:.2f}"
        )
