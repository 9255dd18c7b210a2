"""What Muon does to one matrix, on the rank or ranks that have it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smallreduce.optim._muon_newton_schulz import newton_schulz
from smallreduce.ragged import RaggedTensor

__all__ = ["ADJUSTMENTS", "Matrix"]

ADJUSTMENTS = ("original", "match_rms_adamw")
"""What ``adjust_lr_fn`` may be beside None, which is the first."""


@dataclass(frozen=True)
class Matrix:
    """A parameter that has a gradient.

    Attributes:
        momentum: The optimizer's buffer, of the parameter's kind and placement.
        options: Of the parameter's group.
    """

    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    options: Mapping[str, Any]

    def advance(self) -> Tensor:
        """Takes the gradient into the momentum and returns what is to be orthogonalised, in bf16: that is the first
        thing that Newton-Schulz would make of it, and half of the bytes to send."""
        weight = self.options["momentum"]
        self.momentum.lerp_(self.gradient, 1 - weight)
        update = self.gradient.lerp(self.momentum, weight) if self.options["nesterov"] else self.momentum
        return update.bfloat16()

    def orthogonalize(self, update: Tensor) -> Tensor:
        """Of the whole update, in whatever shape; flat or not, as it is given."""
        options = self.options
        shape = self.parameter.shape
        orthogonal = newton_schulz(update.view(shape), options["ns_coefficients"], options["ns_steps"], options["eps"])
        return orthogonal if update.dim() == 2 else orthogonal.reshape(-1)

    def apply(self, orthogonal: Tensor) -> None:
        """Weight decay, and the step along the orthogonalised update, which is of the parameter's kind.

        The operations are those of ``torch.optim.Muon``. In fp32 and fp64 their results do not depend on where a
        tensor was cut. In 16 bits torch's addition rounds once in the vector loops of the CPU and twice outside of
        them, where the last elements of a tensor are: of a sharded parameter all are rounded once.
        """
        parameter, options = self.parameter, self.options
        lr = options["lr"]  # of a tensor, the products are rounded to its dtype, as torch's are
        parameter.mul_(float(1 - lr * options["weight_decay"]))
        step = -float(lr * _adjustment(options["adjust_lr_fn"], parameter.shape))
        if isinstance(parameter, RaggedTensor) and parameter.dtype.itemsize == 2:
            parameter.copy_(parameter.float().add_(orthogonal, alpha=step))
        else:
            parameter.add_(orthogonal, alpha=step)


def _adjustment(adjust_lr_fn: str | None, shape: torch.Size) -> float:
    """What the learning rate is multiplied by."""
    rows, cols = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1, rows / cols)) if cols else 1.0
