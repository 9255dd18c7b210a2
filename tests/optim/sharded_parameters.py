"""Parameters whole and sharded, side by side: a function of a seed, the same on all ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smallreduce.ragged import RaggedShard, RaggedTensor

__all__ = ["Pair", "cut", "full", "give", "gradient", "pair"]

Pair = tuple[nn.Parameter, nn.Parameter]
"""A plain one, and one that is sharded."""


def cut(rng: random.Random, shape: Sequence[int], block: int, world: int) -> RaggedShard:
    """Cuts at multiples of ``block`` elements, so that some ranks may have nothing."""
    numel = math.prod(shape)
    cuts = sorted(min(block * rng.randint(0, -(-numel // block)), numel) for _ in range(world - 1))
    ends = [*cuts, numel]
    return RaggedShard.from_lengths(shape, [end - begin for begin, end in zip([0, *cuts], ends, strict=True)])


def pair(index: int, shape: Sequence[int], placement: RaggedShard, dtype: torch.dtype = torch.float32) -> Pair:
    full = gradient(0, index, shape, dtype)
    return nn.Parameter(full.clone()), nn.Parameter(RaggedTensor.distribute(full, placement))


def gradient(step: int, index: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Any numbers, of magnitudes that differ from row to row."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    values = torch.randn(tuple(shape), generator=generator)
    if values.dim() > 1:
        values *= torch.exp(2 * torch.randn((shape[0], *[1] * (values.dim() - 1)), generator=generator))
    return values.to(dtype)


def give(pair: Pair, step: int, index: int) -> None:
    """Gives both the same gradient."""
    plain, sharded = pair
    assert isinstance(sharded, RaggedTensor)
    full = gradient(step, index, plain.shape, plain.dtype)
    plain.grad = full.clone()
    sharded.grad = RaggedTensor.distribute(full, sharded.placement)


def full(tensor: Tensor) -> Tensor:
    """All of it; a collective where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, RaggedTensor) else tensor
