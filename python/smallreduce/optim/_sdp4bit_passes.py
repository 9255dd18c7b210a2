"""The backward passes of :class:`SDP4Bit`: which gradients are reduced, when, and what is kept of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler  # torch.amp exports it from 2.13 on

from smallreduce.collectives import Count
from smallreduce.collectives._pool import Pool
from smallreduce.optim._sdp4bit_exchange import Exchange

__all__ = ["BackwardPasses"]


class BackwardPasses:
    """Takes gradients as they come, and reduces bucket by bucket in one order on all ranks.

    Args:
        exchanges: Of the buckets, in the order of the forward pass.
        scaler: What scales the loss.
        count: Where the overflow flags are counted.

    Attributes:
        is_exact: Whether the gradients of the next pass are reduced without codecs.
        number: Passes whose gradients were reduced, those before a state was loaded too; it enters the random bits.
        done: Those of this object.
        has_gradients: Whether there are any that were reduced.
        sentinel: One more element that may be given to the optimizer: without any of its own a rank could not tell a
            GradScaler of an Inf on another.
    """

    def __init__(
        self, exchanges: Sequence[Exchange], group: dist.ProcessGroup, scaler: GradScaler | None, count: Count
    ) -> None:
        self._exchanges = exchanges
        self._group = group
        self._scaler = scaler
        self._count = count
        self.pool = Pool()
        self.is_exact = False
        self.number = self.done = 0
        self.has_gradients = False
        self._is_fresh = False  # whether they have been reduced since they were last forgotten or set to zero
        self.sentinel = nn.Parameter(torch.zeros(1, device=exchanges[0].bucket.weights.device))
        self._next = 0  # bucket to be reduced, from the last on
        self._in_pass = self._is_local = False
        self._used: int | None = None  # passes at the last step whose gradients are still there
        self._has_warned = False

    @contextmanager
    def local(self) -> Iterator[None]:
        """Within it nothing is reduced."""
        before, self._is_local = self._is_local, True
        try:
            yield
        finally:
            self._is_local = before

    @torch.no_grad()
    def take(self, exchange: Exchange, index: int) -> None:
        """The gradient of a member, by its number in the bucket, stands in ``grad`` of its parameter."""
        if self._is_local:
            return
        if not self._in_pass:
            self._in_pass, self._next = True, 0
            self.number += 1
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        exchange.take(index, self.is_exact, self.pool)
        while self._next < len(self._exchanges) and self._exchanges[-1 - self._next].is_ready:
            self._reduce_next()

    def _reduce_next(self) -> None:
        # Gradients are expected in the order opposite to that of the forward pass; on all ranks it is this one.
        exchange = self._exchanges[-1 - self._next]
        self._next += 1
        exchange.reduce(self.is_exact, self.number, self.pool)

    @torch.no_grad()
    def _end(self) -> None:
        """Called when the backward pass has nothing left to do."""
        while self._next < len(self._exchanges):
            self._reduce_next()
        for exchange in reversed(self._exchanges):
            exchange.end_reduce(self.pool)
        self._in_pass = False
        self.has_gradients = self._is_fresh = True
        self.done += 1
        if self._scaler is not None and self._scaler.is_enabled():
            self._share_overflow()

    def _share_overflow(self) -> None:
        """Makes an Inf or a NaN in the part of any rank one on all, so that a GradScaler decides alike everywhere."""
        self.sentinel.grad = torch.zeros_like(self.sentinel)
        slices = [one.tensor for exchange in self._exchanges for one in exchange.bucket.slices]
        gradients = [tensor.grad for tensor in [*slices, self.sentinel] if tensor.grad is not None]
        finite = torch.stack([extreme.isfinite() for gradient in gradients for extreme in torch.aminmax(gradient)])
        found = (~finite.all()).float().reshape(1)
        if self._group.size() > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
            self._count.add_all_reduce(found, self._group.size())
        for gradient in gradients:
            gradient[:1] = torch.where(found > 0, torch.inf, gradient[:1]).to(gradient.dtype)

    @torch.no_grad()
    def zero(self, set_to_none: bool) -> None:
        """Forgets all gradients, or sets those that were reduced to zero."""
        forget = set_to_none or self._in_pass
        for exchange in self._exchanges:
            for member in exchange.bucket.members:
                member.parameter.grad = None
        failed: Exception | None = None
        for exchange in self._exchanges:
            if not forget:
                exchange.bucket.zero()
                continue
            try:
                exchange.forget(self.pool)
            except Exception as error:  # all are to be let go of
                failed = failed or error
        self._used, self._is_fresh = None, False
        if forget:
            self.has_gradients = False
            self.sentinel.grad = None
        self._in_pass = False
        if failed is not None:
            raise failed

    def use(self) -> None:
        """Called by a step. Warns once where gradients of the step before are still among the reduced ones."""
        if self._used is not None and self.number > self._used and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the gradients of an earlier step were added to those of this one, since zero_grad() of SDP4Bit was "
                "not called in between; that of the model does not reach reduced gradients",
                stacklevel=3,
            )
        self._used = self.number

    def check(self, call: str) -> None:
        """Raises RuntimeError unless all gradients there are have been reduced, and, among several ranks, some have."""
        if self._in_pass:
            raise RuntimeError(
                f"{call} after a backward pass that has not ended; zero_grad() starts anew, where all ranks "
                "failed at the same point of it"
            )
        if any(member.parameter.grad is not None for e in self._exchanges for member in e.bucket.members):
            raise RuntimeError(
                f"{call} with gradients that have not been reduced: the last of the backward passes whose gradients "
                "accumulate must be outside of no_sync()"
            )
        if not self._is_fresh and self._group.size() > 1:
            raise RuntimeError(
                f"{call} without any gradient on this rank, while others may have reduced theirs: each step needs as "
                "many backward passes on all ranks, which reach a parameter that is trained; where a loss may reach "
                "none, add 0 * sum(p.sum() for p in model.parameters()) to it"
            )
