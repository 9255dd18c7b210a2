"""The gradients of one bucket on their way to the ranks that own them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives import Work, channel_of, engine_for, reduce_scatter_for, ring_bytes
from smallreduce.collectives._compat import reduce_scatter_single
from smallreduce.collectives._levels import Levels
from smallreduce.collectives._pool import Pool
from smallreduce.fsdp._leg import borrow
from smallreduce.fsdp._memory import Loan
from smallreduce.ragged._bucket import Bucket
from smallreduce.ragged._packing import Packing
from smallreduce.ragged._tensor import RaggedTensor

__all__ = ["Reduction"]


class Reduction:
    """Starts to reduce; :meth:`finish` is to be called later, in the same order on all ranks.

    fp32 and bf16 are averaged as torch's ``ReduceOp.AVG`` does; fp16 sums are divided before and after, by about the
    root of the number of ranks each, so that they do not overflow: both as torch's ``fully_shard`` does.

    Args:
        members: Numbers of the parameters that have a gradient; the same on all ranks.
        gradients: Of their shapes, in the dtype in which they were computed, or in which they are reduced. The list is
            emptied.
        pool: Where the buffer for them comes from.
        between_replicas: Whether they are averaged over replicas too; else they are kept, and added to the next.
    """

    def __init__(
        self, bucket: Bucket, members: tuple[int, ...], gradients: list[Tensor], pool: Pool, between_replicas: bool
    ) -> None:
        self._bucket, self._members, self._between_replicas = bucket, members, between_replicas
        self._packing = bucket.packing(members)
        ranks, device = bucket.policy.ranks, bucket.shard.device
        dtype = bucket.policy.reduce_dtype(bucket.shard.dtype)
        world, part = ranks.shard.size(), self._packing.part
        before, self._after, self._op = _factors(dtype, world * ranks.replica_count)
        self._pool = pool
        self._is_lent = False
        self._loan: Loan | None = None
        self._work: dist.Work | Work | None = None
        self._step = bucket.progress.step
        buffer = self._take(world * part, dtype, device, gradients)
        self._buffer: Tensor | None = buffer
        # In its own part of the buffer, until that is let go of.
        self._output = buffer[ranks.shard.rank() * part :][:part]
        try:
            self._packing.pack(gradients, buffer)
            gradients.clear()  # before more memory is taken to send them
            if before != 1:
                buffer.div_(before)
            if world > 1:
                self._work = self._start(buffer, self._packing)
        except BaseException:
            self.wait()  # nothing was sent, or all of it: what is borrowed goes back
            raise
        bucket.progress.step += 1

    def _take(self, numel: int, dtype: torch.dtype, device: torch.device, gradients: list[Tensor]) -> Tensor:
        """Memory for what is sent: if it can be, that of the parameters that the backward pass is done with."""
        lent = self._bucket.lend(self, numel, dtype, gradients)
        self._is_lent = lent is not None
        return self._pool.take(numel, dtype, device) if lent is None else lent

    def _release(self) -> None:
        if self._buffer is None:
            return
        if self._is_lent:
            self._bucket.take_back()
        else:
            self._pool.give(self._buffer)
        self._buffer = None

    def _start(self, buffer: Tensor, packing: Packing) -> dist.Work | Work:
        bucket, policy, output = self._bucket, self._bucket.policy, self._output
        leg, group, dtype = policy.gradients, policy.ranks.shard, output.dtype
        uncompressed = (group.size() - 1) * output.nbytes
        if leg.is_exact(dtype):
            leg.count(uncompressed)
            return reduce_scatter_single(output, buffer, self._op, group)
        codec, channel, segments = leg.codec, channel_of(group, output.device), packing.segments
        assert codec is not None
        route = channel if policy.node_size is None else Levels(channel, policy.node_size)
        engine, give_back = borrow(
            channel,
            ("ragged.scatter", segments, packing.part, codec, dtype, policy.node_size),
            lambda: reduce_scatter_for(segments, packing.part, codec, dtype, route),
        )
        leg.count(uncompressed, engine.bytes_sent)
        self._output = output = torch.empty_like(output)
        self._loan = bucket.residuals.lend(self._members, self._step, self._pool)
        worker = None if self._loan is None else self._loan.worker
        work = engine.launch(
            output, buffer, self._op, worker, leg.seed, 3 * bucket.number + 1, self._step, after=give_back
        )
        if not buffer.is_cuda:
            self._release()  # all of it has been encoded
        return work

    @property
    def holds_gradients(self) -> bool:
        """Whether the buffer that they were packed into is on the CPU and still needed."""
        return self._buffer is not None and not self._buffer.is_cuda

    def wait(self) -> None:
        """Waits until this rank has its part of the sum; for what is not to be finished."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._buffer is not None:
            if self._output.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr():
                self._output = self._output.clone()
            self._release()
        if self._loan is not None:
            self._loan.give_back()
            self._loan = None

    @torch.no_grad()
    def finish(self) -> None:
        """Waits, and adds the result to the gradients of the sharded parameters."""
        self.wait()
        bucket, output = self._bucket, self._output
        if bucket.policy.ranks.replicas is not None:
            kept = bucket.take_partial(self._members)
            if kept is not None:
                output += kept
            if not self._between_replicas:
                bucket.keep_partial(self._members, output)
                return
            self._average_replicas(bucket.policy.ranks.replicas)
        if self._after != 1:
            output.div_(self._after)
        output = output.to(bucket.shard.dtype)
        rank = bucket.policy.ranks.shard.rank()
        for member in self._members:
            slot = bucket.slots[member]
            local = self._packing.local(member, rank, output)
            parameter = slot.sharded
            if parameter.grad is not None and not isinstance(parameter.grad, RaggedTensor):
                # Autograd's, of a loss that has the sharded parameter itself in it, as a sum of all its elements.
                group = bucket.policy.ranks.shard
                parameter.grad = RaggedTensor.distribute(parameter.grad, slot.placement, group)
            if isinstance(parameter.grad, RaggedTensor):
                parameter.grad.to_local().add_(local)
            else:
                parameter.grad = RaggedTensor(local, parameter.shape, slot.placement, bucket.policy.ranks.shard)
            for hook in list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()):
                hook(parameter)

    def _average_replicas(self, group: dist.ProcessGroup) -> None:
        bucket, output = self._bucket, self._output
        leg, dtype = bucket.policy.between, output.dtype
        step = bucket.progress.between
        bucket.progress.between += 1
        uncompressed = ring_bytes(output.nbytes, group.size())
        if leg.is_exact(dtype) or group.size() == 1:
            dist.all_reduce(output, op=self._op, group=group)
            leg.count(uncompressed)
            return
        codec, channel = leg.codec, channel_of(group, output.device)
        rank = bucket.policy.ranks.shard.rank()
        segments = self._packing.segments.of[rank]
        assert codec is not None
        assert not isinstance(codec, tuple)
        engine, give_back = borrow(
            channel,
            ("ragged.replicas", segments, codec, dtype),
            lambda: engine_for(segments, codec, dtype, channel),
        )
        leg.count(uncompressed, engine.bytes_sent)
        engine.launch(output, self._op, None, None, leg.seed, 3 * bucket.number + 2, step, after=give_back).wait()


def _factors(dtype: torch.dtype, ranks: int) -> tuple[float, float, dist.ReduceOp.RedOpType]:
    """What to divide by before and after, and the operation in between."""
    if ranks == 1:
        return 1.0, 1.0, dist.ReduceOp.SUM
    if dtype != torch.float16:
        return 1.0, 1.0, dist.ReduceOp.AVG
    before = 1.0
    while ranks % before == 0 and ranks / before > before:
        before *= 2
    return before, ranks / before, dist.ReduceOp.SUM
