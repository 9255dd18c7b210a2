"""Models and data of the CSER tests: losses whose gradients are exact in fp32 and depend on where they are taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ddp.training import dyadic
from optim.cser_reference import F64

SHAPES = ((33, 9), (7,), (40,), (1,), (5, 30))
SIZES = [int(np.prod(shape)) for shape in SHAPES]


def centre(rank: int, index: int) -> torch.Tensor:
    return dyadic(SHAPES[index], 1, rank, index) / 4


def slope(rank: int, step: int, index: int) -> torch.Tensor:
    return dyadic(SHAPES[index], 2, rank, step, index) / 8


class Absolute(nn.Module):
    """``sum |x - centre| + sum slope * x``: its gradient is ``sign(x - centre) + slope``, on every rank another."""

    def __init__(self, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(dyadic(shape, 0, i) / 4) for i, shape in enumerate(shapes)])

    def forward(self, rank: int, step: int) -> torch.Tensor:
        return sum(((w - centre(rank, i)).abs() + slope(rank, step, i) * w).sum() for i, w in enumerate(self.weights))  # type: ignore[return-value]


def flat(tensors: Sequence[torch.Tensor]) -> F64:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double().numpy()


def gradient(rank: int, step: int, x: F64) -> F64:
    """What backward gives for flat parameters."""
    indices = range(len(SHAPES))
    at = flat([centre(rank, i) for i in indices])
    return np.sign(x - at) + flat([slope(rank, step, i) for i in indices])


def beginning(world: int) -> F64:
    return np.tile(flat(list(Absolute().parameters())), (world, 1))
