"""How the gradients and the weights of a bucket of :class:`SDP4Bit` travel: exactly, or through packets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives import (
    AllGather,
    Channel,
    Count,
    ReduceScatter,
    Start,
    TwoLevel,
    all_gather_for,
    reduce_scatter_for,
    ring_bytes,
)
from smallreduce.collectives._compat import all_gather_single, reduce_scatter_single
from smallreduce.collectives._pool import Pool
from smallreduce.optim._sdp4bit_arguments import Scheme
from smallreduce.optim._sdp4bit_bucket import Bucket

__all__ = ["Exchange"]


class _Work(Protocol):
    def wait(self) -> object: ...


@dataclass
class _Traffic:
    """Collectives in one direction: what was sent, and the one in flight."""

    count: Count = field(default_factory=Count)
    work: _Work | None = None


class Exchange:
    """The two collectives of a bucket. At most one of each is in flight.

    Args:
        group: For torch's own collectives.
        route: Of packets, on one level or two; None at world size 1.
    """

    def __init__(
        self, bucket: Bucket, scheme: Scheme, group: dist.ProcessGroup, route: Channel | TwoLevel | None
    ) -> None:
        self.bucket = bucket
        self._scheme = scheme
        self._group = group
        self._reducer: ReduceScatter | None = None
        self._gatherer: AllGather | None = None
        whole = [(0, bucket.part)]
        if route is not None and scheme.gradients is not None:
            self._reducer = reduce_scatter_for(whole, bucket.part, scheme.gradients, bucket.master.dtype, route)
        if route is not None and scheme.weights is not None:
            self._gatherer = all_gather_for(whole, bucket.part, scheme.weights, bucket.dtype, route)
        self.gradients, self.weights = _Traffic(), _Traffic()
        self._flat: Tensor | None = None  # gradients of this pass, until they are reduced
        self._is_packed = False
        self._output: Tensor | None = None
        self._ready: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Of the packets' buffers."""
        return sum(engine.nbytes for engine in (self._reducer, self._gatherer) if engine is not None)

    # ---- gradients --------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether all parameters have given their gradient in this pass."""
        return len(self._ready) == len(self.bucket.members)

    def take(self, index: int, exact: bool, pool: Pool) -> None:
        """Takes the gradient away from a member, to be reduced exactly or not."""
        member = self.bucket.members[index]
        gradient = member.parameter.grad
        assert gradient is not None
        if index in self._ready or self._output is not None:  # the latter: the bucket is being reduced already
            raise RuntimeError(
                f"the gradient of {member.name} has come twice in one backward pass, as it does with reentrant "
                "activation checkpointing (use use_reentrant=False) or after a pass that failed (zero_grad() first)"
            )
        if gradient.layout is not torch.strided:
            raise TypeError(f"gradients must be dense, got {gradient.layout} for {member.name}")
        flat = self._buffer(exact, pool)
        member.view(flat, self._is_packed).copy_(gradient)
        member.parameter.grad = None
        self._ready.add(index)

    def _buffer(self, exact: bool, pool: Pool) -> Tensor:
        if self._flat is None:
            bucket = self.bucket
            # gloo's order of summation depends on where an element lies, which is to be where it does in DDP.
            exact = exact or self._reducer is None
            self._is_packed = bucket.world == 1 or (exact and not bucket.weights.is_cuda)
            numel = bucket.numel if self._is_packed else bucket.weights.numel()
            self._flat = pool.take(numel, bucket.master.dtype, bucket.weights.device)
            if not self._is_packed:
                bucket.clean_gaps(self._flat)
        return self._flat

    def reduce(self, exact: bool, at_pass: int, pool: Pool) -> None:
        """Starts to reduce the gradients. Members that have none count as zero."""
        bucket, flat = self.bucket, self._buffer(exact, pool)
        for index, member in enumerate(bucket.members):
            if index not in self._ready:
                if member.parameter.grad is not None:  # accumulated in earlier passes
                    self.take(index, exact, pool)
                else:
                    member.view(flat, self._is_packed).zero_()
        self._ready.clear()
        count = self.gradients.count
        count.uncompressed_bytes += ring_bytes(bucket.numel * flat.itemsize, bucket.world) // 2
        if bucket.world == 1:
            self._output, self._flat = flat, None
        elif exact or self._reducer is None:
            # The order of DDP: first divided, then summed.
            flat.mul_(1 / bucket.world)
            count.collectives += 1
            if not self._is_packed:
                self._output = torch.empty_like(bucket.master)
                count.bytes_sent += (bucket.world - 1) * self._output.nbytes
                self.gradients.work = reduce_scatter_single(self._output, flat, dist.ReduceOp.SUM, self._group)
            else:
                # A reduce-scatter of gloo's is an all-reduce, too.
                self._output, self._flat = flat, None
                count.bytes_sent += ring_bytes(flat.nbytes, bucket.world)
                self.gradients.work = dist.all_reduce(flat, group=self._group, async_op=True)
        else:
            self._output = torch.empty_like(bucket.master)
            self.gradients.work = self._reducer.launch(
                self._output, flat, dist.ReduceOp.AVG, seed=self._scheme.seed, bucket=2 * bucket.number, step=at_pass
            )
            count.collectives += 1
            count.bytes_sent += self._reducer.bytes_sent
            # It has been encoded. (On CUDA it will be, which torch's allocator has been told.)
            self._flat = None
            pool.give(flat)

    def end_reduce(self, pool: Pool) -> None:
        """Waits, and adds the result to what there is."""
        if self._output is None:
            return
        if self.gradients.work is not None:
            self.gradients.work.wait()
        pool.give(self._flat)
        pool.give(self.bucket.accumulate(self._output, self._is_packed))
        self._output = self._flat = self.gradients.work = None

    def forget(self, pool: Pool) -> None:
        """Lets go of all gradients, those of a pass that failed too."""
        work, self.gradients.work = self.gradients.work, None
        try:
            # So that nothing is written to the buffers later. One that failed raises here once more, and is gone.
            if work is not None:
                work.wait()
        finally:
            pool.give(self._flat)
            if self._is_packed:
                pool.give(self._output)
            self._output = self._flat = None
            self._ready.clear()
            was_whole = self.bucket.is_whole
            reduced = self.bucket.forget()
            if was_whole:
                pool.give(reduced)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def gather(self, exact: bool, step: int) -> None:
        """Starts to bring the weights of all ranks up to date with their masters."""
        bucket, count, scheme = self.bucket, self.weights.count, self._scheme
        part_nbytes = bucket.own.nbytes
        count.uncompressed_bytes += (bucket.world - 1) * part_nbytes
        # The buffer is written past autograd, which is to notice a backward pass through the weights of before.
        torch.autograd.graph.increment_version([member.parameter for member in bucket.members])
        if bucket.world == 1:
            bucket.write()
        elif exact or self._gatherer is None:
            bucket.write()
            self.weights.work = all_gather_single(bucket.weights, bucket.own, self._group)
            count.collectives += 1
            count.bytes_sent += (bucket.world - 1) * part_nbytes
        else:
            if not scheme.differences:
                bucket.write()
            self.weights.work = self._gatherer.launch(
                bucket.weights,
                bucket.master if scheme.differences else bucket.own,
                seed=scheme.seed,
                bucket=2 * bucket.number + 1,
                step=step,
                start=Start(background=scheme.overlap),
                base=bucket.own if scheme.differences else None,
            )
            count.collectives += 1
            count.bytes_sent += self._gatherer.bytes_sent

    def end_gather(self) -> None:
        """Waits until the weights are up to date. If the gather failed, this raises each time."""
        if self.weights.work is not None:
            self.weights.work.wait()
            self.weights.work = None
            if self._gatherer is not None:  # not every codec decodes what was encoded as zero to zero
                self.bucket.clean_gaps(self.bucket.weights)
