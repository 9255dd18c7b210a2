"""What the hook did: figures per bucket, and what it left uncompressed and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BucketStats:
    """One of DDP's current buckets on this rank, since it took its present form.

    Attributes:
        index: DDP's index of the bucket.
        dtype, numel: Of its buffer; numel in elements.
        compressed_numel: Elements of the parameters that a codec compresses.
        codecs: Spellings of those codecs.
        steps: Times that the hook was called for it.
        collectives: Collectives issued for it.
        bytes_sent: Payload that this rank sent to others, by the convention of :mod:`smallreduce.metrics`.
        uncompressed_bytes: Payload that DDP without a hook would have sent.
        relative_error: What the last measured compression took away on this rank, ``||v - decoded|| / ||v||`` over the
            compressed elements, ``v`` the gradient plus the residual; None before the first measurement.
        residual_norm: 2-norm of this rank's residuals, the server's included; None without error feedback.
    """

    index: int
    dtype: torch.dtype
    numel: int
    compressed_numel: int
    codecs: tuple[str, ...]
    steps: int
    collectives: int
    bytes_sent: int
    uncompressed_bytes: int
    relative_error: float | None
    residual_norm: float | None

    @property
    def wire_ratio(self) -> float:
        """Uncompressed bytes for each byte sent; NaN where nothing is sent, at world size 1."""
        return self.uncompressed_bytes / self.bytes_sent if self.bytes_sent else float("nan")


@dataclass(frozen=True)
class Bypassed:
    """A parameter that is reduced exactly, and why."""

    name: str
    numel: int
    reason: str


@dataclass(frozen=True)
class Stats:
    """What :meth:`smallreduce.ddp.HookState.stats` returns; all figures are of this rank.

    Attributes:
        world_size: Ranks in the group; with one rank nothing is sent and nothing compressed.
        steps: Backward passes in which the hook was called; as all figures, of this object, not of a loaded state.
        uncompressed_steps: Those that were all exact: ``warmup_steps``, or all at world size 1.
        calls: Calls of the hook, one for each bucket and step. 0: it never ran.
        buckets: DDP's buckets as they are now.
        bypassed: The parameters that are never compressed.
        collectives, bytes_sent, uncompressed_bytes: Totals over all steps: buckets that DDP has since rebuilt, the
            moving of their server residuals and the comparing of configurations included.
    """

    world_size: int
    steps: int
    uncompressed_steps: int
    calls: int
    buckets: tuple[BucketStats, ...]
    bypassed: tuple[Bypassed, ...]
    collectives: int
    bytes_sent: int
    uncompressed_bytes: int

    @property
    def wire_ratio(self) -> float:
        """Uncompressed bytes for each byte sent; NaN where nothing is sent, at world size 1."""
        return self.uncompressed_bytes / self.bytes_sent if self.bytes_sent else float("nan")

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps ({self.uncompressed_steps} uncompressed) on {self.world_size} ranks: "
            f"{self.bytes_sent} bytes sent in {self.collectives} collectives, wire ratio {self.wire_ratio:.2f}"
        ]
        if self.world_size == 1:
            lines.append("world size 1: nothing to reduce, gradients are exact")
        for bucket in self.buckets:
            error = "-" if bucket.relative_error is None else f"{bucket.relative_error:.3g}"
            norm = "-" if bucket.residual_norm is None else f"{bucket.residual_norm:.3g}"
            lines.append(
                f"bucket {bucket.index}: {bucket.numel} elements of {bucket.dtype}, {bucket.compressed_numel} in "
                f"{', '.join(bucket.codecs) or 'no codec'}; wire ratio {bucket.wire_ratio:.2f}, "
                f"relative error {error}, residual norm {norm}"
            )
        if self.bypassed:
            numel = sum(parameter.numel for parameter in self.bypassed)
            reasons = sorted({parameter.reason for parameter in self.bypassed})
            lines.append(f"exact: {len(self.bypassed)} parameters, {numel} elements ({'; '.join(reasons)})")
        return "\n".join(lines)
