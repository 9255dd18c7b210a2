"""The reduce-scatter of one FSDP2 module: its gradients as packets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives import Start, channel_of, reduce_scatter_for
from smallreduce.collectives._levels import Levels
from smallreduce.collectives._pool import Pool
from smallreduce.fsdp._leg import Leg, Progress, borrow
from smallreduce.fsdp._memory import Memory
from smallreduce.fsdp._torch_groups import Bucket

__all__ = ["ALWAYS", "GradientScatter"]

ALWAYS = 8
"""Reductions without a whole one among them after which the next are not expected to be whole either."""


class GradientScatter:
    """What ``FSDPModule.set_custom_reduce_scatter`` takes.

    Args:
        bucket: The module's.
        leg: The codecs; and what counts.
        progress: The module's.
        node_size: Ranks in a node, where the leg has two codecs.
        memory_for: Makes the memory of what the codec took away from earlier gradients, for the parameters that are
            trainable now; None without feedback, or without any.
        pool: For what it takes while a reduction is under way.

    Attributes:
        bucket: As given.
        memory: The memory, if there is one.
        partial: Reductions in which some trainable parameters had no gradient.
    """

    def __init__(
        self,
        bucket: Bucket,
        leg: Leg,
        progress: Progress,
        node_size: int | None,
        memory_for: Callable[[Bucket], Memory | None],
        pool: Pool,
    ) -> None:
        self.bucket = bucket
        self._leg = leg
        self._progress = progress
        self._node_size = node_size
        self._memory_for = memory_for
        self._pool = pool
        self.memory = memory_for(bucket)
        self.partial = 0
        self._is_ever_whole = False
        self._stock = bucket.reduce_scatter

    @property
    def label(self) -> str:
        """For messages."""
        return self.bucket.label

    @property
    def reduce_dtype(self) -> torch.dtype:
        """In which gradients are reduced."""
        return self.bucket.reduce_dtype

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor: Tensor = self._stock.allocate(size, dtype=dtype, device=device)
        return tensor

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Reduces ``input_tensor``, a part for each rank, into this rank's, ``output_tensor``.

        It is complete when this returns (CUDA: for the current stream), since torch drops what it returns.

        Raises:
            ValueError: ``op`` is neither AVG nor SUM.
        """
        leg, dtype, numel = self._leg, input_tensor.dtype, output_tensor.numel()
        step = self._progress.step
        uncompressed = (group.size() - 1) * output_tensor.nbytes
        if leg.is_exact(dtype):
            self._progress.step += 1
            leg.count(uncompressed)
            return self._stock(output_tensor, input_tensor, group, op, async_op)
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ValueError(
                f"{self.bucket.label} reduces with {_name(op)}, as set_gradient_divide_factor makes it; compressed "
                "gradients take a mean or a sum: call set_force_sum_reduction_for_comms(True) on every FSDP module"
            )
        codec = leg.codec
        assert codec is not None
        segments = self.bucket.segments(trainable=True)
        memory = None
        if sum(length for _, length in segments) != numel:
            # torch leaves parameters without a gradient out, and does not say which.
            segments = ((0, numel),)
            self.partial += 1
            if self.memory is not None:
                self._warn_if_always_partial()
                self.memory.skip(step)
        else:
            self._is_ever_whole = True
            memory = self._memory_of_now()
        self._progress.step += 1
        channel = channel_of(group, output_tensor.device)
        route = channel if self._node_size is None else Levels(channel, self._node_size)
        key = ("fsdp.scatter", segments, codec, dtype, self._node_size)
        engine, give_back = borrow(channel, key, lambda: reduce_scatter_for(segments, numel, codec, dtype, route))
        loan = None if memory is None else memory.lend(step, self._pool)
        worker = None if loan is None else loan.worker
        work = engine.launch(
            output_tensor, input_tensor, op, worker, leg.seed, 3 * self.bucket.number + 1, step,
            after=give_back, start=Start(background=False),
        )  # fmt: skip
        leg.count(uncompressed, engine.bytes_sent)
        work.wait()
        if loan is not None:
            loan.give_back()
        return None

    def _warn_if_always_partial(self) -> None:
        if self._is_ever_whole or self.partial != ALWAYS:
            return
        warnings.warn(
            f"in each of the first {ALWAYS} reductions of {self.bucket.label} some trainable parameters had no "
            "gradient, and such a reduction is made without feedback: call set_reduce_scatter_unused_params(True) on "
            "the model (torch 2.13), freeze what is not used, or give feedback=None, which keeps no residuals",
            UserWarning,
            stacklevel=3,
        )

    def _memory_of_now(self) -> Memory | None:
        """That of the parameters that are trainable now, of which some may have been frozen before, or may be since."""
        if self.memory is None:
            self.memory = self._memory_for(self.bucket)
        else:
            slots = [slot for slot in self.bucket.slots if slot.trainable]
            self.memory.follow(slots, self.bucket.device)
        return self.memory


def _name(op: Any) -> str:
    """Of what torch reduces with: a RedOpType, or a ReduceOp that has one."""
    name: str = getattr(op, "op", op).name
    return name
