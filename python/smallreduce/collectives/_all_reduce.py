"""``smallreduce.all_reduce``."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from smallreduce._layout import BLOCK
from smallreduce.codecs import Codec, RandomBlocks
from smallreduce.collectives import _call
from smallreduce.collectives._channel import Start
from smallreduce.collectives._engine import BucketEngine
from smallreduce.collectives._engine_for import engine_for
from smallreduce.collectives._levels import Levels, Route
from smallreduce.collectives._work import Work
from smallreduce.feedback import ErrorFeedback, Owner

__all__ = ["all_reduce"]


def all_reduce(
    x: Tensor,
    codec: str | Codec | None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.AVG,
    group: dist.ProcessGroup | None = None,
    feedback: ErrorFeedback | None = None,
    async_op: bool = False,
    seed: int | None = None,
) -> Work | None:
    """Reduces ``x`` over the ranks of a group, in place, through compressed packets. All ranks end with the same bits.

    Every rank sends its own packets once and one reduced shard: of what torch's fp32 all-reduce sends, about
    ``codec.bits_per_element / 32``. Sparse packets go whole to all ranks instead, while these are few or the packets
    small (docs/architecture.md). Like every collective it is called by all ranks of the group in the same order.
    On CPU tensors the ranks compare their arguments first: also with ``async_op`` the call blocks until all ranks have
    entered it. On CUDA tensors they do not, nothing blocks, and the call cannot be captured in a CUDA graph.

    Args:
        x: fp32, bf16 or fp16, of any shape (one that is not contiguous is copied, and back). With a codec of None, or
            ``"fp32"`` on fp32 data, it is torch's own all-reduce: bit-equal to ``x.mul_(1 / W)`` and a SUM, any dtype.
        codec: A codec, its spelling such as ``"int4"``, or None.
        op: ReduceOp.AVG (unlike torch, the default) or ReduceOp.SUM.
        group: None is the default group.
        feedback: Residuals of this tensor, updated; not used by torch's own all-reduce. An IntQuant whose rounding is
            left open rounds to nearest with it, stochastically without.
        async_op: Return a :class:`Work`, to be waited for before ``x`` is touched again.
        seed: Any 64-bit integer, the same on all ranks; None takes that of the feedback's first collective or, without
            one, the next of the group's counter, which starts at 0.

    Returns:
        A Work with ``async_op``, otherwise None.

    Raises:
        TypeError: Wrong types or dtypes.
        ValueError: Wrong sizes or devices, an impossible codec, or elements of ``x`` that share memory.
        RuntimeError: Another rank refused its arguments or had different ones (CPU), the group failed, or a CUDA graph
            is being captured.
    """
    return reduce_all(x, codec, op, _call.enter(group, x), _call.own_group(group), feedback, async_op, seed)


def reduce_all(
    x: Tensor,
    codec: str | Codec | _call.Pair | None,
    op: dist.ReduceOp.RedOpType,
    route: Route,
    group: dist.ProcessGroup,
    feedback: ErrorFeedback | None,
    async_op: bool,
    seed: int | None,
) -> Work | None:
    """:func:`all_reduce` on one level or two."""
    channel = route.channel if isinstance(route, Levels) else route
    world, counted = channel.world_size, next(channel.seeds)
    engine: BucketEngine | None = None
    worker = server = None
    with _call.refusing(channel):
        chosen = _call.parse_levels(codec, x, "x", route, _call.parse)
        average = _call.check_op(op) == "avg"
        _call.check_feedback(feedback)
        if feedback is not None and isinstance(chosen, Codec):
            chosen = chosen.with_feedback()
        _call.check_written(x, "x")
        base = _call.check_seed(seed, counted, feedback)
        if average and not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"an average needs a floating-point tensor, got {x.dtype}")
        if world == 1:
            return _call.alone(x, async_op)
        key = ("all_reduce", chosen, x.numel(), x.dtype, _call.levels_of(route))
        if chosen is not None:
            engine = channel.borrow(key) or engine_for([(0, x.numel())], chosen, x.dtype, route)
            if feedback is not None and isinstance(chosen, Codec):
                blocks = engine.server_numel // BLOCK
                owner = Owner(chosen, x.numel(), channel.rank, world, engine.chunks, blocks)
                worker, server = feedback.bind(owner, channel.device)
        target = x.detach()
        flat = target.contiguous().view(-1)
        channel.use(target, flat)

    def copy_back() -> None:
        if flat.data_ptr() != target.data_ptr():
            target.copy_(flat.view(target.shape))

    def issue() -> dist.Work:
        # As DistributedDataParallel does without a hook; dividing after the sum, or AVG, gives other bits.
        if average:
            flat.mul_(1.0 / world)
        work: dist.Work = dist.all_reduce(flat, group=group, async_op=True)
        return work

    def after() -> None:
        copy_back()
        channel.keep(key, engine)

    def begin(start: Start) -> Work:
        assert engine is not None
        step = 0 if feedback is None else feedback.step
        work = engine.launch(flat, op, worker, server, base, step=step, value=x, after=after, start=start)
        if feedback is not None:
            feedback.advance(base)
        return work

    text = f"all_reduce of {x.numel()} elements of {x.dtype}, {'AVG' if average else 'SUM'}, "
    text += _call.describe(chosen, route)
    if isinstance(chosen, RandomBlocks):
        # Elsewhere these only round; here they say which elements are summed, and no packet would tell.
        text += f" of seed {base} in step {0 if feedback is None else feedback.step}"
    if engine is None:
        nbytes = 2 * (world - 1) * flat.nbytes // world
        return _call.run(channel, text, _call.plain(channel, "all_reduce", x, nbytes, issue, copy_back), True, async_op)
    # Encoding replaces the residual, so with feedback nothing may be encoded before it is sure to be sent.
    text += " with feedback" if worker is not None else " without feedback"
    return _call.run(channel, text, begin, worker is None, async_op)
