"""Models and data of the DDP tests, all functions of (seed, rank, step)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Given(nn.Module):
    """Its gradients are what it is called with: d/dp of sum(p * x) is x, exactly.

    Parameters are used in the order of ``use``, and DDP rebuilds its buckets by the order in which that makes their
    gradients ready.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], use: Sequence[int] | None = None) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
        self.use = list(range(len(shapes))) if use is None else list(use)

    def forward(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        # A chain, so that backward meets the parameters one after the other, the last used first.
        total = torch.zeros(())
        for index in self.use:
            gradient = gradients[index]
            if gradient is not None:
                total = total + (self.weights[index] * gradient).sum()
        return total


def dyadic(shape: tuple[int, ...], *key: int) -> torch.Tensor:
    """Multiples of 1/8 up to 8: sums of many of them, and of their quantisation errors, are exact in fp32."""
    generator = torch.Generator().manual_seed(hash(key) & 0x7FFFFFFF)
    return torch.randint(-64, 65, shape, generator=generator) / 8.0


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 7))


def batch(rank: int, step: int, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(rows, 24, generator=generator)
    # Something that can be learnt.
    return x, torch.sin(x[:, :7] * 2) + x[:, 7:14]


def loss_of(ddp: nn.Module, rank: int, step: int) -> torch.Tensor:
    x, y = batch(rank, step)
    return nn.functional.mse_loss(ddp(x), y)


def gradients(module: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in module.parameters()]


def equal(ours: Sequence[torch.Tensor | None], theirs: Sequence[torch.Tensor | None]) -> bool:
    return len(ours) == len(theirs) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def same_on_all_ranks(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors have the same bits on all ranks; the same answer on all."""
    mine = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, theirs) for theirs in everyone)


def wrap(module: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module, **options)
