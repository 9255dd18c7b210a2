"""Which process group a call is for."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["group_of"]


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, of which this rank is a member; None: the default group.

    Raises:
        TypeError: Not a process group.
        ValueError: This rank is not in it, or there is no default group.
    """
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError("there is no default process group; call torch.distributed.init_process_group first")
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        raise ValueError(f"rank {dist.get_rank()} is not a member of the process group: only its ranks make this call")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"a process group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group
