"""The models of the FSDP tests, sharded by smallreduce.ragged, and what to compare of them."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule

import smallreduce as sr
from fsdp.training import POLICIES, Model

__all__ = ["full", "full_gradients", "full_parameters", "in_rank_order", "ragged"]


def ragged(
    seed: int = 0, *, policy: str = "fp32", freeze: bool = False, checkpoint: bool = False, **options: Any
) -> Model:
    """As ``fsdp.training.sharded``: each block and the root."""
    torch.manual_seed(seed)
    model = Model(wrap=checkpoint_wrapper if checkpoint else lambda block: block)
    if freeze:
        for name, parameter in model.blocks[0].named_parameters():
            parameter.requires_grad_("wide" not in name)
        model.blocks[1].requires_grad_(False)
    for block in model.blocks:
        sr.ragged.fully_shard(block, mp_policy=POLICIES[policy], **options)
    return sr.ragged.fully_shard(model, mp_policy=POLICIES[policy], **options)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded in one way or the other; a copy."""
    gather: Any = getattr(tensor, "full_tensor", None)
    with torch.no_grad():
        return tensor.detach().clone() if gather is None else gather().detach().clone()


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def full_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else full(p.grad) for name, p in model.named_parameters()}


def _reduce_scatter(output: Tensor, input: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    everyones = [torch.empty_like(input) for _ in range(group.size())]
    dist.all_gather(everyones, input, group=group)
    rank = group.rank()
    parts = [one.chunk(group.size())[rank] for one in everyones]
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    output.copy_(total / group.size() if op == dist.ReduceOp.AVG else total)


class _InRankOrder:
    """For FSDP2."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor: Tensor = self._stock.allocate(size, dtype=dtype, device=device)
        return tensor

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        _reduce_scatter(output_tensor, input_tensor, op, group)


@contextlib.contextmanager
def in_rank_order(stock: nn.Module) -> Iterator[None]:
    """Both models reduce gradients in the order of the ranks. torch's own reduce-scatter adds them up in a ring, and
    where in it depends on who owns an element, which is what differs between the two."""

    class Done:
        def wait(self) -> None:
            pass

    def ours(output: Tensor, input: Tensor, op: Any, group: dist.ProcessGroup) -> Done:
        _reduce_scatter(output, input, op, group)
        return Done()

    for module in stock.modules():
        if isinstance(module, FSDPModule):
            (state,) = module._get_fsdp_state()._fsdp_param_groups
            module.set_custom_reduce_scatter(_InRankOrder(state._reduce_scatter_comm))
    with unittest.mock.patch("smallreduce.ragged._reduction.reduce_scatter_single", ours):
        yield
