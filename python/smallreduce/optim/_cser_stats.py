"""What :class:`CSER` did: figures of this rank."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CSERStats"]


@dataclass(frozen=True)
class CSERStats:
    """What :meth:`CSER.stats` returns; all figures are of this rank and of this object, not of a loaded state.

    Attributes:
        world_size: Ranks in the group; with one rank nothing is sent and nothing compressed.
        steps: Steps done.
        resets: Those that exchanged what the ranks differ by.
        skipped_steps: Steps not done since a GradScaler found an Inf or a NaN on some rank.
        compression_ratio: R_C as computed: :attr:`CSER.compression_ratio`.
        collectives: Collectives issued.
        bytes_sent: Payload that this rank sent to others, by the convention of :mod:`smallreduce.metrics`: that of the
            steps, of ``averaged()``, of comparing configurations and of the first broadcast.
        step_bytes_sent: That of the steps alone.
        uncompressed_bytes: Payload that an fp32 all-reduce of the gradients in each step would have sent.
        residual_norm: 2-norm of what this rank has not been able to send: what its parameters differ by from the model
            that all share, or the residual that is kept apart. None where neither is known: with ``average_blocks``,
            where nothing is compressed, and at world size 1.
    """

    world_size: int
    steps: int
    resets: int
    skipped_steps: int
    compression_ratio: float
    collectives: int
    bytes_sent: int
    step_bytes_sent: int
    uncompressed_bytes: int
    residual_norm: float | None

    @property
    def wire_ratio(self) -> float:
        """Uncompressed bytes for each byte sent in the steps; NaN where nothing is sent, at world size 1."""
        return self.uncompressed_bytes / self.step_bytes_sent if self.step_bytes_sent else float("nan")

    def __str__(self) -> str:
        norm = "-" if self.residual_norm is None else f"{self.residual_norm:.3g}"
        return (
            f"{self.steps} steps ({self.resets} resets, {self.skipped_steps} skipped) on {self.world_size} ranks: "
            f"{self.bytes_sent} bytes sent in {self.collectives} collectives; compression ratio "
            f"{self.compression_ratio:.2f}, wire ratio {self.wire_ratio:.2f}, residual norm {norm}"
        )
