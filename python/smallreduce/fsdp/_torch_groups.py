"""What FSDP2 communicates together, read from torch's private attributes: the one file that knows them.

torch sets its own communication objects per module and publishes neither the parameters that one of them moves nor
their padded sizes. Seen in torch 2.11 to 2.13: 2.12 made one parameter group of a module several, 2.13 gave the
reduce-scatter a process group of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["Bucket", "Slot", "Version", "buckets_of", "plain_name"]

Version = tuple[tuple[int, int, int], ...]
"""Of the weights of a bucket on this rank."""

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True)
class Slot:
    """One parameter of a bucket.

    Attributes:
        name: In the model, without the names of activation checkpointing's and torch.compile's wrappers.
        shape: Of the unsharded parameter; with tensor parallelism of this rank's part of it.
        dim: The dimension that is sharded.
        shard_shape: Of every rank's shard, padded.
    """

    name: str
    shape: torch.Size
    dim: int
    shard_shape: torch.Size
    _torch: Any

    @property
    def own_shape(self) -> torch.Size:
        """Of this rank's shard, without padding."""
        shape: torch.Size = self._torch.sharded_size
        return shape

    def shard(self, part: Tensor) -> Tensor:
        """Of this parameter's elements in a rank's part: a view of this rank's own shard, without padding."""
        return part.view(self.shard_shape).narrow(0, 0, self.own_shape[0])

    def sharded(self, shard: Tensor) -> Tensor:
        """The DTensor that is sharded as the parameter is, and of which this rank has ``shard``."""
        dtensor: Tensor = self._torch.to_sharded_dtensor(shard)
        return dtensor

    @property
    def trainable(self) -> bool:
        return bool(self._torch.sharded_param.requires_grad)

    @property
    def is_dtensor(self) -> bool:
        """Whether the unsharded parameter is itself spread over other ranks."""
        return bool(self._torch.is_dtensor)

    def _shard_shape_on(self, world_size: int) -> torch.Size:
        """That of every rank's shard, padded, on so many ranks."""
        shape = list(self.shape)
        shape[self.dim] = -(-shape[self.dim] // world_size)
        return torch.Size(shape)

    def parts(self, world_size: int) -> tuple[int, int]:
        """So many padded shards, and the elements of each."""
        return world_size, self._shard_shape_on(world_size).numel()

    def join(self, parts: Tensor) -> Tensor:
        """All ranks' padded shards, of shape (W, shard's elements), as the unsharded tensor, a copy."""
        shards = parts.reshape(len(parts), *self._shard_shape_on(len(parts)))
        return torch.cat(list(shards), self.dim).narrow(0, 0, self.shape[0]).reshape(self.shape)

    def split(self, whole: Tensor, world_size: int) -> Tensor:
        """The reverse of :meth:`join`; the padding is zero."""
        missing = self._shard_shape_on(world_size)[self.dim] * world_size - self.shape[self.dim]
        padding = [0] * (2 * (whole.dim() - 1 - self.dim)) + [0, missing]
        padded = torch.nn.functional.pad(whole, padding)
        return torch.stack(padded.chunk(world_size, self.dim)).reshape(world_size, -1)


class Bucket:
    """What one FSDP module gathers, and reduces, together.

    Attributes:
        name: Of the module in the model.
        number: In the model, from 0.
        module: That takes the communication objects; where FSDP made several modules one group, the first of them.
        slots: Its parameters, in the order in which their shards lie in a rank's part.
        device: Of what is sent.
    """

    def __init__(self, name: str, number: int, module: FSDPModule, slots: Sequence[Slot], group: Any) -> None:
        self.name = name
        self.number = number
        self.module = module
        self.slots = tuple(slots)
        self.device: torch.device = group.device
        self._group = group

    @property
    def label(self) -> str:
        """For messages."""
        return self.name or "the root module"

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks among which it is sharded."""
        group = self.mesh_group
        if group is None:
            raise ValueError(f"{self.label} {self.refusal()}")
        return group

    @property
    def mesh_group(self) -> dist.ProcessGroup | None:
        """As ``shard_group``; None where it is replicated."""
        return getattr(self._group.mesh_info, "shard_process_group", None)

    @property
    def description(self) -> str:
        """What must be the same on all ranks."""
        policy = self._group.mp_policy
        numels = [slot.shape.numel() for slot in self.slots if slot.trainable]
        return (
            f"{self.label}: {len(self.slots)} parameters, {len(numels)} trainable of {sum(numels)} elements, "
            f"param_dtype {policy.param_dtype}, reduce_dtype {policy.reduce_dtype}"
        )

    @property
    def place(self) -> str:
        """Which shard this rank holds."""
        group = self.mesh_group
        return "unsharded" if group is None else f"shard {group.rank()} of {group.size()}"

    @property
    def all_gather(self) -> Any:
        """The communication object in use."""
        return self._group._all_gather_comm

    @property
    def reduce_scatter(self) -> Any:
        return self._group._reduce_scatter_comm

    @property
    def reduce_dtype(self) -> torch.dtype:
        """In which gradients are reduced."""
        policy = self._group.mp_policy
        own: torch.dtype = self._group.fsdp_params[0].sharded_param.dtype
        return policy.reduce_dtype or policy.param_dtype or own

    @property
    def in_backward(self) -> bool:
        """Whether a backward pass is going on: what is gathered is for that, or for a forward pass computed again."""
        return bool(torch._C._current_graph_task_id() != -1)

    @property
    def reshards_after_forward(self) -> bool:
        return bool(self._group._reshard_after_forward)

    def part(self) -> Tensor:
        """This rank's weights as they are gathered, where they may be compressed."""
        parameters = self._group.fsdp_params
        shards = [p._sharded_param_data.detach().to(self.device, self._dtype_of(p)) for p in parameters]
        return torch.cat(shards)

    @property
    def version(self) -> Version:
        """Of this rank's shards of the weights: another one once they have changed, but for what torch does not count,
        as foreach functions on DTensors."""
        # What is done to a DTensor counts there alone, and what is done to the shard itself, there.
        parameters = [parameter.sharded_param for parameter in self._group.fsdp_params]
        shards = [parameter.to_local() for parameter in parameters]
        return tuple(
            (shard.data_ptr(), shard._version, parameter._version)
            for shard, parameter in zip(shards, parameters, strict=True)
        )

    def segments(self, trainable: bool = False) -> tuple[tuple[int, int], ...]:
        """``(offset, length)`` of all parameters, or of those that get gradients, in a rank's part."""
        slots = [slot for slot in self.slots if slot.trainable or not trainable]
        lengths = [slot.shard_shape.numel() for slot in slots]
        return tuple(zip(itertools.accumulate(lengths, initial=0), lengths, strict=False))

    def refusal(self) -> str | None:
        """Why nothing of this module can be compressed, and what to do about it; None if it can."""
        group = self._group
        mesh = group.mesh_info
        if not hasattr(mesh, "shard_process_group"):
            return "is replicated, not sharded: use DistributedDataParallel and smallreduce.ddp.register"
        if getattr(mesh, "replicate_process_group", None) is not None:
            return (
                "is on a two-dimensional (HSDP) mesh, whose all-reduce between replicas torch does not let out of its "
                "hands: give fully_shard the one-dimensional shard mesh, and smallreduce.fsdp.compress replicate_group="
            )
        if getattr(group, "_all_reduce_hook", None) is not None:
            return "has an all-reduce hook of its own: compress a model without set_all_reduce_hook"
        if group.device.type not in ("cpu", "cuda"):
            return f"is on {group.device}; compressed collectives take CPU and CUDA tensors"
        for what, comm in (("all-gather", group._all_gather_comm), ("reduce-scatter", group._reduce_scatter_comm)):
            kind = type(comm).__name__
            if kind.startswith("SymmMem"):
                return "has symmetric memory for its communication: do not call set_symm_mem_for_comm"
            if kind.startswith("ProcessGroupAlloc"):
                return (
                    "takes memory from its process group: do not call set_allocate_memory_from_process_group_for_comm"
                )
            if not kind.startswith("Default"):
                return f"was compressed already, or has another {what} of its own ({kind}): call compress once"
        if any(hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather") for p in group.fsdp_params):
            return "has parameters with fsdp_pre_all_gather, which choose themselves what travels: shard plain tensors"
        return None

    def refusal_of_weights(self) -> str | None:
        """As :meth:`refusal`, where weights are to be compressed."""
        group = self._group
        other = group.post_forward_mesh_info
        if other is not None and other is not group.mesh_info:
            return (
                "reshards to a smaller mesh after forward (reshard_after_forward is an int), whose shards would be "
                "compressed twice: give True or False"
            )
        dtypes = {self._dtype_of(p) for p in group.fsdp_params}
        if len(dtypes) > 1:
            return (
                f"gathers {', '.join(sorted(map(str, dtypes)))} together, which travel as bytes: shard the parameters "
                "of each dtype in a module of their own, or give MixedPrecisionPolicy(param_dtype=...)"
            )
        return None

    def _dtype_of(self, parameter: Any) -> torch.dtype:
        own: torch.dtype = parameter.sharded_param.dtype
        chosen: torch.dtype | None = self._group.mp_policy.param_dtype
        return own if chosen is None or not own.is_floating_point else chosen


def buckets_of(model: nn.Module) -> list[Bucket]:
    """What the FSDP modules of ``model`` communicate, in the order of ``model.modules()``.

    Raises:
        TypeError: There are none.
        ValueError: A module has parameters on several meshes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module that fully_shard was applied to, got {type(model).__name__}")
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    found: dict[int, Bucket] = {}
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        groups = _groups(module)
        if len(groups) > 1:
            raise ValueError(
                f"{plain_name(name) or 'the root module'} has parameters on several meshes (shard_placement_fn), for "
                "which torch takes no communication of another's: shard the parameters of each mesh in a module of "
                "their own"
            )
        for group in groups:
            if id(group) not in found:
                slots = [_slot(parameter, names) for parameter in group.fsdp_params]
                found[id(group)] = Bucket(plain_name(name), len(found), module, slots, group)
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no FSDP module with parameters: apply torch.distributed.fsdp.fully_shard "
            "first. For FullyShardedDataParallel register smallreduce.fsdp.hook; smallreduce.ragged.fully_shard takes "
            "codecs itself, as gradients= and weights="
        )
    return list(found.values())


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.11


def _slot(parameter: Any, names: dict[int, str]) -> Slot:
    info = parameter._module_info
    prefix = names.get(id(info.module), "")
    return Slot(
        name=f"{prefix}.{info.param_name}" if prefix else info.param_name,
        shape=parameter._orig_size,
        dim=parameter.fsdp_placement.dim,
        shard_shape=parameter.padded_sharded_param_size,
        _torch=parameter,
    )


def plain_name(name: str) -> str:
    """A module's or parameter's, without those of wrappers."""
    name += "."
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name[:-1]
