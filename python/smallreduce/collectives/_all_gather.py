"""``smallreduce.all_gather``: the lower half of an all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce import ops
from smallreduce.codecs import Codec, PacketCodec
from smallreduce.collectives import _call
from smallreduce.collectives._channel import IN_BACKGROUND, Channel, Start
from smallreduce.collectives._compat import all_gather_single
from smallreduce.collectives._engine import Engine, Parts, PartSegments, cut_parts, stage_seed
from smallreduce.collectives._levels import Levels, Route
from smallreduce.collectives._links import Exchange
from smallreduce.collectives._work import Work

__all__ = ["AllGather", "all_gather", "all_gather_for", "gather"]


class AllGather(Engine):
    """Compressed all-gather of flat buffers of ``numel`` elements into one of ``world_size * numel``.

    Args:
        segments: ``(offset, length)`` in elements of a rank's part; blocks and groups start afresh at each.
        numel: Elements of a part.
        codec: The wire format.
        dtype: Of the gathered buffer.
        channel: ``channel_of(group, device)``.
        order: All ranks, in the order in which their packets lie.
        chunks: Into how many chunks it is cut; None: by its size.

    Attributes:
        bytes_sent: Payload that this rank sends in one call.
    """

    name = "all_gather"
    bytes_sent: int

    def __init__(
        self,
        segments: PartSegments,
        numel: int,
        codec: PacketCodec,
        dtype: torch.dtype,
        channel: Channel,
        order: Sequence[int] | None = None,
        chunks: int | None = None,
    ) -> None:
        world = channel.world_size
        order = range(world) if order is None else order
        pieces = cut_parts(segments, world, chunks, codec, codec.format.group)
        count = len(pieces[0])
        parts = Parts(numel, pieces, codec, dtype)
        self._shards = [parts.of_one(channel.rank, chunk) for chunk in range(count)]
        self._layouts = [parts.of_ranks(order, chunk) for chunk in range(count)]
        strides = [layout.stride for layout in self._layouts]
        super().__init__(channel, [world * stride for stride in strides])
        mine = order.index(channel.rank)
        self._mine = [packets[mine * n : (mine + 1) * n] for packets, n in zip(self._sent, strides, strict=True)]
        self.bytes_sent = (world - 1) * sum(strides)

    def launch(
        self,
        output: Tensor,
        input: Tensor,
        seed: int = 0,
        bucket: int = 0,
        step: int | Tensor = 0,
        value: Tensor | None = None,
        after: Callable[[], None] | None = None,
        start: Start = IN_BACKGROUND,
        base: Tensor | None = None,
    ) -> Work:
        """Starts it; see :meth:`BucketEngine.launch`.

        Args:
            input: This rank's part; may be its part of ``output``. Or fp32, where ``output`` is not: what travels is
                then what it would be after a cast.
            base: This rank's part of ``output`` as it stands, the same on all ranks. ``input``, fp32, is then what it
                shall become: the difference is what travels, and all of ``output`` has the decoded differences added to
                it, this rank's part too (SDP4Bit, arXiv:2410.15526, Algorithm 2).
        """
        self._claim(after, output, input, base)
        self._output, self._input, self._base = output, input, base
        self._seed = stage_seed(seed, bucket, self.channel.rank, 0)
        self._at_step = self._step(step)
        work = Work(output if value is None else value, self.bytes_sent)
        self.channel.run(self, work, start)
        return work

    def encode(self, chunk: int) -> None:
        layout, mine = self._shards[chunk], self._mine[chunk]
        if self._base is not None:
            ops.encode_difference(self._input, self._base, layout, mine, self._seed, self._at_step)
        elif self._input.dtype != self._output.dtype:
            ops.encode_rounded(self._input, layout, mine, self._seed, self._at_step)
        else:
            ops.encode(self._input, layout, mine, None, self._seed, self._at_step)

    def send(self, chunk: int, tag: int) -> Exchange:
        return self.channel.links.all_gather(self._sent[chunk], self._mine[chunk], tag)

    def turn(self, chunk: int, tag: int) -> Exchange | None:
        """There is one stage only."""
        return None

    def finish(self, chunk: int) -> None:
        # This rank's own part too, so that all ranks have the same bits. It has been read: all that is decoded here was
        # encoded before it was sent.
        put = ops.decode if self._base is None else ops.decode_add
        put(self._sent[chunk], self._layouts[chunk], self._output, self.channel.error)

    def done(self) -> None:
        del self._output, self._input, self._base
        super().done()

    def decode(self, output: Tensor) -> None:
        """Decodes once more what the latest call, which is over, has gathered; nothing is sent."""
        self.channel.check()
        for packets, layout in zip(self._sent, self._layouts, strict=True):
            ops.decode(packets, layout, output, self.channel.error)


class TwoLevelAllGather(AllGather):
    """All-gather that sends each packet to another node once: between the ranks of one local rank, and then, all that
    have arrived there, inside the node."""

    def __init__(
        self, segments: PartSegments, numel: int, codec: PacketCodec, dtype: torch.dtype, levels: Levels
    ) -> None:
        super().__init__(segments, numel, codec, dtype, levels.channel, levels.order, levels.chunks)
        self._levels = levels
        self._arrived = [packets.chunk(levels.node_size)[levels.local_rank] for packets in self._sent]

    def send(self, chunk: int, tag: int) -> Exchange:
        return self._levels.inter.all_gather(self._arrived[chunk], self._mine[chunk], tag)

    def turn(self, chunk: int, tag: int) -> Exchange:
        return self._levels.intra.all_gather(self._sent[chunk], self._arrived[chunk], tag, second=True)


def all_gather_for(
    segments: PartSegments, numel: int, codec: PacketCodec, dtype: torch.dtype, route: Route
) -> AllGather:
    """The engine for parts of ``numel`` elements with ``segments``, ``(offset, length)``; alike on all ranks."""
    if isinstance(route, Levels):
        if not route.is_flat:
            return TwoLevelAllGather(segments, numel, codec, dtype, route)
        route = route.channel
    return AllGather(segments, numel, codec, dtype, route)


def all_gather(
    out: Tensor,
    x: Tensor,
    codec: str | Codec | None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    seed: int | None = None,
) -> Work | None:
    """Gathers the ranks' tensors through compressed packets. All ranks end with the same bits: a rank's own part of
    ``out`` is what the others see of it, too.

    Args:
        out: Of the dtype and device of ``x`` and W times its elements, any shape; rank r's come r-th.
        x: fp32, bf16 or fp16, any shape, the same number of elements on every rank. May be this rank's part of ``out``.
            With a codec of None, or ``"fp32"`` on fp32 data, it is torch's own all-gather, any dtype.
        codec, group, async_op, seed: As for :func:`smallreduce.all_reduce`.

    Returns:
        A Work with ``async_op``, otherwise None.

    Raises:
        TypeError, ValueError, RuntimeError: As :func:`smallreduce.all_reduce`.
    """
    return gather(out, x, codec, _call.enter(group, x), _call.own_group(group), async_op, seed)


def gather(
    out: Tensor,
    x: Tensor,
    codec: str | Codec | None,
    route: Route,
    group: dist.ProcessGroup,
    async_op: bool,
    seed: int | None,
) -> Work | None:
    """:func:`all_gather` on one level or two."""
    channel = route.channel if isinstance(route, Levels) else route
    world, counted = channel.world_size, next(channel.seeds)
    engine: AllGather | None = None
    with _call.refusing(channel):
        chosen = _call.parse_packets(codec, x, "x", channel)
        base = _call.check_seed(seed, counted)
        _call.check_output(out, x, world * x.numel(), channel)
        if world == 1:
            out.detach().copy_(x.detach().reshape(out.shape))
            return _call.alone(out, async_op)
        key = ("all_gather", chosen, x.numel(), x.dtype, _call.levels_of(route))
        if chosen is not None:
            engine = channel.borrow(key) or all_gather_for([(0, x.numel())], x.numel(), chosen, x.dtype, route)
        target = out.detach()
        flat = x.detach().contiguous().view(-1)
        result = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        result = result.view(-1)
        channel.use(target, flat, result)

    def copy_back() -> None:
        if result.data_ptr() != target.data_ptr():
            target.copy_(result.view(target.shape))

    def after() -> None:
        copy_back()
        channel.keep(key, engine)

    def begin(start: Start) -> Work:
        assert engine is not None
        return engine.launch(result, flat, base, value=out, after=after, start=start)

    text = f"all_gather of {x.numel()} elements of {x.dtype} from each rank, {_call.describe(chosen, route)}"
    if engine is None:
        nbytes = (world - 1) * flat.nbytes
        issue = lambda: all_gather_single(result, flat, group)  # noqa: E731
        return _call.run(
            channel, text, _call.plain(channel, "all_gather", out, nbytes, issue, copy_back), True, async_op
        )
    return _call.run(channel, text, begin, True, async_op)
