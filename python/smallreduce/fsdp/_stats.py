"""What compression did for a sharded model: figures of this rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LegStats", "Stats"]


@dataclass(frozen=True)
class LegStats:
    """One of the ways that data take in a step: weights, gradients, or gradients between replicas.

    Attributes:
        codec: Spelling; of both levels, where there are two, as ``"intra, inter"``; where modules have several, with
            ``" | "`` between them. None: torch's own collective.
        calls: For this leg, one for each module that is sharded and time that it gathers or reduces.
        exact_calls: Those that took torch's own collective: all without a codec, else those of a dtype that no codec
            takes, and the first of differences.
        bytes_sent: Payload that this rank sent to others, by the convention of :mod:`smallreduce.metrics`.
        uncompressed_bytes: Payload that torch's own collective would have sent.
    """

    codec: str | None
    calls: int = 0
    exact_calls: int = 0
    bytes_sent: int = 0
    uncompressed_bytes: int = 0

    @property
    def wire_ratio(self) -> float:
        """Uncompressed bytes for each byte sent; NaN where nothing is sent."""
        return self.uncompressed_bytes / self.bytes_sent if self.bytes_sent else float("nan")

    @staticmethod
    def total(legs: Iterable[LegStats]) -> LegStats:
        """The sum of what several modules have sent."""
        legs = list(legs)
        codecs = dict.fromkeys(leg.codec for leg in legs)
        spelling = " | ".join(map(str, codecs)) if any(codecs) else None
        return LegStats(
            spelling,
            sum(leg.calls for leg in legs),
            sum(leg.exact_calls for leg in legs),
            sum(leg.bytes_sent for leg in legs),
            sum(leg.uncompressed_bytes for leg in legs),
        )


@dataclass(frozen=True)
class Stats:
    """What :meth:`smallreduce.fsdp.State.stats` returns; of this rank and this object, not of a loaded state.

    Attributes:
        world_size: Ranks of the shard group; where modules have several, of the largest. With one, nothing is gathered
            or scattered.
        replicas: Ranks of the replicate group; 1 without one.
        weights, gradients, between_replicas: The legs.
        partial_reductions: Reductions in which some trainable parameters of the module had no gradient. FSDP2 does not
            tell which, so groups restart at none of the others, and what feedback owes stays owed until the next; with
            :func:`smallreduce.ragged.fully_shard` that is so for those without a gradient alone.
        residual_nbytes: Of the residuals of this rank.
        kept_nbytes: Of what this rank keeps of the weights from one pass to another, packets or references.
        setup_bytes_sent: Payload of comparing the configuration over the ranks.
    """

    world_size: int
    replicas: int
    weights: LegStats
    gradients: LegStats
    between_replicas: LegStats
    partial_reductions: int
    residual_nbytes: int
    kept_nbytes: int
    setup_bytes_sent: int

    @property
    def _legs(self) -> tuple[LegStats, LegStats, LegStats]:
        return (self.weights, self.gradients, self.between_replicas)

    @property
    def collectives(self) -> int:
        """Calls of all legs."""
        return sum(leg.calls for leg in self._legs)

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank sent: all legs, and the comparing of configurations."""
        return self.setup_bytes_sent + sum(leg.bytes_sent for leg in self._legs)

    @property
    def uncompressed_bytes(self) -> int:
        """Payload that torch's own collectives would have sent."""
        return sum(leg.uncompressed_bytes for leg in self._legs)

    @property
    def wire_ratio(self) -> float:
        """Uncompressed bytes for each byte sent; NaN where nothing is sent."""
        return self.uncompressed_bytes / self.bytes_sent if self.bytes_sent else float("nan")

    def __str__(self) -> str:
        lines = [
            f"{self.world_size} ranks, {self.replicas} replicas: {self.bytes_sent} bytes sent in {self.collectives} "
            f"collectives, wire ratio {self.wire_ratio:.2f}; {self.residual_nbytes} bytes of residuals, "
            f"{self.kept_nbytes} of weights kept"
        ]
        if self.world_size == 1:
            what = "nothing" if self.between_replicas.codec is None else "nothing but what goes between replicas"
            lines.append(f"shard group of one rank: nothing is gathered or scattered, so {what} is compressed")
        names = ("weights", "gradients", "between replicas")
        for name, leg in zip(names, self._legs, strict=True):
            if leg.calls:
                lines.append(
                    f"{name}: {leg.codec or 'no codec'}, {leg.calls} calls ({leg.exact_calls} exact), "
                    f"{leg.bytes_sent} bytes, wire ratio {leg.wire_ratio:.2f}"
                )
        if self.partial_reductions:
            lines.append(f"{self.partial_reductions} reductions without the gradients of all trainable parameters")
        return "\n".join(lines)
