"""How a module is sharded: what its buckets are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from smallreduce.fsdp._leg import Leg

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


@dataclass(frozen=True)
class Policy:
    """The arguments of :func:`smallreduce.ragged.fully_shard`, checked.

    Attributes:
        ranks: Among which.
        weights, gradients, between: Codecs and counters of what is gathered, reduced, and averaged over replicas.
        node_size: Ranks of a node, where codecs are a pair.
        precision: torch's policy.
    """

    ranks: Ranks
    weights: Leg
    gradients: Leg
    between: Leg
    node_size: int | None
    precision: MixedPrecisionPolicy

    def __str__(self) -> str:
        codecs = ", ".join(f"{name} {leg.stats().codec}" for name, leg in self._legs.items())
        return f"{codecs}, node_size {self.node_size}, seed {self.weights.seed}, {self.precision}"

    @property
    def _legs(self) -> dict[str, Leg]:
        return {"weights": self.weights, "gradients": self.gradients, "between replicas": self.between}

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the unsharded parameters, and of their gradients as they are computed, for parameters of a dtype."""
        chosen = self.precision.param_dtype
        return dtype if chosen is None or not dtype.is_floating_point else chosen

    def reduce_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which gradients are reduced."""
        return self.precision.reduce_dtype or self.compute_dtype(dtype)
