"""What a process group needs to run collectives of several stages: that the stages of several in flight do not cross.

A compressed collective is two exchanges with a kernel between them, and the kernel runs when the first exchange ends,
which is in no certain order. Ranks match torch's collectives by the order in which they are issued on a group, messages
by number. :class:`ThreadedChannel` (gloo, and any other backend for CPU tensors) and :class:`StreamChannel` (NCCL) keep
to the one or the other.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import threading
import weakref
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from smallreduce.collectives._group import group_of
from smallreduce.collectives._links import Exchange, GlooLinks, Links, NcclLinks
from smallreduce.collectives._work import Work

__all__ = ["Channel", "IN_BACKGROUND", "Disagreement", "Stages", "Start", "channel_of", "is_waited_for", "shutdown"]

_IDLE_KEPT = 4


_thread = threading.local()


def _mark_channel_thread() -> None:
    _thread.is_waited_for = True


@contextmanager
def _waited_for() -> Iterator[None]:
    before, _thread.is_waited_for = is_waited_for(), True
    try:
        yield
    finally:
        _thread.is_waited_for = before


def is_waited_for() -> bool:
    """Whether collectives end on the calling thread, or need a lock that it has, so that it cannot wait for any. What
    the garbage collector calls may be called on such a thread."""
    return getattr(_thread, "is_waited_for", False)


class Disagreement(RuntimeError):
    """The ranks have found, together and before any data moved, that they cannot go on: they are still in step."""


class Start(NamedTuple):
    """How a collective starts.

    Attributes:
        agreed: Called after the first chunk is encoded and before anything is sent; what it raises ends the collective.
        background: The caller's thread goes on once everything is encoded; else, where it can (messages between two
            ranks), it does all of the work itself, with nothing handed from thread to thread.
    """

    agreed: Callable[[], None] | None = None
    background: bool = True


IN_BACKGROUND = Start()


class Stages(ABC):
    """One collective, cut into chunks that go through its stages one behind the other."""

    name: str
    chunks: int

    @abstractmethod
    def encode(self, chunk: int) -> None:
        """Fills the chunk's packets. Caller's thread."""

    @abstractmethod
    def send(self, chunk: int, tag: int) -> Exchange:
        """Issues the first stage under the chunk's tag. Caller's thread."""

    @abstractmethod
    def turn(self, chunk: int, tag: int) -> Exchange | None:
        """Called when the first stage is over; may issue the second, under the same tag."""

    @abstractmethod
    def finish(self, chunk: int) -> None:
        """Called when the second stage is over."""

    @abstractmethod
    def done(self) -> None:
        """Called once, after the last chunk has finished."""


class Channel(ABC):
    """The way of one group's collectives.

    Attributes:
        device: Where the tensors of this channel live.
        links: The wires among the ranks of the group.
        rank, world_size: In the group.
        seeds: The group's counter for collectives that are given no seed.
        levels: By the size of a node: the wires inside nodes and between them, once they have been opened.
        error: On CUDA the word on the device (int32) in which kernels, which cannot raise, leave that they have refused
            a packet. None on the CPU.
    """

    device: torch.device
    error: Tensor | None = None

    def __init__(self, links: Links) -> None:
        self.links = links
        self.rank = links.rank
        self.world_size = links.world_size
        self.seeds = itertools.count()
        # Kinds differ in size, so they must not meet even where ranks have lost their common order.
        self._tags = {"packets": itertools.count(0, 2), "agreement": itertools.count(1, 2)}
        self._failure: BaseException | None = None
        self._idle: OrderedDict[Hashable, list[Any]] = OrderedDict()
        self.levels: dict[int, tuple[Links, Links]] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        """For collectives of torch's own that belong to ours."""
        return self.links.group

    def next_tag(self, kind: Literal["packets", "agreement"]) -> int:
        """A number for messages. All ranks take theirs in the order of the program, so they take the same."""
        return next(self._tags[kind]) % 2**15  # MPI promises no more; far fewer are in flight

    @abstractmethod
    def subset(self, ranks: Sequence[int], name: str) -> Links:
        """The wires among some ranks of the group, this one included. They call it together, under a name that no other
        subset of theirs has, and the wires end with the channel."""

    @abstractmethod
    def run(self, stages: Stages, work: Work, start: Start) -> None:
        """Takes ``stages`` through all chunks and completes ``work``. Returns when the first stage of all is issued,
        or, not in the background, perhaps later. What ``start.agreed`` raises is raised here."""

    def wait_for(self, exchange: Exchange) -> None:
        """Waits for an exchange of a collective on this channel."""
        exchange.wait()

    def check(self) -> None:
        """Raises RuntimeError if an earlier failure has left the ranks of the group out of step."""
        if self._failure is not None:
            raise RuntimeError(
                f"an earlier compressed collective of this group failed ({self._failure}), so its ranks are out of "
                "step; destroy the process group and make a new one"
            ) from self._failure

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what all ranks do together: whatever ends it on this rank, but for a :class:`Disagreement`, leaves the
        ranks out of step."""
        try:
            yield
        except Disagreement:
            raise
        except BaseException as error:
            self._failure = self._failure or error
            raise

    @abstractmethod
    def use(self, *tensors: Tensor | None) -> None:
        """Says that collectives work on these tensors, whose owner may let go of them at any time."""

    @abstractmethod
    def close(self) -> None:
        """Ends what runs in the background, after what is in flight."""

    def borrow(self, key: Hashable) -> Any | None:
        """An idle engine that was kept under ``key``, or None."""
        kept = self._idle.get(key)
        engine = kept.pop() if kept else None
        if kept == []:
            del self._idle[key]
        return engine

    def keep(self, key: Hashable, engine: Any) -> None:
        """Keeps an idle engine, and with it its buffers, for the next collective like it. Only the latest few stay."""
        self._idle.setdefault(key, []).append(engine)
        self._idle.move_to_end(key)
        while sum(map(len, self._idle.values())) > _IDLE_KEPT:
            oldest = next(iter(self._idle))
            self._idle[oldest].pop()
            if not self._idle[oldest]:
                del self._idle[oldest]


class _Later(Executor):
    """Runs what is submitted to it in :meth:`run`."""

    def __init__(self) -> None:
        self._calls: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.append((future, functools.partial(fn, *args, **kwargs)))
        return future

    def run(self) -> None:
        for future, call in self._calls:
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)


class ThreadedChannel(Channel):
    """On private clones of the group, so that the user's own collectives on the group are not in between.

    The first stages are issued by the caller's thread on one clone, the second ones by a single thread on the other, so
    each clone sees the same order on every rank. (Between two ranks they are numbered messages, which need no order:
    :class:`GlooLinks`.)

    The caller's thread encodes and issues the first stages. In the background one thread takes the chunks in order,
    waits for the first stage, reduces and issues the second; another takes them in order again, waits and decodes. Both
    end after the work in flight, which the group's timeout bounds: when the channel is closed, when its group is gone,
    or when Python exits (concurrent.futures joins them).
    """

    device = torch.device("cpu")

    def __init__(self, group: dist.ProcessGroup, generation: int) -> None:
        self._clones: list[list[dist.ProcessGroup]] = []
        # torch.distributed keeps every group that it knows of until it is destroyed.
        self._abandoned = weakref.finalize(self, _destroy_elsewhere, self._clones)
        self._abandoned.atexit = False  # _close_all comes first
        super().__init__(self._links(group, range(group.size()), f"{generation}"))
        self._reducer = ThreadPoolExecutor(1, "smallreduce-reducer", _mark_channel_thread)
        self._finisher = ThreadPoolExecutor(1, "smallreduce-finisher", _mark_channel_thread)
        self._lock = threading.Lock()
        # A connection whose messages are given up midway keeps gloo's thread busy until the group is destroyed.
        self._given_up: list[Exchange] = []
        _open_channels.add(self)

    def _links(self, group: dist.ProcessGroup, ranks: Sequence[int], name: str) -> GlooLinks:
        clones = [_clone(group, ranks, torch.device("cpu"), f"{stage}{name}") for stage in ("first", "second")]
        self._clones.append(clones)
        return GlooLinks(clones)

    def subset(self, ranks: Sequence[int], name: str) -> Links:
        return self._links(self.links.group, ranks, name)

    def borrow(self, key: Hashable) -> Any | None:
        with _waited_for(), self._lock:
            return super().borrow(key)

    def keep(self, key: Hashable, engine: Any) -> None:
        with _waited_for(), self._lock:
            super().keep(key, engine)

    def use(self, *tensors: Tensor | None) -> None:
        """The engine holds them for as long as it runs."""

    def run(self, stages: Stages, work: Work, start: Start) -> None:
        # Second stages that are collectives come from one thread.
        background = start.background or self.world_size != 2
        reducer, finisher = (self._reducer, self._finisher) if background else (_Later(), _Later())
        with self.in_step():
            for chunk in range(stages.chunks):
                stages.encode(chunk)
                if chunk == 0 and start.agreed is not None:
                    start.agreed()
                tag = self.next_tag("packets")
                sent = stages.send(chunk, tag)
                turned = reducer.submit(self._turn, stages, chunk, tag, sent)
                finisher.submit(self._finish, stages, chunk, turned, work)
        for later in (reducer, finisher):
            if isinstance(later, _Later):
                later.run()

    def _turn(self, stages: Stages, chunk: int, tag: int, sent: Exchange) -> Exchange | None:
        with self.in_step():
            self.wait_for(sent)
            return stages.turn(chunk, tag)

    def wait_for(self, exchange: Exchange) -> None:
        try:
            # Once a stage has failed, the second stages of this rank are one short: none may follow.
            self.check()
            exchange.wait()
        except BaseException:
            self._given_up.append(exchange)
            raise

    def _finish(self, stages: Stages, chunk: int, turned: Future[Exchange | None], work: Work) -> None:
        if work.is_completed():  # an earlier chunk has failed
            if turned.exception() is None and (unawaited := turned.result()) is not None:
                self._given_up.append(unawaited)
            return
        try:
            gathered = turned.result()
            if gathered is not None:
                self.wait_for(gathered)
            stages.finish(chunk)
            if chunk == stages.chunks - 1:
                stages.done()
        except BaseException as error:
            self._failure = self._failure or error
            place = f"chunk {chunk + 1} of {stages.chunks}, rank {self.rank} of {self.world_size}"
            failure = RuntimeError(f"smallreduce.{stages.name} failed ({place}): {error}")
            failure.__cause__ = error
            work.fail(failure)
            if not isinstance(error, Exception):
                raise
            return
        if chunk == stages.chunks - 1:
            work.complete()

    def close(self) -> None:
        _open_channels.discard(self)
        self._reducer.shutdown()
        self._finisher.shutdown()
        self._failure = RuntimeError("its channel was shut down")
        self._given_up.clear()
        self._abandoned.detach()
        _destroy(self._clones)


class StreamChannel(Channel):
    """The order on NCCL: that of the program, all stages enqueued by the caller's thread on one side stream.

    Nothing here waits on the host: the kernels, NCCL's work and the end of the collective are ordered by the stream.
    """

    error: Tensor

    def __init__(self, group: dist.ProcessGroup, device: torch.device, generation: int) -> None:
        super().__init__(NcclLinks(group))
        self.device = device
        self._generation = generation
        self._stream = torch.cuda.Stream(device)
        self._clones: list[list[dist.ProcessGroup]] = []
        with torch.cuda.stream(self._stream):
            self.error = torch.zeros(1, dtype=torch.int32, device=device)
        self._refused = torch.zeros(1, dtype=torch.int32).pin_memory()  # what it was after the last collective

    def subset(self, ranks: Sequence[int], name: str) -> Links:
        # The store remembers the NCCL id of a clone under its name, also when the clone has been destroyed.
        clone = _clone(self.links.group, ranks, self.device, f"{self._generation}/{name}")
        self._clones.append([clone])
        return NcclLinks(clone)

    def check(self) -> None:
        super().check()
        _refuse_capture()
        self._check_refused()

    def _check_refused(self) -> None:
        if packet := int(self._refused.item()):
            raise RuntimeError(
                f"packet {packet - 1} of an earlier compressed collective of this group was not of the expected codec "
                "and size, so its result is wrong: the ranks did not call it with the same arguments"
            )

    def use(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(self._stream)

    def run(self, stages: Stages, work: Work, start: Start) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with self.in_step(), torch.cuda.stream(self._stream):
            sent = []
            for chunk in range(stages.chunks):
                stages.encode(chunk)
                if chunk == 0 and start.agreed is not None:
                    start.agreed()
                tag = self.next_tag("packets")
                sent.append((tag, stages.send(chunk, tag)))
            gathered = []
            for chunk, (tag, first) in enumerate(sent):
                first.wait()
                gathered.append(stages.turn(chunk, tag))
            for chunk, second in enumerate(gathered):
                if second is not None:
                    second.wait()
                stages.finish(chunk)
            self._refused.copy_(self.error, non_blocking=True)
            stages.done()
            work.complete()

    def close(self) -> None:
        self._stream.synchronize()
        _destroy(self._clones)
        self._check_refused()


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "compressed collectives cannot be captured in a CUDA graph: every replay would round with the bits of the "
            "captured step. Call them outside the graph; the operators of smallreduce.ops, which read the step from a "
            "tensor, can be captured"
        )


def _clone(group: dist.ProcessGroup, ranks: Sequence[int], device: torch.device, name: str) -> dist.ProcessGroup:
    """A group of some of ``group``'s ranks, with its backend for ``device`` and its timeout. These ranks call this, and
    no others."""
    members = dist.get_process_group_ranks(group)
    members = [members[rank] for rank in ranks]
    devices = dict(item.split(":") for item in dist.get_backend_config(group).split(","))
    # Not dist.new_group(use_local_synchronization=True): it names the group by how many groups this rank has seen, so
    # ranks that belong to different numbers of groups would wait for each other under different names.
    clone, _ = c10d._new_process_group_helper(
        len(members),
        list(ranks).index(group.rank()),
        members,
        dist.Backend(devices[device.type]),
        c10d._get_process_group_store(group),
        f"{group.group_name}/smallreduce/{name}",  # type: ignore[arg-type]
        timeout=group._get_backend(device).options._timeout,
        group_desc="smallreduce",
    )
    c10d._world.pg_group_ranks[clone] = {global_rank: rank for rank, global_rank in enumerate(members)}
    return cast(dist.ProcessGroup, clone)


def _destroy(clones: list[list[dist.ProcessGroup]]) -> None:
    """Empties the lists, which the links share. gloo's threads end with the last reference to their group, which should
    be that of its list."""
    for groups in clones:
        while groups:
            group = groups.pop()
            if group in c10d._world.pg_map:  # else destroyed with the default group
                dist.destroy_process_group(group)
            del group
    clones.clear()


def _destroy_elsewhere(clones: list[list[dist.ProcessGroup]]) -> None:
    # A channel may be given up on one of gloo's own threads, by a callback there, and no thread can join itself.
    mine = clones[:]
    clones.clear()
    threading.Thread(target=_destroy, args=(mine,), name="smallreduce-destroy").start()


# Weak keys: a channel does not keep its group alive, and goes with it.
_channels: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Channel]] = weakref.WeakKeyDictionary()
# How many channels there have been, for each type of device: it is the same on all ranks.
_generations: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()
_open_channels: weakref.WeakSet[ThreadedChannel] = weakref.WeakSet()


def channel_of(group: dist.ProcessGroup | None, device: torch.device) -> Channel:
    """The channel of ``group`` (None: the default group) for tensors on ``device``.

    The first call for a group is collective: its ranks make the private clones together.

    Raises:
        TypeError: Not a process group.
        ValueError: This rank is not in the group, or the group has no suitable backend for the device.
        RuntimeError: A CUDA graph is being captured.
    """
    if device.type == "cuda":
        _refuse_capture()
    group = group_of(group)
    channels = _channels.setdefault(group, {})
    if device not in channels:
        channels[device] = _open(group, device)
    return channels[device]


def _open(group: dist.ProcessGroup, device: torch.device) -> Channel:
    devices = dict(item.split(":") for item in dist.get_backend_config(group).split(","))
    backend = devices.get(device.type)
    opened = _generations.setdefault(group, Counter())
    if device.type == "cpu" and backend is not None:
        opened["cpu"] += 1
        return ThreadedChannel(group, opened["cpu"] - 1)
    if device.type == "cuda" and backend == "nccl":
        opened["cuda"] += 1
        return StreamChannel(group, device, opened["cuda"] - 1)
    raise ValueError(
        f"tensors on {device} need a process group with "
        f"{'the nccl backend for cuda' if device.type == 'cuda' else 'a backend for cpu, such as gloo'}; "
        f"this group has {dist.get_backend_config(group)}"
    )


# gloo's threads give Python's tensors back, for which they need the interpreter lock: one that comes late, when the
# interpreter is gone, aborts the process. So they end first.
@atexit.register
def _close_all() -> None:
    for channel in list(_open_channels):
        channel.close()


def shutdown(group: dist.ProcessGroup | None = None) -> None:
    """Waits for what is in flight on ``group`` (None: on all groups) and ends its threads and private clones.

    Not needed: they also end once the group is destroyed and nothing refers to it any more. All ranks of the group call
    this; a later collective starts anew.

    Raises:
        RuntimeError: On CUDA, a packet was refused; see :meth:`Work.wait`.
    """
    for key in list(_channels) if group is None else [group]:
        for channel in _channels.pop(key, {}).values():
            channel.close()
