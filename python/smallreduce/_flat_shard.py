"""What torch.distributed.checkpoint is given for a flat tensor of which each rank holds a range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

__all__ = ["FlatShard"]


class FlatShard(Tensor):
    """Stands for a flat tensor of ``numel`` elements of which this rank holds those from ``offset`` on.

    ``torch.distributed.checkpoint`` saves the ranges of all ranks as one tensor, and loads from it whatever range a
    rank holds then, into the memory of ``local``: the ranges need not be those that were saved, nor the ranks as many.
    Nothing else can be computed with it, nor can ``async_save`` stage it, which copies all tensors first.

    Args:
        local: This rank's elements, 1-D and contiguous; may be none. Saving reads and loading writes them in place.
        offset: Of the first of them in the whole tensor.
        numel: Elements of the whole tensor. The ranges of all ranks must cover it and not overlap.

    Attributes:
        local, offset: As given.

    Raises:
        ValueError: The range is not one of the whole.
    """

    local: Tensor
    offset: int

    @staticmethod
    def __new__(cls, local: Tensor, offset: int, numel: int) -> FlatShard:
        if local.dim() != 1 or not local.is_contiguous():
            raise ValueError(f"local must be 1-D and contiguous, got shape {tuple(local.shape)}")
        if not 0 <= offset <= numel - local.numel():
            raise ValueError(f"elements {offset} to {offset + local.numel()} are not a range of {numel}")
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(
            cls, (numel,), dtype=local.dtype, device=local.device, requires_grad=False
        )
        shard.local = local.detach()
        shard.offset = offset
        return shard

    def __init__(self, local: Tensor, offset: int, numel: int) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(
            f"{func} on a FlatShard, which is for torch.distributed.checkpoint only (save and load, not async_save); "
            "its .local is this rank's range"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FlatShard({self.offset} to {self.offset + self.local.numel()} of {self.shape[0]}, {self.dtype})"

    # The names are those by which torch.distributed.checkpoint asks any tensor subclass for its parts.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.local.numel() == 0:
            return []
        return [ChunkStorageMetadata(offsets=torch.Size((self.offset,)), sizes=self.local.shape)]

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(self.local), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if index.offset != torch.Size((self.offset,)):
            raise ValueError(f"{index.fqn} has no range at {index.offset} on this rank, but {self!r}")
        return self.local
