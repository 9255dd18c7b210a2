"""What the tests of SDP4Bit have in common: models and data that are functions of (rank, step)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import smallreduce as sr
from ddp.training import Given

EXACT: dict[str, Any] = {"weights": None, "gradients": None}
BUCKET_MB = 0.001
MOMENTUM: tuple[type[torch.optim.Optimizer], dict[str, Any]] = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})

GIVEN_SHAPES = ((33, 9), (40,), (128, 5), (7, 1), (257, 3), (5,), (64, 64), ())
GIVEN_BUCKET_MB = 0.004


class Net(nn.Module):
    """Uneven shapes, a shared matrix, a frozen layer, a buffer, one parameter in channels_last, activation
    checkpointing if wanted."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embedding = nn.Linear(23, 9, bias=False)
        self.convolution = nn.Conv2d(3, 3, (2, 1)).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(24, 31).requires_grad_(False)
        self.middle = nn.Sequential(nn.Linear(31, 41), nn.LayerNorm(41), nn.Tanh(), nn.Linear(41, 9))
        self.tied = nn.Linear(23, 9, bias=False)
        self.tied.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.full((9,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        h = self.convolution(h.view(-1, 3, 3, 1)).flatten(1)
        h = self.frozen(torch.cat([h] * 4, 1))
        h = checkpoint(self.middle, h, use_reentrant=False) if self.checkpointed else self.middle(h)
        return nn.functional.linear(h + self.offset, self.tied.weight.t()) * self.scale


def net(dtype: torch.dtype = torch.float32, checkpointed: bool = False, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(checkpointed).to(dtype)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32, rows: int = 6) -> Tensor:
    return torch.randn(rows, 23, generator=torch.Generator().manual_seed(1000 * step + rank)).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), torch.sin(2 * x))


def given_model(dtype: torch.dtype = torch.float32) -> Given:
    module = Given(GIVEN_SHAPES)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in module.weights:
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return module.to(dtype)


def given_gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in GIVEN_SHAPES]


@dataclass
class Case:
    """A way to train."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.01, "weight_decay": 0.1})
    dtype: torch.dtype = torch.float32
    micro_batches: int = 1
    max_norm: float | None = None
    norm_type: float = 2.0
    checkpointed: bool = False
    groups: bool = False
    scheduled: bool = False
    scaled: bool = False

    def params(self, model: nn.Module) -> list[dict[str, Any]] | None:
        if not self.groups:
            return None
        trained = [p for p in model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() < 2], "lr": 0.02, "weight_decay": 0.0},
        ]


def train(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range, clip: Any, no_sync: Any
) -> list[Tensor]:
    """Trains, and returns the losses."""
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5) if case.scheduled else None
    scaler = torch.amp.GradScaler("cpu", enabled=case.scaled, init_scale=2.0**10)
    if isinstance(optimizer, sr.optim.SDP4Bit) and case.scaled:
        scaler = optimizer._scaler  # type: ignore[assignment]
    losses = []
    for step in steps:
        for micro in range(case.micro_batches):
            last = micro == case.micro_batches - 1
            with contextlib.nullcontext() if last else no_sync():
                loss = loss_of(model, batch(rank, 100 * step + micro, case.dtype))
                scaler.scale(loss).backward()
        if case.max_norm is not None:
            scaler.unscale_(optimizer)
            losses.append(clip(case.max_norm, case.norm_type).detach().clone())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
    return losses


def train_ddp(case: Case, rank: int, world: int, steps: range) -> tuple[list[Tensor], nn.Module]:
    model = net(case.dtype, case.checkpointed)
    # Beyond two ranks the order of gloo's sums depends on the buckets, which DDP then keeps as they are.
    ddp = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB, find_unused_parameters=world > 2)
    optimizer = case.optimizer(case.params(model) or [p for p in model.parameters() if p.requires_grad], **case.options)
    clip = lambda norm, kind: nn.utils.clip_grad_norm_(model.parameters(), norm, kind)  # noqa: E731
    return train(case, ddp, optimizer, rank, steps, clip, ddp.no_sync), model


def sdp4bit(case: Case, model: nn.Module, **options: Any) -> sr.optim.SDP4Bit:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if case.scaled else None
    options = {"bucket_cap_mb": BUCKET_MB, "scaler": scaler, **options}
    return sr.optim.SDP4Bit(model, case.optimizer, params=case.params(model), **options, **case.options)


def train_sdp4bit(
    case: Case, rank: int, steps: range, **options: Any
) -> tuple[list[Tensor], nn.Module, sr.optim.SDP4Bit]:
    model = net(case.dtype, case.checkpointed, seed=rank)  # rank 0's is broadcast
    with torch.no_grad():
        for parameter in model.parameters():  # those of a buffer, too
            parameter += 0.0
        model.get_buffer("offset").mul_(1 + rank)
    optimizer = sdp4bit(case, model, **options)
    losses = train(case, model, optimizer, rank, steps, optimizer.clip_grad_norm_, optimizer.no_sync)
    optimizer.synchronize()
    return losses, model, optimizer


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]
