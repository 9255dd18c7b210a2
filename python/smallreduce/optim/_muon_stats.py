"""What :class:`Muon` did: figures of this rank."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MuonStats"]


@dataclass(frozen=True)
class MuonStats:
    """What :meth:`Muon.stats` returns; all figures are of this rank and of this object, not of a loaded state.

    Attributes:
        steps: Steps done, that included by which torch.distributed.checkpoint makes a state.
        matrices: Parameters that had a gradient in the last one.
        moved_matrices: Those of them that lay on several ranks.
        batches: In which they were moved, by one collective to their owners and one back.
        collectives: Collectives started so far.
        bytes_sent: Payload that this rank sent to others so far, by the convention of :mod:`smallreduce.metrics`:
            updates to their owners and back, in bf16, and what ranks tell each other.
        step_bytes_sent: That of the last step.
        imbalance: Newton-Schulz of the busiest rank by the mean of all in the last step, in multiplications; with
            several process groups, that of the one where it is largest. 1: all are equally busy, or nothing is
            sharded.
    """

    steps: int = 0
    matrices: int = 0
    moved_matrices: int = 0
    batches: int = 0
    collectives: int = 0
    bytes_sent: int = 0
    step_bytes_sent: int = 0
    imbalance: float = 1.0

    def __str__(self) -> str:
        return (
            f"{self.steps} steps: {self.bytes_sent} bytes sent in {self.collectives} collectives; in the last "
            f"one {self.moved_matrices} of {self.matrices} matrices moved in {self.batches} batches, "
            f"{self.step_bytes_sent} bytes sent, imbalance {self.imbalance:.3f}"
        )
