"""``RaggedTensor``: a tensor of which each rank of a group holds a range."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import Replicate
from torch.optim.optimizer import _foreach_supported_types as _optimizers_types
from torch.utils._foreach_utils import _foreach_supported_types as _clipping_types

from smallreduce.collectives._group import group_of
from smallreduce.ragged import _dispatch
from smallreduce.ragged._boxes import boxes, flat_range
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._redistribute import redistribute
from smallreduce.ragged._sharding import Sharding

__all__ = ["RaggedTensor"]


class RaggedTensor(Tensor):
    """A tensor of ``shape`` of which rank r of a group holds the r-th range of its elements, flattened.

    It stands where a DTensor would: as a parameter, a gradient, an optimizer's state, an entry of a state dict.

    - Elementwise operations, and torch's ``_foreach`` and ``_fused`` forms of them, run on each rank's part and send
      nothing, so that the optimizers of ``torch.optim`` that are elementwise work as they are. Other operands must be
      RaggedTensors of the same shape, placement and group, numbers, or tensors without dimensions.
    - Norms and sums are taken over all elements, and so are ``any()`` and ``all()``: a collective that all ranks call,
      which returns a plain tensor of the same bits on all (:mod:`smallreduce.ragged._global_reduce`). So
      ``torch.nn.utils.clip_grad_norm_`` and ``torch.amp.GradScaler`` work as they are.
    - ``x[i]``, where autograd records nothing, is a RaggedTensor in the memory of this one; ``torch.nn.init`` draws
      this rank's part of the numbers that the whole tensor would get.
    - ``torch.distributed.checkpoint`` saves and loads it as one tensor of its global shape, whatever held it when it
      was saved: other ranges, other ranks, a DTensor or one process. ``StateDictOptions(full_state_dict=True)``, with
      which torch gathers DTensors only, leaves it as it is.
    - Anything else raises and says so; :meth:`full_tensor` is the plain tensor, on all ranks.

    Args:
        local: This rank's elements, 1-D and contiguous; not copied: what is done to the RaggedTensor in place is done
            to this memory. Any dtype and device.
        shape: Of the whole tensor.
        placement: Which ranges the ranks have of it.
        group: The ranks among which it is sharded; None: the default group.

    Raises:
        TypeError: An argument is of another type than said.
        ValueError: The placement is for another number of ranks or does not fit the shape, or ``local`` is not 1-D, not
            contiguous, or not as long as this rank's range.
    """

    __slots__ = ("_local", "_sharding")
    _local: Tensor
    _sharding: Sharding

    @staticmethod
    def __new__(
        cls, local: Tensor, shape: Sequence[int], placement: RaggedShard, group: dist.ProcessGroup | None = None
    ) -> RaggedTensor:
        sharding = Sharding(tuple(shape), placement, group_of(group))
        if not isinstance(local, Tensor) or isinstance(local, RaggedTensor):
            raise TypeError(f"local must be a plain tensor, got {type(local).__name__}")
        begin, end = sharding.range
        if local.shape != (end - begin,) or not local.is_contiguous():
            raise ValueError(
                f"local must be the {end - begin} elements of rank {sharding.rank}'s range, 1-D and contiguous, got "
                f"shape {tuple(local.shape)} and strides {local.stride()}"
            )
        return cls._wrap(local.detach(), sharding)

    def __init__(
        self, local: Tensor, shape: Sequence[int], placement: RaggedShard, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()

    @classmethod
    def _wrap(cls, local: Tensor, sharding: Sharding) -> RaggedTensor:
        wrapper: RaggedTensor = torch.Tensor._make_wrapper_subclass(
            cls, sharding.shape, dtype=local.dtype, device=local.device
        )
        wrapper._local = local
        wrapper._sharding = sharding
        return wrapper

    @classmethod
    def distribute(cls, full: Tensor, placement: RaggedShard, group: dist.ProcessGroup | None = None) -> RaggedTensor:
        """Each rank takes its range of ``full``, of which it has a copy of its own: nothing is sent, or compared.

        Args:
            full: The whole tensor, the same on all ranks. What is taken of it is copied, so that it may be freed.
            placement, group: As for the class.

        Raises:
            TypeError, ValueError: As the class.
        """
        if not isinstance(full, Tensor) or isinstance(full, RaggedTensor):
            raise TypeError(f"full must be a plain tensor, got {type(full).__name__}")
        sharding = Sharding(tuple(full.shape), placement, group_of(group))
        begin, end = sharding.range
        return cls._wrap(full.detach().reshape(-1)[begin:end].clone(), sharding)

    @property
    def placement(self) -> RaggedShard:
        """Which ranges the ranks have."""
        return self._sharding.placement

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks among which it is sharded: rank r of the group has the r-th range."""
        return self._sharding.group

    @property
    def range(self) -> tuple[int, int]:
        """``(begin, end)``: this rank's elements of the flattened tensor."""
        return self._sharding.range

    def to_local(self) -> Tensor:
        """This rank's elements, 1-D: the very memory, which autograd knows nothing of."""
        return self._local

    def full_tensor(self) -> Tensor:
        """The whole tensor, plain, on all ranks; a collective. Autograd goes through it: each rank takes its part of
        the gradient, which must be the same on all ranks, as it is of what all compute alike.
        """
        full: Tensor = _Full.apply(self)  # type: ignore[no-untyped-call]
        return full

    def redistribute(self, placement: RaggedShard | Replicate) -> Tensor:
        """The same tensor under another placement; a collective. A plain tensor for ``Replicate()``. Autograd knows
        nothing of it.

        Where nothing is sent, since the ranges stay, the result shares memory with this.

        Raises:
            TypeError, ValueError: As :func:`smallreduce.ragged._redistribute.redistribute`.
        """
        sharding = self._sharding
        moved = redistribute(self._local, sharding.shape, sharding.placement, placement, sharding.group)
        if isinstance(placement, RaggedShard):
            return self._wrap(moved, Sharding(sharding.shape, placement, sharding.group))
        return moved

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch.dispatch(cls, func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        """As that of any tensor. Assigning takes over the other's memory, which must be a RaggedTensor's."""
        detached: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return detached

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, RaggedTensor):
            raise TypeError(f"the data of a RaggedTensor must be a RaggedTensor, got {type(other).__name__}")
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self._local, self._sharding = other._local, other._sharding

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedTensor:
        """A copy of this rank's elements, in the same group."""
        if id(self) in memo:
            known: RaggedTensor = memo[id(self)]
            return known
        if not self.is_leaf:
            raise RuntimeError("only leaves of the autograd graph can be copied deeply; copy its detach()")
        copied = self._wrap(self._local.clone(), self._sharding)
        memo[id(self)] = copied
        copied.requires_grad_(self.requires_grad)
        copied.grad = copy.deepcopy(self.grad, memo)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """A RaggedTensor is not pickled.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a RaggedTensor cannot be pickled, since it belongs to a process group: save it with "
            "torch.distributed.checkpoint, or its full_tensor()"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        begin, end = self.range
        grad = ", requires_grad=True" if self.requires_grad else ""
        return (
            f"RaggedTensor(shape={tuple(self.shape)}, {self.dtype}, {self.device}, elements {begin} to {end} on rank "
            f"{self._sharding.rank} of {self.placement.world_size}{grad})"
        )

    # By these torch knows a tensor made of others: nn.Module.to, to_empty and their like then change a parameter in its
    # place, so that an optimizer that was made before has it still.

    def __tensor_flatten__(self) -> tuple[list[str], Sharding]:
        return ["_local"], self._sharding

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], sharding: Sharding, outer_size: object, outer_stride: object
    ) -> RaggedTensor:
        return RaggedTensor._wrap(inner["_local"], sharding)

    # The names are those by which torch.distributed.checkpoint asks any tensor subclass for its parts.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        shape = self._sharding.shape
        parts = boxes(shape, *self.range)
        if self._sharding.numel == 0 and self._sharding.rank == 0:
            parts = [((0,) * len(shape), shape)]  # that there is such a tensor, one must say
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts]

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for chunk in self.__create_chunk_list__():
            if chunk.offsets == index.offset:
                begin, end = flat_range(self.shape, chunk.offsets, chunk.sizes)
                first = self.range[0]
                return self._local[begin - first : end - first].view(chunk.sizes)
        raise ValueError(f"{index.fqn} has no part at {index.offset} on this rank, but {self!r}")


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: RaggedTensor) -> Tensor:
        ctx.placement, ctx.group = tensor.placement, tensor.group
        full = tensor.redistribute(Replicate())
        # At world size 1 nothing moves, and the result must not share memory here while it does not elsewhere.
        return full.clone() if tensor.placement.world_size == 1 else full

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> RaggedTensor:
        return RaggedTensor.distribute(gradient, ctx.placement, ctx.group)


# torch's optimizers and clip_grad_norm_ choose their foreach forms on accelerators for the types in these lists, which
# have no public name; without them they would loop over the parameters.
for _types in (_optimizers_types, _clipping_types):
    _types.append(RaggedTensor)  # type: ignore[arg-type]
