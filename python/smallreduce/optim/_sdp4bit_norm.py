"""The norm of the reduced gradients of :class:`SDP4Bit`, of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives import Count
from smallreduce.collectives._compat import all_gather_single
from smallreduce.optim._sdp4bit_bucket import Bucket

__all__ = ["clip_"]


@torch.no_grad()
def clip_(
    buckets: Sequence[Bucket],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    group: dist.ProcessGroup,
    count: Count,
) -> Tensor:
    """See :meth:`SDP4Bit.clip_grad_norm_`."""
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0, got {norm_type}")
    total = _total_norm(buckets, float(norm_type), group, count)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {total.item()}, so they cannot be clipped; "
            "error_if_nonfinite=False scales them all the same"
        )
    # The formula of torch.nn.utils.clip_grads_with_norm_.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for bucket in buckets:
        bucket.scale(factor)
    return total


def _total_norm(buckets: Sequence[Bucket], norm_type: float, group: dist.ProcessGroup, count: Count) -> Tensor:
    device = buckets[0].weights.device
    mine = [one.tensor.grad for bucket in buckets for one in bucket.slices if one.tensor.grad is not None]
    wholes = [bucket.whole_gradients for bucket in buckets]
    norms = torch.tensor([0.0, float(None in wholes)], dtype=torch.float64, device=device)
    norms[0] = torch.nn.utils.get_total_norm(mine, norm_type)
    everyones = norms
    if group.size() > 1:
        everyones = torch.empty(2 * group.size(), dtype=torch.float64, device=device)
        all_gather_single(everyones, norms, group).wait()
        count.collectives += 1
        count.bytes_sent += (group.size() - 1) * norms.nbytes
    if not everyones[1::2].any():
        # All ranks have all gradients as they were reduced: the very formula of clip_grad_norm_ after DDP.
        by_index = {
            member.index: gradient
            for bucket, whole in zip(buckets, wholes, strict=True)
            for member, gradient in zip(bucket.members, whole or (), strict=True)
        }
        exact: Tensor = torch.nn.utils.get_total_norm([by_index[index] for index in sorted(by_index)], norm_type)
        return exact
    total: Tensor = torch.linalg.vector_norm(everyones[::2], norm_type).float()
    return total
