"""``smallreduce.reduce_scatter``: the upper half of an all-reduce."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce import ops
from smallreduce._layout import BLOCK
from smallreduce.codecs import Codec, PacketCodec
from smallreduce.collectives import _call
from smallreduce.collectives._channel import IN_BACKGROUND, Channel, Start
from smallreduce.collectives._compat import reduce_scatter_single
from smallreduce.collectives._engine import Engine, Parts, PartSegments, cut_parts, factor_of, stage_seed
from smallreduce.collectives._levels import Levels, Route, grain_of
from smallreduce.collectives._links import Exchange
from smallreduce.collectives._work import Work
from smallreduce.feedback import ErrorFeedback, Owner

__all__ = ["ReduceScatter", "reduce_scatter", "reduce_scatter_for", "scatter"]


class ReduceScatter(Engine):
    """Compressed reduce-scatter of a flat buffer of ``world_size * numel`` elements into one of ``numel``.

    Blocks and groups start afresh in each rank's part.

    Attributes:
        worker_numel: Elements of the residual (fp32, in the order of the parts' blocks); 0 where none is taken.
        bytes_sent: Payload that this rank sends in one call.
    """

    name = "reduce_scatter"
    worker_numel: int
    bytes_sent: int

    def launch(
        self,
        output: Tensor,
        input: Tensor,
        op: dist.ReduceOp.RedOpType,
        worker: Tensor | None = None,
        seed: int = 0,
        bucket: int = 0,
        step: int | Tensor = 0,
        value: Tensor | None = None,
        after: Callable[[], None] | None = None,
        start: Start = IN_BACKGROUND,
    ) -> Work:
        """Starts it; see :meth:`BucketEngine.launch`. ``input`` is left as it was."""
        if worker is not None and self.worker_numel == 0:
            raise ValueError("this reduce-scatter takes no residual")
        self._claim(after, output, input, worker)
        self._output, self._input = output, input
        self._factor = factor_of(op, self.channel.world_size)
        self._worker = worker
        self._seeds = [stage_seed(seed, bucket, self.channel.rank, stage) for stage in (0, 1)]
        self._at_step = self._step(step)
        work = Work(output if value is None else value, self.bytes_sent)
        self.channel.run(self, work, start)
        return work

    def done(self) -> None:
        del self._output, self._input, self._worker
        super().done()


class DirectReduceScatter(ReduceScatter):
    """One exchange: each rank sends every other its part.

    Args:
        segments: ``(offset, length)`` in elements of a part.
        numel: Elements of a part.
        codec: The wire format.
        dtype: Of the buffers.
        channel: ``channel_of(group, device)``.
    """

    def __init__(
        self, segments: PartSegments, numel: int, codec: PacketCodec, dtype: torch.dtype, channel: Channel
    ) -> None:
        world = channel.world_size
        chunks = cut_parts(segments, world, None, codec, codec.format.group)
        count = len(chunks[0])
        parts = Parts(numel, chunks, codec, dtype)
        self._layouts = [parts.of_ranks(range(world), chunk) for chunk in range(count)]
        self._shards = [parts.of_one(channel.rank, chunk) for chunk in range(count)]
        strides = [layout.stride for layout in self._layouts]
        sizes = [world * stride for stride in strides]
        super().__init__(channel, sizes)
        self._received = self._buffers(sizes)
        self.worker_numel = BLOCK * parts.blocks
        self.bytes_sent = (world - 1) * sum(strides)

    def encode(self, chunk: int) -> None:
        ops.encode(self._input, self._layouts[chunk], self._sent[chunk], self._worker, self._seeds[0], self._at_step)

    def send(self, chunk: int, tag: int) -> Exchange:
        return self.channel.links.all_to_all(self._received[chunk], self._sent[chunk], tag)

    def turn(self, chunk: int, tag: int) -> None:
        stride = self._layouts[chunk].stride
        ops.reduce(
            self._received[chunk], stride, self.channel.world_size, self._factor, self._shards[chunk], self._output,
            self.channel.error,
        )  # fmt: skip

    def finish(self, chunk: int) -> None:
        """There is no second stage."""


class TwoLevelReduceScatter(ReduceScatter):
    """Two exchanges (SDP4Bit, arXiv:2410.15526, Algorithm 3): inside the node each rank receives what the others have
    for the ranks of its own local rank, adds it up and encodes the sums again for these, one in each node.

    Sums stay in the domain in which the codecs add until they are decoded at the end.

    Args:
        segments, numel, dtype: As for :class:`DirectReduceScatter`.
        codecs: Inside the node and between nodes; both with ``hadamard`` or neither.
        levels: At least two nodes, of at least two ranks.
    """

    worker_numel = 0

    def __init__(
        self,
        segments: PartSegments,
        numel: int,
        codecs: tuple[PacketCodec, PacketCodec],
        dtype: torch.dtype,
        levels: Levels,
    ) -> None:
        channel = levels.channel
        world, nodes = channel.world_size, levels.nodes
        self._levels = levels
        chunks = cut_parts(segments, world, levels.chunks, codecs[0], grain_of(codecs))
        count = len(chunks[0])
        intra, inter = (Parts(numel, chunks, codec, dtype) for codec in codecs)
        self._layouts = [intra.of_ranks(levels.order, chunk) for chunk in range(count)]
        self._sums = [
            [(intra.of_ranks([rank], chunk), inter.of_ranks([rank], chunk)) for rank in levels.counterparts]
            for chunk in range(count)
        ]
        self._shards = [inter.of_one(channel.rank, chunk) for chunk in range(count)]
        first = [layout.stride for layout in self._layouts]
        second = [inter.stride(chunk) for chunk in range(count)]
        self._strides = list(zip(first, second, strict=True))
        super().__init__(channel, [max(world * a, nodes * b) for a, b in self._strides])
        # The sums' packets are read as if each began with the first of its kind, so the last reach beyond the end.
        self._received = self._buffers([max((world + nodes - 1) * a, nodes * b) for a, b in self._strides])
        self.bytes_sent = (world - nodes) * sum(first) + (nodes - 1) * sum(second)

    def encode(self, chunk: int) -> None:
        ops.encode(self._input, self._layouts[chunk], self._sent[chunk], None, self._seeds[0], self._at_step)

    def send(self, chunk: int, tag: int) -> Exchange:
        nbytes = self.channel.world_size * self._strides[chunk][0]
        return self._levels.intra.all_to_all(self._received[chunk][:nbytes], self._sent[chunk][:nbytes], tag)

    def turn(self, chunk: int, tag: int) -> Exchange:
        nodes = self._levels.nodes
        first, second = self._strides[chunk]
        # What was sent has arrived, so its buffer takes the sums; once they stand, they may arrive where it did.
        for node, (packets, packet) in enumerate(self._sums[chunk]):
            ops.reduce_encode(
                self._received[chunk][node * first :], nodes * first, self._levels.node_size, 1.0, packets,
                self._sent[chunk][node * second :][:second], None, self._seeds[1], self._at_step, self.channel.error,
                into=packet,
            )  # fmt: skip
        return self._levels.inter.all_to_all(
            self._received[chunk][: nodes * second], self._sent[chunk][: nodes * second], tag, second=True
        )

    def finish(self, chunk: int) -> None:
        ops.reduce(
            self._received[chunk], self._strides[chunk][1], self._levels.nodes, self._factor, self._shards[chunk],
            self._output, self.channel.error,
        )  # fmt: skip


def reduce_scatter_for(
    segments: PartSegments,
    numel: int,
    codec: PacketCodec | tuple[PacketCodec, PacketCodec],
    dtype: torch.dtype,
    route: Route,
) -> ReduceScatter:
    """The engine for parts of ``numel`` elements with ``segments``, ``(offset, length)``; the same kind on all ranks.

    Args:
        codec: One; or two on :class:`Levels`: inside the node and between nodes.
    """
    if not isinstance(route, Levels):
        assert isinstance(codec, PacketCodec)
        return DirectReduceScatter(segments, numel, codec, dtype, route)
    codecs = (codec, codec) if isinstance(codec, PacketCodec) else codec
    if route.is_flat:
        return DirectReduceScatter(segments, numel, route.one_of(codecs), dtype, route.channel)
    return TwoLevelReduceScatter(segments, numel, codecs, dtype, route)


def reduce_scatter(
    out: Tensor,
    x: Tensor,
    codec: str | Codec | None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.AVG,
    group: dist.ProcessGroup | None = None,
    feedback: ErrorFeedback | None = None,
    async_op: bool = False,
    seed: int | None = None,
) -> Work | None:
    """Reduces ``x`` over the ranks of a group through compressed packets and gives each rank its part of the result.

    The result is not rounded again: it is the fp32 sum in ``out``'s dtype.

    Args:
        out: Of the dtype and device of ``x`` and 1/W of its elements, any shape: rank r's is the r-th W-th of the
            result. May be that part of ``x`` itself.
        x: fp32, bf16 or fp16, any shape, the same number of elements for each rank; not changed. With a codec of None,
            or ``"fp32"`` on fp32 data, it is torch's own reduce-scatter, any dtype.
        feedback: Residual of ``x``; there is no server's, since the result is not compressed. It decides on a rounding
            left open, as for :func:`smallreduce.all_reduce`.
        codec, op, group, async_op, seed: As for :func:`smallreduce.all_reduce`.

    Returns:
        A Work with ``async_op``, otherwise None.

    Raises:
        TypeError, ValueError, RuntimeError: As :func:`smallreduce.all_reduce`; ValueError also when the sizes do not
            divide.
    """
    return scatter(out, x, codec, op, _call.enter(group, x), _call.own_group(group), feedback, async_op, seed)


def scatter(
    out: Tensor,
    x: Tensor,
    codec: str | Codec | _call.Pair | None,
    op: dist.ReduceOp.RedOpType,
    route: Route,
    group: dist.ProcessGroup,
    feedback: ErrorFeedback | None,
    async_op: bool,
    seed: int | None,
) -> Work | None:
    """:func:`reduce_scatter` on one level or two."""
    channel = route.channel if isinstance(route, Levels) else route
    world, counted = channel.world_size, next(channel.seeds)
    engine: ReduceScatter | None = None
    worker = None
    with _call.refusing(channel):
        chosen = _call.parse_levels(codec, x, "x", route, _call.parse_packets)
        average = _call.check_op(op) == "avg"
        _call.check_feedback(feedback)
        if feedback is not None and isinstance(chosen, PacketCodec):
            chosen = chosen.with_feedback()
        base = _call.check_seed(seed, counted, feedback)
        if x.numel() % world:
            raise ValueError(f"x must have a multiple of {world} elements, one part for each rank, got {x.numel()}")
        if average and not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"an average needs a floating-point tensor, got {x.dtype}")
        numel = x.numel() // world
        _call.check_output(out, x, numel, channel)
        if world == 1:
            out.detach().copy_(x.detach().reshape(out.shape))
            return _call.alone(out, async_op)
        key = ("reduce_scatter", chosen, numel, x.dtype, _call.levels_of(route))
        if chosen is not None:
            engine = channel.borrow(key) or reduce_scatter_for([(0, numel)], numel, chosen, x.dtype, route)
            if isinstance(chosen, PacketCodec) and feedback is not None:
                owner = Owner(chosen, engine.worker_numel, channel.rank, world, engine.chunks, 0)
                worker, _ = feedback.bind(owner, channel.device)
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
        step = 0 if feedback is None else feedback.step
        work = engine.launch(result, flat, op, worker, base, 0, step, out, after, start)
        if feedback is not None:
            feedback.advance(base)
        return work

    text = f"reduce_scatter of {x.numel()} elements of {x.dtype}, {'AVG' if average else 'SUM'}, "
    text += _call.describe(chosen, route)
    if engine is None:
        nbytes = (world - 1) * result.nbytes
        issue = lambda: reduce_scatter_single(result, flat, op, group)  # noqa: E731
        return _call.run(
            channel, text, _call.plain(channel, "reduce_scatter", out, nbytes, issue, copy_back), True, async_op
        )
    text += " with feedback" if worker is not None else " without feedback"
    return _call.run(channel, text, begin, worker is None, async_op)
