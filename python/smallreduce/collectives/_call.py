"""The frame of a public collective: what is checked on every rank before anything is sent, and how it is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.codecs import Cast, Codec, PacketCodec, as_int, check_elements, codec
from smallreduce.collectives._agreement import Agreement, refuse
from smallreduce.collectives._channel import Channel, Stages, Start, channel_of
from smallreduce.collectives._levels import Levels, Route, grain_of
from smallreduce.collectives._links import Exchange
from smallreduce.collectives._work import Work
from smallreduce.feedback import ErrorFeedback

__all__ = [
    "Pair",
    "alone",
    "check_device",
    "check_feedback",
    "check_op",
    "check_output",
    "check_seed",
    "check_written",
    "describe",
    "enter",
    "levels_of",
    "own_group",
    "parse",
    "parse_levels",
    "parse_packets",
    "plain",
    "refusing",
    "run",
]

Pair = tuple["str | Codec | None", "str | Codec | None"]
"""Codecs inside the node and between nodes."""

_OPS = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg"}


def enter(group: dist.ProcessGroup | None, x: object) -> Channel:
    """The channel for a collective on ``x``. Where ``x`` is not a tensor that the group can take, the channel on which
    this rank can say so to the others."""
    on_cuda = isinstance(x, Tensor) and x.device.type == "cuda"
    channel = channel_of(group, x.device if isinstance(x, Tensor) and on_cuda else torch.device("cpu"))
    channel.check()
    return channel


def _agrees(channel: Channel) -> bool:
    # On CUDA a comparison would stall the stream; a packet that does not fit is refused by the kernels.
    return channel.world_size > 1 and channel.device.type == "cpu"


@contextmanager
def refusing(channel: Channel) -> Iterator[None]:
    """An error of this rank alone is told to the other ranks, where they wait for it, before it is raised."""
    try:
        yield
    except Exception as error:
        if _agrees(channel):
            refuse(channel, error)
        raise


def check_op(op: object) -> str:
    for accepted, name in _OPS.items():
        if op == accepted:
            return name
    if not isinstance(op, (dist.ReduceOp, dist.ReduceOp.RedOpType)):
        raise TypeError(f"op must be ReduceOp.SUM or ReduceOp.AVG, got {type(op).__name__}")
    raise ValueError(f"op must be ReduceOp.SUM or ReduceOp.AVG, got {op}")


def check_seed(seed: object, counted: int, feedback: ErrorFeedback | None = None) -> int:
    if seed is not None:
        return as_int(seed, "seed")
    return counted if feedback is None or feedback.seed is None else feedback.seed


def check_feedback(feedback: object) -> None:
    if feedback is not None and not isinstance(feedback, ErrorFeedback):
        raise TypeError(f"feedback must be an ErrorFeedback or None, got {type(feedback).__name__}")


def check_device(x: Tensor, name: str, channel: Channel) -> None:
    if x.device != channel.device:
        raise ValueError(f"{name} must be on {channel.device}, got {x.device}")


def check_written(x: Tensor, name: str) -> None:
    if torch._debug_has_internal_overlap(x) == 1:
        raise ValueError(f"{name} has elements that share memory (strides {x.stride()}); pass {name}.contiguous()")


def check_output(out: object, x: Tensor, numel: int, channel: Channel) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    check_device(out, "out", channel)
    if out.dtype != x.dtype:
        raise TypeError(f"out must be of {x.dtype} as x is, got {out.dtype}")
    if out.numel() != numel:
        raise ValueError(f"out must have {numel} elements for x of {x.numel()}, got {out.numel()}")
    check_written(out, "out")


def own_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    return world if group is None else group


def is_plain(chosen: Codec | None, dtype: torch.dtype) -> bool:
    """Whether the codec changes nothing, so that the collective is torch's own."""
    return chosen is None or (chosen == Cast(torch.float32) and dtype == torch.float32)


