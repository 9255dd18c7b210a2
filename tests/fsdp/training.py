"""Models and data of the FSDP tests, all functions of (seed, rank, step)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

VOCABULARY, WIDTH, LENGTH = 37, 24, 5

POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16-reduce": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
    "fp16-reduce": MixedPrecisionPolicy(reduce_dtype=torch.float16),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 41)
        self.back = nn.Linear(41, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(torch.tanh(self.wide(self.norm(x))))


class Model(nn.Module):
    """Shapes that no number of ranks divides, and an embedding that is also the head."""

    def __init__(self, blocks: int = 2, wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*[wrap(Block()) for _ in range(blocks)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


class Given(nn.Module):
    """Its gradients are what it is called with: d/dp of sum(p * x) is x, exactly."""

    def __init__(self, shapes: list[tuple[int, ...]], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, given: list[torch.Tensor | None]) -> torch.Tensor:
        total = torch.zeros(())
        for weight, gradient in zip(self.weights, given, strict=True):
            if gradient is not None:
                total = total + (weight * gradient).sum()
        return total


def sharded(
    seed: int = 0, *, policy: str = "fp32", freeze: bool = False, checkpoint: bool = False, **options: Any
) -> Model:
    """Each block and the root are FSDP modules."""
    torch.manual_seed(seed)
    model = Model(wrap=checkpoint_wrapper if checkpoint else lambda block: block)
    if freeze:
        for name, parameter in model.blocks[0].named_parameters():
            parameter.requires_grad_("wide" not in name)
        model.blocks[1].requires_grad_(False)
    for block in model.blocks:
        fully_shard(block, mp_policy=POLICIES[policy], **options)
    fully_shard(model, mp_policy=POLICIES[policy], **options)
    return model


def loss_of(model: nn.Module, rank: int, step: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=generator)
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)) * scale


def locals_of(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """This rank's shards."""
    return [t.to_local().detach().clone() if isinstance(t, DTensor) else t for t in tensors]


def shards(model: nn.Module) -> list[torch.Tensor]:
    return [t for t in locals_of(list(model.parameters())) if t is not None]


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return locals_of([p.grad for p in model.parameters()])


def equal(ours: Sequence[torch.Tensor | None], theirs: Sequence[torch.Tensor | None]) -> bool:
    return len(ours) == len(theirs) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def same_on_all_ranks(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None = None) -> bool:
    """Whether the tensors have the same bits on all ranks; the same answer on all."""
    mine = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return all(torch.equal(mine, theirs) for theirs in everyone)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
