"""``smallreduce.reduce_scatter``: the upper half of an all-reduce."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import Codec, PacketCodec
from smallreduce.collectives import _call
from smallreduce.collectives._channel import IN_BACKGROUND, Channel, Exchange, Start
from smallreduce.collectives._compat import reduce_scatter_single
from smallreduce.collectives._engine import Engine, chunk_count, chunk_spans, factor_of, stage_seed
from smallreduce.collectives._work import Work
from smallreduce.feedback import ErrorFeedback, Owner

__all__ = ["ReduceScatter", "reduce_scatter"]


class ReduceScatter(Engine):
    """Compressed reduce-scatter of a flat buffer of ``world_size * numel`` elements into one of ``numel``.

    Blocks and groups start afresh in each rank's part. The worker's residual (``worker_numel`` elements, fp32) is in
    the order of the parts' blocks.
    """

    name = "reduce_scatter"

    def __init__(self, numel: int, codec: PacketCodec, dtype: torch.dtype, channel: Channel) -> None:
        world = channel.world_size
        spans = chunk_spans(numel, chunk_count(world * numel, world, codec), codec)
        chunks = len(spans)
        format = codec.format
        segments = [(rank * numel + offset, length) for rank in range(world) for offset, length in spans]
        parts = Layout.build(segments, format, dtype, world * chunks, range(world * chunks))
        self._layouts = [parts.select([rank * chunks + c for rank in range(world)]) for c in range(chunks)]
        shard = Layout.build(spans, format, dtype, chunks, range(chunks))
        self._shards = [shard.select([c]) for c in range(chunks)]
        strides = [layout.stride for layout in self._layouts]
        super().__init__(channel, strides)
        self._received = self._buffers(strides)
        self.worker_numel = 32 * parts.blocks
        self.bytes_sent = (world - 1) * sum(strides)

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
        self._claim(after, output, input, worker)
        self._output, self._input = output, input
        self._factor = factor_of(op, self.channel.world_size)
        self._worker = worker
        self._seed = stage_seed(seed, bucket, self.channel.rank, 0)
        self._at_step = self._step(step)
        work = Work(output if value is None else value, self.bytes_sent)
        self.channel.run(self, work, start)
        return work

    def encode(self, chunk: int) -> None:
        ops.encode(self._input, self._layouts[chunk], self._sent[chunk], self._worker, self._seed, self._at_step)

    def send(self, chunk: int, tag: int) -> Exchange:
        return self.channel.all_to_all(self._received[chunk], self._sent[chunk], tag)

    def turn(self, chunk: int, tag: int) -> None:
        stride = self._layouts[chunk].stride
        ops.reduce(
            self._received[chunk], stride, self.channel.world_size, self._factor, self._shards[chunk], self._output,
            self.channel.error,
        )  # fmt: skip

    def finish(self, chunk: int) -> None:
        """There is no second stage."""

    def done(self) -> None:
        del self._output, self._input, self._worker
        super().done()


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
    channel = _call.enter(group, x)
    world, counted = channel.world_size, next(channel.seeds)
    engine: ReduceScatter | None = None
    worker = None
    with _call.refusing(channel):
        chosen = _call.parse_packets(codec, x, "x", channel)
        average = _call.check_op(op) == "avg"
        _call.check_feedback(feedback)
        if chosen is not None and feedback is not None:
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
        key = ("reduce_scatter", chosen, numel, x.dtype)
        if chosen is not None:
            engine = channel.borrow(key) or ReduceScatter(numel, chosen, x.dtype, channel)
            if feedback is not None:
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

    text = f"reduce_scatter of {x.numel()} elements of {x.dtype}, {'AVG' if average else 'SUM'}, codec {chosen}"
    if engine is None:
        nbytes = (world - 1) * result.nbytes
        issue = lambda: reduce_scatter_single(result, flat, op, _call.own_group(group))  # noqa: E731
        return _call.run(
            channel, text, _call.plain(channel, "reduce_scatter", out, nbytes, issue, copy_back), True, async_op
        )
    text += " with feedback" if worker is not None else " without feedback"
    return _call.run(channel, text, begin, worker is None, async_op)
