"""A model whose units note the weights that their forward and backward passes saw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint


class Seen(nn.Module):
    """Multiplies by its weight, and notes the weight that each pass saw."""

    def __init__(self, trainable: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(64), requires_grad=trainable)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return Product.apply(x, self.weight, self.seen)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.seen = seen
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        ctx.seen.append(weight.clone())
        return gradient * weight, gradient * x, None


class Two(nn.Module):
    """A first unit, trainable or frozen, and a second one that is trained; the second may be checkpointed."""

    def __init__(self, trainable: bool, recompute: bool | None) -> None:
        super().__init__()
        self.first, self.second = Seen(trainable), Seen()
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.ones(64, requires_grad=True)
        if self.recompute is None:
            return self.second(self.first(x)).sum()
        return self.second(checkpoint(self.first, x, use_reentrant=self.recompute)).sum()


def shard_each(model: nn.Module, **options: Any) -> nn.Module:
    for child in model.children():
        fully_shard(child, **options)
    return fully_shard(model, **options)
