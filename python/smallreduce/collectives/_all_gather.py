"""``smallreduce.all_gather``: the lower half of an all-reduce."""

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
from smallreduce.collectives._compat import all_gather_single
from smallreduce.collectives._engine import Engine, chunk_count, chunk_spans, stage_seed
from smallreduce.collectives._work import Work

__all__ = ["AllGather", "all_gather"]


class AllGather(Engine):
    """Compressed all-gather of flat buffers of ``numel`` elements into one of ``world_size * numel``."""

    name = "all_gather"

    def __init__(self, numel: int, codec: PacketCodec, dtype: torch.dtype, channel: Channel) -> None:
        world = channel.world_size
        spans = chunk_spans(numel, chunk_count(world * numel, world, codec), codec)
        chunks = len(spans)
        format = codec.format
        shard = Layout.build(spans, format, dtype, chunks, range(chunks))
        self._shards = [shard.select([c]) for c in range(chunks)]
        segments = [(rank * numel + offset, length) for rank in range(world) for offset, length in spans]
        parts = Layout.build(segments, format, dtype, world * chunks, range(world * chunks))
        self._layouts = [parts.select([rank * chunks + c for rank in range(world)]) for c in range(chunks)]
        strides = [layout.stride for layout in self._layouts]
        super().__init__(channel, strides)
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
    ) -> Work:
        """Starts it; see :meth:`BucketEngine.launch`. ``input`` may be this rank's part of ``output``."""
        self._claim(after, output, input)
        self._output, self._input = output, input
        self._seed = stage_seed(seed, bucket, self.channel.rank, 0)
        self._at_step = self._step(step)
        work = Work(output if value is None else value, self.bytes_sent)
        self.channel.run(self, work, start)
        return work

    def _mine(self, chunk: int) -> Tensor:
        stride = self._layouts[chunk].stride
        return self._sent[chunk][self.channel.rank * stride :][:stride]

    def encode(self, chunk: int) -> None:
        ops.encode(self._input, self._shards[chunk], self._mine(chunk), None, self._seed, self._at_step)

    def send(self, chunk: int, tag: int) -> Exchange:
        return self.channel.all_gather(self._sent[chunk], self._mine(chunk), tag)

    def turn(self, chunk: int, tag: int) -> None:
        """There is one stage only."""

    def finish(self, chunk: int) -> None:
        # This rank's own part too, so that all ranks have the same bits. It has been read: all that is decoded here was
        # encoded before it was sent.
        ops.decode(self._sent[chunk], self._layouts[chunk], self._output, self.channel.error)

    def done(self) -> None:
        del self._output, self._input
        super().done()


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
    channel = _call.enter(group, x)
    world, counted = channel.world_size, next(channel.seeds)
    engine: AllGather | None = None
    with _call.refusing(channel):
        chosen = _call.parse_packets(codec, x, "x", channel)
        base = _call.check_seed(seed, counted)
        _call.check_output(out, x, world * x.numel(), channel)
        if world == 1:
            out.detach().copy_(x.detach().reshape(out.shape))
            return _call.alone(out, async_op)
        key = ("all_gather", chosen, x.numel(), x.dtype)
        if chosen is not None:
            engine = channel.borrow(key) or AllGather(x.numel(), chosen, x.dtype, channel)
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

    text = f"all_gather of {x.numel()} elements of {x.dtype} from each rank, codec {chosen}"
    if engine is None:
        nbytes = (world - 1) * flat.nbytes
        issue = lambda: all_gather_single(result, flat, _call.own_group(group))  # noqa: E731
        return _call.run(
            channel, text, _call.plain(channel, "all_gather", out, nbytes, issue, copy_back), True, async_op
        )
    return _call.run(channel, text, begin, True, async_op)
