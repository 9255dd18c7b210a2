"""What was sent: a gloo process group that counts the payload of every collective.

    backend = smallreduce.metrics.register_counting_backend()
    torch.distributed.init_process_group(backend)
    ...
    smallreduce.metrics.bytes_sent()         # this rank's bytes, over all groups
    smallreduce.metrics.sent()               # {"all_reduce": Sent(calls=12, nbytes=...), ...}

The counter stands at the process group, below DDP's reducer, its communication hooks and ``new_group``, so that it sees
what any of them sends and none of them can state its own figure. It counts *payload* by one convention, the traffic of
the bandwidth-optimal algorithm of each collective (the convention by which nccl-tests derives bus bandwidth), in bytes
that the calling rank sends to others in a group of W ranks:

===================  ======================================================================
all_reduce           ``2 (W - 1) / W`` of the tensor, rounded down to a byte (ring)
reduce_scatter       every input shard but its own
all_gather           ``W - 1`` times its own shard
all_to_all           every input split but its own
broadcast, scatter   at the root, what the others receive; elsewhere nothing
reduce, gather       the tensor, except at the root
send                 the tensor (recv: nothing)
barrier              nothing
===================  ======================================================================

Headers, acknowledgements and what a given backend adds are not payload: gloo's own reduce_scatter, for one, moves more.
``benchmarks/slow_network.py`` reads the counters of the network device beside it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["BACKEND", "CountingProcessGroup", "Sent", "bytes_sent", "register_counting_backend", "reset", "sent"]

BACKEND = "counted"
"""Name of the backend that :func:`register_counting_backend` registers."""


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind: how many this rank called, and the payload in bytes that it sent in them."""

    calls: int = 0
    nbytes: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.calls + other.calls, self.nbytes + other.nbytes)


class _Counter:
    """The count of one group. It outlives the group, which a collective may create and destroy unseen."""

    def __init__(self, gloo: Any) -> None:
        self.lock = threading.Lock()
        self.by_op: dict[str, Sent] = {}
        # gloo numbers what it is given. More numbers than calls means that something reached it past this counter.
        self._gloo = weakref.ref(gloo)
        self._expected_sequence: int = gloo._get_sequence_number_for_group()
        self._bypassed = 0

    def add(self, op: str, nbytes: int, sequence_numbers: int) -> None:
        self.by_op[op] = self.by_op.get(op, Sent()) + Sent(1, nbytes)
        self._expected_sequence += sequence_numbers

    def bypassed(self) -> int:
        gloo = self._gloo()
        if gloo is not None:
            self._bypassed = int(gloo._get_sequence_number_for_group()) - self._expected_sequence
        return self._bypassed

    def reset(self) -> None:
        self.by_op.clear()
        self._expected_sequence += self.bypassed()
        self._bypassed = 0


_counters: list[_Counter] = []


def _nbytes(tensors: Sequence[torch.Tensor]) -> int:
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            raise NotImplementedError(f"only dense tensors can be counted, got layout {tensor.layout}")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# torch calls one form of each method; the stubs describe more, which only its C++ side has to offer.
_ProcessGroup: Any = dist.ProcessGroup