def parse(spelling: str | Codec | None, x: object, name: str, channel: Channel) -> Codec | None:
    """The codec for ``x``; None if the collective is torch's own, which takes any dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_device(x, name, channel)
    chosen = codec(spelling)
    if is_plain(chosen, x.dtype):
        return None
    check_elements(x, name)
    return chosen


def parse_packets(spelling: str | Codec | None, x: object, name: str, channel: Channel) -> PacketCodec | None:
    """As :func:`parse`, for a collective whose parts travel as packets."""
    chosen = parse(spelling, x, name, channel)
    if chosen is None or isinstance(chosen, PacketCodec):
        return chosen
    raise TypeError(f"{chosen} makes no packets: it is for all_reduce, the DDP hook and the optimizers")


C = TypeVar("C", bound=Codec)


def parse_levels(
    spelling: str | Codec | Pair | None,
    x: object,
    name: str,
    route: Route,
    parse_one: Callable[[str | Codec | None, object, str, Channel], C | None],
) -> C | tuple[PacketCodec, PacketCodec] | None:
    """On one level what ``parse_one`` gives; on two a pair of codecs, for which one alone may stand."""
    if not isinstance(route, Levels):
        return parse_one(cast("str | Codec | None", spelling), x, name, route)  # which refuses a pair
    pair = tuple(spelling) if isinstance(spelling, (tuple, list)) else (spelling, spelling)
    if len(pair) != 2:
        raise ValueError(f"codecs must be two, inside the node and between nodes, got {len(pair)}")
    chosen = tuple(parse_packets(each, x, name, route.channel) for each in pair)
    if chosen == (None, None):
        return None
    # Beside a codec that compresses, a plain one is a cast like any other.
    intra, inter = (codec(each) if found is None else found for each, found in zip(pair, chosen, strict=True))
    if not isinstance(intra, PacketCodec) or not isinstance(inter, PacketCodec):
        raise ValueError(f"codecs must be two codecs, or None for both, got {pair[0]} and {pair[1]}")
    grain_of((intra, inter))
    return intra, inter


def levels_of(route: Route) -> tuple[int, int | None] | None:
    """What of the route decides on an engine."""
    return (route.node_size, route.chunks) if isinstance(route, Levels) else None


def describe(chosen: Codec | tuple[Codec, Codec] | None, route: Route) -> str:
    codecs = f"codecs {chosen[0]} and {chosen[1]}" if isinstance(chosen, tuple) else f"codec {chosen}"
    return f"{codecs}, nodes of {route.node_size}" if isinstance(route, Levels) else codecs


class Plain(Stages):
    """torch's own collective, in the form of ours, so that its Work is one of ours too."""

    chunks = 1

    def __init__(self, name: str, issue: Callable[[], dist.Work], after: Callable[[], Any]) -> None:
        self.name = name
        self._issue = issue
        self._after = after

    def encode(self, chunk: int) -> None:
        """There is nothing to encode."""

    def send(self, chunk: int, tag: int) -> Exchange:
        return self._issue()

    def turn(self, chunk: int, tag: int) -> None:
        """There is no second stage."""

    def finish(self, chunk: int) -> None:
        self._after()

    def done(self) -> None:
        """There are no buffers to give back."""


def run(channel: Channel, text: str, begin: Callable[[Start], Work], overlap: bool, async_op: bool) -> Work | None:
    """Compares ``text`` over the ranks, starts the collective and waits for it unless ``async_op``.

    Args:
        begin: Starts it.
        overlap: Whether ``begin`` may do its first encoding before that is known.
    """
    if _agrees(channel):
        with channel.in_step():
            agreement = Agreement(channel, text)
            if not overlap:
                agreement.check()
            work = begin(Start(agreement.check if overlap else None, background=async_op))
        work.bytes_sent += Agreement.nbytes(channel.world_size)
    else:
        work = begin(Start(background=async_op))
    if async_op:
        return work
    work.wait()
    return None


def plain(
    channel: Channel, name: str, value: Tensor, nbytes: int, issue: Callable[[], dist.Work], after: Callable[[], Any]
) -> Callable[[Start], Work]:
    """For :func:`run`: starts torch's own collective, which sends ``nbytes``."""

    def begin(start: Start) -> Work:
        work = Work(value, nbytes)
        channel.run(Plain(name, issue, after), work, start)
        return work

    return begin


def alone(value: Tensor, async_op: bool) -> Work | None:
    """The end of a collective at world size 1."""
    if not async_op:
        return None
    work = Work(value, 0)
    work.complete()
    return work
