"""How a module is sharded: what its buckets are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from smallreduce.collectives import Count
from smallreduce.fsdp._leg import Leg
from smallreduce.fsdp._memory import Feedback

__all__ = ["Policy", "Ranks"]


@dataclass(frozen=True)
class Ranks:
    """Among which ranks.

    Attributes:
        shard: Each owns a part of every bucket.
        replicas: Those that own the same parts, where the model is replicated (HSDP).
        device: Where the parameters live.
    """

    shard: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    device: torch.device

    @property
    def replica_count(self) -> int:
        return 1 if self.replicas is None else self.replicas.size()

    @property
    def row(self) -> int:
        """This rank's number among all, replica after replica."""
        replica = 0 if self.replicas is None else self.replicas.rank()
        return replica * self.shard.size() + self.shard.rank()


@dataclass(frozen=True)
class Policy:
    """The arguments of :func:`smallreduce.ragged.fully_shard`, checked.

    Attributes:
        ranks: Among which.
        weights, gradients, between: Codecs and counters of what is gathered, reduced, and averaged over replicas.
        feedback: Error feedback for gradients.
        node_size: Ranks of a node, where codecs are a pair.
        precision: torch's policy.
        setup: What comparing all this over the ranks has sent.
    """

    ranks: Ranks
    weights: Leg
    gradients: Leg
    between: Leg
    feedback: Feedback | None
    node_size: int | None
    precision: MixedPrecisionPolicy
    setup: Count

    def __str__(self) -> str:
        codecs = ", ".join(f"{name} {leg.stats().codec}" for name, leg in self._legs.items())
        return (
            f"{codecs}, feedback {self.feedback}, node_size {self.node_size}, seed {self.weights.seed}, "
            f"{self.precision}"
        )

    @property
    def _legs(self) -> dict[str, Leg]:
        return {"weights": self.weights, "gradients": self.gradients, "between replicas": self.between}

    def takes_feedback(self, dtype: torch.dtype) -> bool:
        """Whether something is owed to the gradients of trainable parameters of a dtype."""
        if self.feedback is None or self.ranks.shard.size() == 1:
            return False
        return not self.gradients.is_exact(self.reduce_dtype(dtype))

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the unsharded parameters, and of their gradients as they are computed, for parameters of a dtype."""
        chosen = self.precision.param_dtype
        return dtype if chosen is None or not dtype.is_floating_point else chosen

    def reduce_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which gradients are reduced."""
        return self.precision.reduce_dtype or self.compute_dtype(dtype)