class CountingProcessGroup(_ProcessGroup):  # type: ignore[misc]
    """A gloo process group that counts what passes; made by ``init_process_group(BACKEND)`` and ``new_group``.

    Collectives that torch routes past a Python process group (functional ``all_gather_tensor`` and
    ``reduce_scatter_tensor``, hence DTensor) work, but are noticed: asking for the count then raises RuntimeError.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout: timedelta) -> None:
        # Only this constructor of the base class makes an object whose C++ virtual methods find the Python ones.
        super().__init__(rank, world_size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, world_size, timeout=timeout)
        self._gloo._set_sequence_number_for_group()
        # Names, devices, time-outs and whatever is not counted below go to gloo as in any process group.
        gloo_type = dist.ProcessGroup.BackendType.GLOO
        self._register_backend(torch.device("cpu"), gloo_type, self._gloo)
        self._set_default_backend(gloo_type)
        self._counter = _Counter(self._gloo)
        _counters.append(self._counter)

    def getBackendName(self) -> str:
        return BACKEND

    def shutdown(self) -> None:
        self._counter.bypassed()
        self._gloo.shutdown()

    def _forward(self, op: str, nbytes: int, method: Callable[..., dist.Work], *args: Any) -> dist.Work:
        # gloo only enqueues here, or writes what the socket takes at once, so the lock is held for a moment.
        with self._counter.lock:
            # Mostly one number, but gloo makes a reduce_scatter of a list out of several collectives, a send of none.
            first = self._gloo._get_sequence_number_for_group()
            work = method(*args)
            self._counter.add(op, nbytes, self._gloo._get_sequence_number_for_group() - first)
        return work

    def _all_but_one_of_world(self, nbytes: int) -> int:
        world_size: int = self.size()
        return nbytes * (world_size - 1) // world_size

    # The signatures are those by which torch.distributed and the C++ trampolines call: positional, options last.

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        nbytes = self._all_but_one_of_world(2 * _nbytes(tensors))
        return self._forward("all_reduce", nbytes, self._gloo.allreduce, tensors, opts)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        nbytes = self._all_but_one_of_world(2 * _nbytes(tensors))
        return self._forward("all_reduce", nbytes, self._gloo.allreduce_coalesced, tensors, opts)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        nbytes = _nbytes(tensors) * (self.size() - 1) if self.rank() == opts.rootRank else 0
        return self._forward("broadcast", nbytes, self._gloo.broadcast, tensors, opts)

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        nbytes = _nbytes(tensors) if self.rank() != opts.rootRank else 0
        return self._forward("reduce", nbytes, self._gloo.reduce, tensors, opts)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> dist.Work:
        nbytes = _nbytes(inputs) * (self.size() - 1)
        return self._forward("all_gather", nbytes, self._gloo.allgather, outputs, inputs, opts)

    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any
    ) -> dist.Work:
        nbytes = _nbytes(inputs) * (self.size() - 1)
        return self._forward("all_gather", nbytes, self._gloo.allgather_coalesced, outputs, inputs, opts)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> dist.Work:
        nbytes = _nbytes([input]) * (self.size() - 1)
        return self._forward("all_gather", nbytes, self._gloo._allgather_base, output, input, opts)

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> dist.Work:
        nbytes = sum(_nbytes(shards) - _nbytes([shards[self.rank()]]) for shards in inputs)
        return self._forward("reduce_scatter", nbytes, self._gloo.reduce_scatter, outputs, inputs, opts)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> dist.Work:
        nbytes = self._all_but_one_of_world(_nbytes([input]))
        return self._forward("reduce_scatter", nbytes, self._gloo._reduce_scatter_base, output, input, opts)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any,
    ) -> dist.Work:
        nbytes = self._all_but_one_of_world(_nbytes([input]))
        if input_splits and input.numel() > 0:
            row_nbytes = _nbytes([input]) // input.shape[0]
            nbytes = row_nbytes * (sum(input_splits) - input_splits[self.rank()])
        return self._forward(
            "all_to_all", nbytes, self._gloo.alltoall_base, output, input, output_splits, input_splits, opts
        )

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any) -> dist.Work:
        nbytes = _nbytes(inputs) - _nbytes([inputs[self.rank()]])
        return self._forward("all_to_all", nbytes, self._gloo.alltoall, outputs, inputs, opts)

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> dist.Work:
        nbytes = _nbytes(inputs) if self.rank() != opts.rootRank else 0
        return self._forward("gather", nbytes, self._gloo.gather, outputs, inputs, opts)

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> dist.Work:
        nbytes = sum(_nbytes(shards) - _nbytes([shards[self.rank()]]) for shards in inputs)
        return self._forward("scatter", nbytes, self._gloo.scatter, outputs, inputs, opts)

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> dist.Work:
        return self._forward("send", _nbytes(tensors), self._gloo.send, tensors, dst, tag)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> dist.Work:
        return self._forward("recv", 0, self._gloo.recv, tensors, src, tag)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> dist.Work:
        return self._forward("recv", 0, self._gloo.recv_anysource, tensors, tag)

    def barrier(self, opts: Any) -> dist.Work:
        return self._forward("barrier", 0, self._gloo.barrier, opts)

    # torch 2.11 and 2.12 know these collectives by their older names.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


def register_counting_backend() -> str:
    """Registers the counting backend (CPU tensors, over gloo) with torch.distributed.

    Returns:
        The name to give ``init_process_group`` and ``new_group``. Groups made later by ``new_group`` without a backend,
        as clones of such a group, are counted too. A second call changes nothing.
    """
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, CountingProcessGroup, devices=["cpu"])
    return BACKEND


def _selected(group: dist.ProcessGroup | None) -> list[_Counter]:
    if group is None:
        return list(_counters)
    if not isinstance(group, CountingProcessGroup):
        raise TypeError(
            f"group must be a process group of the {BACKEND!r} backend, got {type(group).__name__}; "
            "call init_process_group(smallreduce.metrics.register_counting_backend())"
        )
    return [group._counter]


def sent(group: dist.ProcessGroup | None = None) -> dict[str, Sent]:
    """What this rank has sent since the start or the last :func:`reset`, by collective.

    Args:
        group: One group of the counting backend; None: all that this process has had, destroyed ones included (unlike
            elsewhere in torch, where None is the default group: a collective may use a private clone of its group).

    Returns:
        For each kind of collective (``"all_reduce"``, ``"all_to_all"``, ...) that was called, how often, and the
        payload in bytes by the convention of this module.

    Raises:
        TypeError: ``group`` is not of the counting backend.
        RuntimeError: Some collectives went past the counter, so that the count would be too low.
    """
    total: dict[str, Sent] = {}
    for counter in _selected(group):
        with counter.lock:
            if (bypassed := counter.bypassed()) != 0:
                raise RuntimeError(
                    f"{bypassed} collectives reached gloo without being counted: torch does not route functional "
                    "all_gather_tensor and reduce_scatter_tensor (and so DTensor) through a Python process group"
                )
            for op, count in counter.by_op.items():
                total[op] = total.get(op, Sent()) + count
    return total


def bytes_sent(group: dist.ProcessGroup | None = None) -> int:
    """Payload in bytes that this rank has sent; :func:`sent` summed over the kinds of collective."""
    return sum(count.nbytes for count in sent(group).values())


def reset(group: dist.ProcessGroup | None = None) -> None:
    """Sets the counts of ``group`` (None: of all groups) back to zero."""
    for counter in _selected(group):
        with counter.lock:
            counter.reset()
