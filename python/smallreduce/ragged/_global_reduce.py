"""Norms and sums of RaggedTensors, over the elements of all ranks.

Each rank reduces its own elements with torch's kernel, in fp32 where they are bf16 or fp16. The ranks' partial results
are gathered, for a list of tensors in one collective, and every rank combines them by the same kernel, in fp64, and
rounds once to the dtype of the result: so all ranks return the same bits.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from smallreduce.collectives._compat import all_gather_single

if TYPE_CHECKING:
    from smallreduce.ragged._tensor import RaggedTensor

__all__ = ["norm", "norms", "total", "truth", "unscale_"]

Kind = type["RaggedTensor"]

_groups_told: MutableMapping[Tensor, dict[dist.ProcessGroup, None]] = WeakIdKeyDictionary()
"""To which a ``found_inf`` of GradScaler was told."""

_HALF = (torch.float16, torch.bfloat16)


def norm(
    kind: Kind,
    func: Any,
    tensor: RaggedTensor,
    order: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``aten.linalg_vector_norm`` over all dimensions."""
    _check_whole(func, tensor, dim, keepdim, out)
    return _norms([tensor], order, dtype)[0]


def norms(
    kind: Kind,
    func: Any,
    tensors: Sequence[Tensor],
    order: Any = 2,
    dtype: torch.dtype | None = None,
    *,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """``aten._foreach_norm``: one collective for all RaggedTensors of a group; plain tensors among them as ever."""
    if out is not None:
        raise NotImplementedError(f"{func} of RaggedTensors into given tensors: take those that it returns without")
    ragged: dict[dist.ProcessGroup, dict[int, RaggedTensor]] = {}
    plain: dict[int, Tensor] = {}
    for place, tensor in enumerate(tensors):
        if isinstance(tensor, kind):
            ragged.setdefault(tensor.group, {})[place] = tensor
        else:
            plain[place] = tensor
    found: dict[int, Tensor] = {}
    if plain:
        found.update(zip(plain, torch._foreach_norm(list(plain.values()), order, dtype=dtype), strict=True))
    for of_group in ragged.values():
        found.update(zip(of_group, _norms(list(of_group.values()), order, dtype), strict=True))
    return [found[place] for place in range(len(tensors))]


def total(
    kind: Kind,
    func: Any,
    tensor: RaggedTensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``aten.sum`` over all dimensions."""
    _check_whole(func, tensor, dim, keepdim, out)
    result = torch.sum(tensor._local[:0], dtype=dtype).dtype
    part = torch.sum(tensor._local, dtype=torch.float32 if result in _HALF else result)
    if result.is_floating_point or result.is_complex:
        part = part.to(torch.complex128 if result.is_complex else torch.float64)
    return _everyones(part.view(1), tensor.group).sum(0)[0].to(result)


def truth(
    kind: Kind, func: Any, tensor: RaggedTensor, dim: Any = None, keepdim: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """``aten.any`` and ``aten.all`` over all dimensions."""
    none = dim is not None and not isinstance(dim, int) and not dim  # for which torch reduces nothing
    _check_whole(func, tensor, dim, keepdim or none, out)
    reduce = func.overloadpacket
    found: Tensor = reduce(_everyones(reduce(tensor._local).view(1), tensor.group))
    return found


def unscale_(kind: Kind, func: Any, tensors: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """What GradScaler does to gradients before a step: that one of any rank is not finite, all learn.

    Groups may lie in one another, as that of a layer's experts in that of all other parameters: the smaller come first,
    so that what they find reaches the ranks of the larger. As GradScaler calls this for each dtype by itself, the
    groups of the calls before have another turn.
    """
    func([each._local if isinstance(each, kind) else each for each in tensors], found_inf, inv_scale)
    groups = _groups_told.setdefault(found_inf, {})
    groups.update(dict.fromkeys(each.group for each in tensors if isinstance(each, kind)))
    for group in sorted(groups, key=dist.ProcessGroup.size):
        dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=group)


def _check_whole(func: Any, tensor: RaggedTensor, dim: Any, keepdim: bool, out: Tensor | None) -> None:
    dims = [dim] if isinstance(dim, int) else dim
    count = max(1, tensor.dim())
    for each in dims or ():
        if not -count <= each < count:
            raise IndexError(f"a RaggedTensor of shape {tuple(tensor.shape)} has no dimension {each}")
    whole = not dims or len({each % count for each in dims}) == count
    if not whole or keepdim or out is not None:
        raise NotImplementedError(
            f"{func} of a RaggedTensor over some of its dimensions, with keepdim or into a given tensor: use its "
            "full_tensor()"
        )


def _norms(tensors: Sequence[RaggedTensor], order: float, dtype: torch.dtype | None) -> list[Tensor]:
    """Of tensors of one group."""
    order = float(order)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype, []).append(place)
    parts: list[Tensor] = []
    for given, places in by_dtype.items():
        wide = torch.float32 if (dtype or given) in _HALF else dtype
        parts += torch._foreach_norm([_values(tensors[place], order) for place in places], order, dtype=wide)
    everyones = _everyones(torch.stack([part.to(torch.float64) for part in parts]), tensors[0].group)
    # The norm of order 0 counts: it adds up as it is.
    whole = everyones.sum(0) if order == 0 else torch.linalg.vector_norm(everyones, order, dim=0)
    norms: dict[int, Tensor] = {}
    begin = 0
    for given, places in by_dtype.items():
        of_dtype = whole[begin : begin + len(places)].to((dtype or given).to_real())
        norms.update(zip(places, of_dtype.unbind(), strict=True))
        begin += len(places)
    return [norms[place] for place in range(len(tensors))]


def _values(tensor: RaggedTensor, order: float) -> Tensor:
    """This rank's elements; where it has none but others have, one that does not count."""
    local = tensor._local
    if local.numel() or not tensor._sharding.numel:
        return local
    return local.new_full((1,), math.inf if order < 0 else 0.0)


def _everyones(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """1-D ``mine`` of all ranks, as the rows of a matrix."""
    everyones = torch.empty(group.size(), mine.numel(), dtype=mine.dtype, device=mine.device)
    # As bytes, since not every backend sends complex numbers.
    all_gather_single(everyones.view(-1).view(torch.uint8), mine.view(torch.uint8), group).wait()
    return everyones
