"""Moves sharded tensors from one placement to another, any number of them with one collective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate

from smallreduce.collectives._compat import all_gather_single
from smallreduce.collectives._group import group_of
from smallreduce.ragged._placement import RaggedShard, check_shape

__all__ = ["Redistribution", "redistribute", "redistribute_many"]

T = TypeVar("T")


class Redistribution(Generic[T]):
    """What :func:`redistribute` and :func:`redistribute_many` return with ``async_op``.

    Attributes:
        bytes_sent: Payload that this rank sends to other ranks, in bytes.
    """

    def __init__(
        self, works: Sequence[dist.Work], finish: Callable[[], T], bytes_sent: int = 0, sent: Tensor | None = None
    ) -> None:
        self.bytes_sent = bytes_sent
        self._works = works
        self._finish: Callable[[], T] | None = finish
        self._sent = sent  # not to be freed while it is
        self._result: list[T] = []

    def wait(self) -> T:
        """Blocks until it is over (CUDA: until the current stream will wait for it) and returns the result; when called
        again, the same.

        Raises:
            RuntimeError: A peer died, or the group's timeout passed.
        """
        if self._finish is not None:
            for work in self._works:
                work.wait()
            self._result.append(self._finish())
            self._works, self._finish, self._sent = (), None, None
        return self._result[0]


@overload
def redistribute(
    local: Tensor,
    shape: Sequence[int],
    source: RaggedShard | Replicate,
    target: RaggedShard | Replicate,
    group: dist.ProcessGroup | None = None,
    async_op: Literal[False] = False,
) -> Tensor: ...


@overload
def redistribute(
    local: Tensor,
    shape: Sequence[int],
    source: RaggedShard | Replicate,
    target: RaggedShard | Replicate,
    group: dist.ProcessGroup | None = None,
    *,
    async_op: Literal[True],
) -> Redistribution[Tensor]: ...


def redistribute(
    local: Tensor,
    shape: Sequence[int],
    source: RaggedShard | Replicate,
    target: RaggedShard | Replicate,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Tensor | Redistribution[Tensor]:
    """Moves a tensor from one placement to another; a collective.

    From placement to placement it is one uneven all-to-all, which sends each element that changes its rank once and
    packs nothing: the ranges are contiguous on both sides. To all ranks it is one all-gather where the ranges are
    equally long, else a broadcast from each rank that has any: no padding travels, and nothing is copied but this
    rank's own range. From ``Replicate()``, and where all ranges stay as they are, nothing is sent. All dtypes travel as
    bytes.

    Args:
        local: Under a ``RaggedShard`` this rank's range, 1-D and contiguous; under ``Replicate()`` the whole tensor.
        shape: Of the whole tensor.
        source, target: ``RaggedShard`` for the ranks of ``group``, or ``Replicate()``.
        group: None: the default group.
        async_op: Return a :class:`Redistribution` whose ``wait()`` gives the result. ``local`` must not change before.

    Returns:
        This rank's range under ``target``, 1-D, or the whole tensor, of ``shape``. Where nothing is sent, it shares
        memory with ``local``.

    Raises:
        TypeError: ``local`` is not a plain tensor, or a placement neither of the two.
        ValueError: A placement is for another number of ranks or does not fit the shape, or ``local`` is not what
            ``source`` says.
    """
    group = group_of(group)
    shape = check_shape(shape)
    for name, placement in (("source", source), ("target", target)):
        if not isinstance(placement, (RaggedShard, Replicate)):
            raise TypeError(f"{name} must be a RaggedShard or Replicate(), got {placement!r}")
    if isinstance(source, Replicate):
        moving = _take(local, shape, target, group)
    elif isinstance(target, Replicate):
        moving = _gather(local, shape, source, group)
    else:
        moving = _exchange([local], [shape], [source], [target], group, lambda parts: parts[0])
    return moving if async_op else moving.wait()


@overload
def redistribute_many(
    locals: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    sources: Sequence[RaggedShard],
    targets: Sequence[RaggedShard],
    group: dist.ProcessGroup | None = None,
    async_op: Literal[False] = False,
) -> list[Tensor]: ...


@overload
def redistribute_many(
    locals: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    sources: Sequence[RaggedShard],
    targets: Sequence[RaggedShard],
    group: dist.ProcessGroup | None = None,
    *,
    async_op: Literal[True],
) -> Redistribution[list[Tensor]]: ...


def redistribute_many(
    locals: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    sources: Sequence[RaggedShard],
    targets: Sequence[RaggedShard],
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> list[Tensor] | Redistribution[list[Tensor]]:
    """Moves several tensors of one dtype and device, each from its placement to another, with one uneven all-to-all.

    Each element that changes its rank is sent once; nothing else is. What goes to one rank is packed first, and what
    comes from several is put together after; a tensor that comes from one rank is left where it arrived.

    Args:
        locals: This rank's range of each, 1-D and contiguous.
        shapes, sources, targets: Of each; the same on all ranks.
        group, async_op: As for :func:`redistribute`.

    Returns:
        This rank's range of each under its target, 1-D; several may be parts of one buffer. If no ranges change,
        nothing is sent, and they share memory with ``locals``.

    Raises:
        TypeError: As :func:`redistribute`, or the dtypes differ.
        ValueError: As :func:`redistribute`, or the arguments are not equally many, or the devices differ.
    """
    group = group_of(group)
    counts = [len(given) for given in (locals, shapes, sources, targets)]
    if len(set(counts)) > 1:
        raise ValueError(
            "locals, shapes, sources and targets must be equally many, got {}, {}, {} and {}".format(*counts)
        )
    moving = _exchange(locals, [check_shape(shape) for shape in shapes], sources, targets, group, list)
    return moving if async_op else moving.wait()


def _take(
    full: Tensor, shape: tuple[int, ...], target: RaggedShard | Replicate, group: dist.ProcessGroup
) -> Redistribution[Tensor]:
    if not isinstance(full, Tensor):
        raise TypeError(f"local must be a tensor, got {type(full).__name__}")
    if tuple(full.shape) != shape:
        raise ValueError(f"under Replicate() local must be the whole tensor, of shape {shape}, got {tuple(full.shape)}")
    if isinstance(target, Replicate):
        return Redistribution((), lambda: full)
    begin, end = _ranges(target, shape, group)[group.rank()]
    return Redistribution((), lambda: full.detach().reshape(-1)[begin:end])


def _gather(
    local: Tensor, shape: tuple[int, ...], source: RaggedShard, group: dist.ProcessGroup
) -> Redistribution[Tensor]:
    ranges = _ranges(source, shape, group)
    mine = _check_local(local, ranges[group.rank()])
    if group.size() == 1:
        return Redistribution((), lambda: mine.view(shape))
    full = torch.empty(math.prod(shape), dtype=mine.dtype, device=mine.device)
    works = []
    if len({end - begin for begin, end in ranges}) == 1:
        if full.numel():
            works = [all_gather_single(_bytes(full), _bytes(mine), group)]
    else:
        begin, end = ranges[group.rank()]
        full[begin:end].copy_(mine)
        works = [
            _started(dist.broadcast(_bytes(full[begin:end]), group=group, async_op=True, group_src=rank))
            for rank, (begin, end) in enumerate(ranges)
            if end > begin
        ]
    return Redistribution(works, lambda: full.view(shape), (group.size() - 1) * mine.nbytes, mine)


def _exchange(
    locals: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    sources: Sequence[RaggedShard],
    targets: Sequence[RaggedShard],
    group: dist.ProcessGroup,
    result: Callable[[list[Tensor]], T],
) -> Redistribution[T]:
    for name, placements in (("sources", sources), ("targets", targets)):
        for placement in placements:
            if not isinstance(placement, RaggedShard):
                raise TypeError(f"{name} must be RaggedShards, got {placement!r}")
            _check_world(placement, group)
    plan = _plan(tuple(shapes), tuple(sources), tuple(targets), group.rank())
    mine = [_check_local(local, owned) for local, owned in zip(locals, plan.owned, strict=True)]
    for name, of_each in (("dtype", [one.dtype for one in mine]), ("device", [one.device for one in mine])):
        if len(set(of_each)) > 1:
            error = TypeError if name == "dtype" else ValueError
            raise error(f"the tensors of one call must be of one {name}, got {', '.join(map(str, set(of_each)))}")
    if plan.stays:
        return Redistribution((), lambda: result(mine))
    width = mine[0].element_size()
    sent = _joined(mine, plan.sent)
    received = torch.empty(sum(plan.received_from), dtype=sent.dtype, device=sent.device)
    work = _started(
        dist.all_to_all_single(
            _bytes(received),
            _bytes(sent),
            [count * width for count in plan.received_from],
            [count * width for count in plan.sent_to],
            group=group,
            async_op=True,
        )
    )
    return Redistribution(
        [work],
        lambda: result([_joined([received], pieces) for pieces in plan.received]),
        (sent.numel() - plan.sent_to[group.rank()]) * width,
        sent,
    )


_Piece = tuple[int, int, int]
"""Which tensor, and ``(begin, end)`` in it."""


@dataclass(frozen=True)
class _Plan:
    """An exchange, as one rank sees it; in elements.

    Attributes:
        owned: This rank's range of each tensor now.
        stays: All ranges of all ranks are what they shall be.
        sent: What is sent, in its order, of this rank's ranges: to rank 0 of each tensor, then to rank 1.
        sent_to, received_from: How much of it, for each rank.
        received: Of each tensor, what of the received buffer makes up the range that this rank shall have.
    """

    owned: list[tuple[int, int]]
    stays: bool
    sent: list[_Piece]
    sent_to: list[int]
    received_from: list[int]
    received: list[list[_Piece]]


@lru_cache(maxsize=256)  # an optimizer moves the same tensors at every step
def _plan(
    shapes: tuple[tuple[int, ...], ...], sources: tuple[RaggedShard, ...], targets: tuple[RaggedShard, ...], rank: int
) -> _Plan:
    before = [source.ranges(shape) for source, shape in zip(sources, shapes, strict=True)]
    after = [target.ranges(shape) for target, shape in zip(targets, shapes, strict=True)]
    world = sources[0].world_size if sources else 0
    sent: list[_Piece] = []
    received: list[list[_Piece]] = [[] for _ in shapes]
    sent_to, received_from = [0] * world, [0] * world
    position = 0
    for peer in range(world):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            begin, end = _overlap(old[rank], new[peer])
            if begin < end:
                first = old[rank][0]
                sent.append((index, begin - first, end - first))
                sent_to[peer] += end - begin
            begin, end = _overlap(old[peer], new[rank])
            if begin < end:
                received[index].append((0, position, position + end - begin))
                received_from[peer] += end - begin
                position += end - begin
    return _Plan(
        [ranges[rank] for ranges in before],
        before == after,
        _merged(sent),
        sent_to,
        received_from,
        [_merged(pieces) for pieces in received],
    )


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), min(one[1], other[1])


def _merged(pieces: Iterable[_Piece]) -> list[_Piece]:
    merged: list[_Piece] = []
    for index, begin, end in pieces:
        if merged and merged[-1][0] == index and merged[-1][2] == begin:
            begin = merged.pop()[1]
        merged.append((index, begin, end))
    return merged


def _joined(tensors: Sequence[Tensor], pieces: Sequence[_Piece]) -> Tensor:
    """The pieces one after the other; a view if there is only one."""
    if not pieces:
        return tensors[0].new_empty(0)
    parts = [tensors[index][begin:end] for index, begin, end in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)  # which every backend sends: gloo refuses float8 and most integers


def _started(work: Any) -> dist.Work:
    return cast(dist.Work, work)  # None is only for ranks outside of the group


def _check_world(placement: RaggedShard, group: dist.ProcessGroup) -> None:
    if placement.world_size != group.size():
        raise ValueError(f"{placement} is for {placement.world_size} ranks, but the group has {group.size()}")


def _ranges(placement: RaggedShard, shape: tuple[int, ...], group: dist.ProcessGroup) -> list[tuple[int, int]]:
    _check_world(placement, group)
    return placement.ranges(shape)


def _check_local(local: object, owned: tuple[int, int]) -> Tensor:
    if not isinstance(local, Tensor):
        raise TypeError(f"local must be a tensor, got {type(local).__name__}")
    if local.shape != (owned[1] - owned[0],) or not local.is_contiguous():
        raise ValueError(
            f"local must be this rank's {owned[1] - owned[0]} elements, 1-D and contiguous, got shape "
            f"{tuple(local.shape)} and strides {local.stride()}"
        )
    return local.detach()
