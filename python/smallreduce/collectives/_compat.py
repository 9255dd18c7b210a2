"""Names of torch.distributed that differ between the supported versions (2.11 and later)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two and warns at each call of the older name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# torch 2.15 declares that it may return None, as it does outside of the group or without async_op.
_all_to_all: Any = dist.all_to_all_single


def all_gather_single(output: Tensor, input: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Starts an all-gather of equal contiguous tensors; ``input`` may be this rank's part of ``output``."""
    work: dist.Work = _all_gather(output, input, group=group, async_op=True)
    return work


def reduce_scatter_single(
    output: Tensor, input: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup
) -> dist.Work:
    """Starts a reduce-scatter into equal contiguous tensors."""
    work: dist.Work = _reduce_scatter(output, input, op=op, group=group, async_op=True)
    return work


def all_to_all_single(output: Tensor, input: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Starts an all-to-all of equal parts of contiguous tensors."""
    work: dist.Work = _all_to_all(output, input, group=group, async_op=True)
    return work
