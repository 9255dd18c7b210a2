"""What the modules of one model share in a pass: who is next, and what is on its way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from smallreduce.collectives._pool import Pool
from smallreduce.ragged._bucket import Bucket
from smallreduce.ragged._reduction import Reduction

if TYPE_CHECKING:
    from smallreduce.ragged._unit import Unit

__all__ = ["Schedule"]


class Schedule:
    """One for a model: its units are those of the root module and of all modules in it.

    What is gathered ahead: in a forward pass the unit that came next in the pass before, in a backward pass the one
    that was used before this one.

    Args:
        units: In the order of the model's modules; the same on all ranks.

    Attributes:
        step: Backward passes so far, on which the random bits of the weights depend.
        is_last_backward: Whether gradients are complete after this backward pass.
        root: The outermost unit of the forward pass that is going on.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self.step = 0
        self.is_last_backward = True
        self.root: Unit | None = None
        self._pool = Pool()
        self._reducing: list[Reduction] = []
        self._is_ending = False  # whether the end of the backward pass is asked for
        self._coming: list[Unit] = []  # in the forward pass before
        self._seen: list[Unit] = []  # in this one
        self._used: list[Unit] = []  # in forward passes whose backward pass has not ended
        for number, bucket in enumerate(bucket for unit in self.units for bucket in unit.buckets):
            bucket.number = number

    def enter(self, unit: Unit) -> None:
        """A forward pass comes to a unit."""
        if self.root is None:
            self.root = unit
            self._seen = []
        self._seen.append(unit)

    def next_after(self, unit: Unit) -> Unit | None:
        """Who comes next, if this pass has gone the way of the one before so far."""
        at = len(self._seen) - 1
        if at + 1 < len(self._coming) and self._coming[at] is unit:
            return self._coming[at + 1]
        return None

    def leave(self, unit: Unit) -> None:
        """The forward pass of a unit is over; with that of the outermost one, the model's."""
        if torch.is_grad_enabled():
            self._used.append(unit)
        if self.root is unit:
            self.root = None
            self._coming = self._seen
            for each in self.units:
                each.drop_unused()

    def before(self, unit: Unit) -> Unit | None:
        """Who was used before, counted from the end; called once for each use in the backward pass."""
        for at in reversed(range(len(self._used))):
            if self._used[at] is unit:
                del self._used[at + 1 :]
                self._used.pop()
                return self._used[-1] if self._used else None
        return None

    def reduce(self, bucket: Bucket, all_of_them: bool, between_replicas: bool) -> None:
        """Starts to reduce a bucket's gradients, if there are any, once those of the one before have arrived."""
        members, gradients = bucket.take_gradients(all_of_them)
        if not members:
            return
        self.finish_reductions()
        self._reducing.append(Reduction(bucket, members, gradients, self._pool, between_replicas))

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients that are being reduced hold as much memory as they did before. (On CUDA that is not
        waited for: the allocator follows the streams.)"""
        return any(reduction.holds_gradients for reduction in self._reducing)

    def release_gradients(self) -> None:
        """Waits for gradients that hold that memory; nothing is sent."""
        for reduction in self._reducing:
            if reduction.holds_gradients:
                reduction.wait()

    def finish_reductions(self) -> None:
        """Waits for what is being reduced."""
        while self._reducing:
            self._reducing.pop(0).finish()

    def ask_for_end(self) -> None:
        """Makes :meth:`end_backward` be called when the backward pass that is going on is over."""
        if not self._is_ending:
            self._is_ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    @torch.no_grad()
    def _end_backward(self) -> None:
        self._is_ending = False
        self.root = None
        for unit in self.units:
            unit.end_backward()
        for unit in self.units:
            unit.settle()
        self.finish_reductions()
        self.step += 1
        if self.is_last_backward:
            self._used.clear()

    def reset(self) -> None:
        """Forgets the pass that is going on, after an exception in it."""
        self._is_ending = False
        self.root = None
        self._seen, self._coming, self._used = [], [], []
        while self._reducing:
            self._reducing.pop(0).wait()
