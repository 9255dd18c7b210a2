"""What the state of a compressed model is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from smallreduce.collectives import Count
from smallreduce.fsdp._leg import Leg
from smallreduce.fsdp._memory import Memory

__all__ = ["Part", "Reducer", "Steps"]


@dataclass(frozen=True)
class Part:
    """What one call has compressed: all of a model, or one module.

    Attributes:
        weights, gradients, between: Codecs and counters.
        feedback, seed: As given.
        setup: What comparing the configuration has sent.
    """

    weights: Leg
    gradients: Leg
    between: Leg
    feedback: str | None
    seed: int
    setup: Count


class Steps(Protocol):
    """How far a module has come."""

    def stored(self) -> list[int]:
        """The numbers that are saved; as many for each module."""

    def restore(self, stored: Sequence[int]) -> None:
        """Takes over what :meth:`stored` gave."""


class Reducer(Protocol):
    """What reduces the gradients of some parameters."""

    @property
    def label(self) -> str:
        """For messages."""

    @property
    def reduce_dtype(self) -> torch.dtype:
        """In which gradients are reduced."""

    @property
    def memory(self) -> Memory | None:
        """What is owed to them."""

    @property
    def partial(self) -> int:
        """Reductions in which some trainable parameters had no gradient."""
