"""Tensors broadcast from rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives import Count

__all__ = ["broadcast_"]

_TOGETHER_NUMEL = 1 << 20


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor], group: dist.ProcessGroup, count: Count) -> None:
    """Gives all ranks the values of rank 0; small tensors of one dtype travel together."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        batch: list[Tensor] = []
        numel = 0
        for tensor in [tensor.detach() for tensor in tensors if tensor.dtype == dtype]:
            batch.append(tensor)
            numel += tensor.numel()
            if numel >= _TOGETHER_NUMEL:
                _broadcast(batch, group, count)
                batch, numel = [], 0
        _broadcast(batch, group, count)


def _broadcast(batch: list[Tensor], group: dist.ProcessGroup, count: Count) -> None:
    if not batch:
        return
    alone = len(batch) == 1 and batch[0].is_contiguous()
    flat = batch[0].view(-1) if alone else torch.cat([tensor.reshape(-1) for tensor in batch])
    dist.broadcast(flat, group_src=0, group=group)
    count.collectives += 1
    count.bytes_sent += (group.size() - 1) * flat.nbytes if group.rank() == 0 else 0
    if not alone:
        for tensor, values in zip(batch, flat.split([tensor.numel() for tensor in batch]), strict=True):
            tensor.copy_(values.view(tensor.shape))
